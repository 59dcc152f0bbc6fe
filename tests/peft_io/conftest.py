import pytest

from tests.peft_io.folders import write
from vera_jax.adapters.files import load_adapter
from vera_jax.peft_io import import_adapter


@pytest.fixture
def carry(tiny_model, tmp_path):
  """Writes a PEFT folder and imports it into tmp_path/ours."""

  def carry(tensors, config, **changes):
    folder = write(tmp_path / "theirs", tensors, config, **changes)
    import_adapter(folder, tmp_path / "ours", base=str(tiny_model))
    saved = load_adapter(tmp_path / "ours")
    return saved.about, saved.tensors

  return carry
