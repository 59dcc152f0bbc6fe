"""Saves are small, few and good on any mesh."""

import errno
import os
import shutil
import subprocess
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from vera_jax.errors import UserError
from vera_jax.pretrained.sharding import make_mesh
from vera_jax.train.checkpoint import Checkpoints, without_metrics


def state(value=0.0, sharding=None):
  tree = {"d": jnp.full(8, value), "slots": (jnp.full((8, 2), value),)}
  return jax.device_put(tree, sharding)


def steps(folder):
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def test_what_is_saved_comes_back(tmp_path):
  progress = {"history": [{"score": 0.1}], "loss_sum": 0.1 + 0.2}
  with Checkpoints(tmp_path) as saves:
    assert saves.latest_step is None
    saves.save(3, state(1 / 3), progress)
  with Checkpoints(tmp_path) as saves:
    assert saves.latest_step == 3
    restored, back = saves.restore(3, state())
  assert back == progress
  jax.tree.map(np.testing.assert_array_equal, restored, state(1 / 3))


@pytest.mark.parametrize("again", [False, True])
def test_the_last_two_and_the_best_are_kept(again, tmp_path):
  """`again`: in a new process for each save, as after interruptions."""
  with ExitStack() as stack:
    for i, best in enumerate([1, 2, 2, 2, 2, 2]):
      if again or i == 0:
        stack.close()
        saves = stack.enter_context(Checkpoints(tmp_path))
      saves.save(i + 1, state(i), {}, best=best)
  assert steps(tmp_path) == [2, 5, 6]


def test_before_the_first_epoch_none_is_the_best(tmp_path):
  with Checkpoints(tmp_path) as saves:
    for step in (1, 2, 3):
      saves.save(step, state(), {})
  assert steps(tmp_path) == [2, 3]


def test_the_same_step_twice_is_harmless(tmp_path):
  with Checkpoints(tmp_path) as saves:
    saves.save(1, state(1.0), {"a": 1}, best=1)
    saves.save(1, state(2.0), {"a": 2})
    restored, progress = saves.restore(1, state())
  assert progress == {"a": 1} and restored["d"][0] == 1.0


def test_a_save_asks_for_no_metrics(tmp_path, monkeypatch):
  """tensorstore would never free them."""
  name, asked = "experimental_collect_matching_metrics", []

  def collect(*args, **options):
    asked.append(args)
    return []

  monkeypatch.setattr(tensorstore, name, collect)
  with Checkpoints(tmp_path) as saves:
    saves.save(1, state(), {})
  assert not asked and getattr(tensorstore, name) is collect
  monkeypatch.delattr(tensorstore, name)  # as a later version may lack it
  with without_metrics():
    assert not hasattr(tensorstore, name)


def test_a_save_goes_on_another_mesh(tmp_path):
  split = NamedSharding(make_mesh(8, 1, 1), PartitionSpec("data"))
  whole = NamedSharding(make_mesh(1, 4, 2), PartitionSpec(("fsdp", "tensor")))
  with Checkpoints(tmp_path) as saves:
    saves.save(1, state(1 / 3, split), {})
    restored, _ = saves.restore(1, state(0.0, whole))
  assert restored["d"].sharding == whole
  jax.tree.map(np.testing.assert_array_equal, restored, state(1 / 3))


def test_a_run_can_go_back_by_one_save(tmp_path):
  with Checkpoints(tmp_path) as saves:
    assert saves.resumable == [0]
    saves.save(3, state(), {"a": 1})
    assert saves.resumable == [0, 3]
    for step in (5, 8):
      saves.save(step, state(step), {"a": step}, best=3)
    assert saves.resumable == [5, 8]  # 3 is only there as the best
    saves.forget_after(5)
    assert saves.latest_step == 5 and saves.progress(5) == {"a": 5}
    saves.save(8, state(9.0), {"a": 9}, best=3)
    assert saves.restore(8, state())[0]["d"][0] == 9.0
  assert steps(tmp_path) == [3, 5, 8]


def array_file(save):
  """The file with the most of a save's arrays in it."""
  files = [path for path in (save / "state").rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def test_a_damaged_save_is_named_and_set_aside(tmp_path, caplog):
  folder = tmp_path / "checkpoints"
  with Checkpoints(folder) as saves:
    for step in (1, 2, 3):
      saves.save(step, state(step), {})
  file = array_file(folder / "3")
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  with Checkpoints(folder) as saves:
    assert saves.latest_step == 2
    restored, _ = saves.restore(2, state())
    assert restored["d"][0] == 2.0
    saves.save(3, state(3.0), {})
  assert "save of step 3 is not used" in caplog.text
  assert str(file) in caplog.text
  kept = tmp_path / "damaged" / "3"
  assert str(kept) in caplog.text and array_file(kept).read_bytes() == data
  array_file(folder / "3").write_bytes(b"")
  with Checkpoints(folder) as saves:
    assert saves.latest_step == 2
  assert steps(tmp_path / "damaged") == [3]
  assert (tmp_path / "damaged" / "3-2").is_dir()  # the first one stays


def test_damage_after_opening_is_a_clear_error(tmp_path):
  with Checkpoints(tmp_path / "x") as saves:
    saves.save(1, state(1.0), {})
    file = array_file(tmp_path / "x" / "1")
    file.write_bytes(b"")
    with pytest.raises(UserError, match=f"step 1 can't be read: {file}"):
      saves.restore(1, state())


def test_the_saves_of_another_config_are_refused(tmp_path):
  config = {
    "seed": 0,
    "method": "vera",
    "vera": {"rank": 4},
    "log": {"every": 1},
  }
  with Checkpoints(tmp_path, config) as saves:
    saves.save(1, state(), {})
  with Checkpoints(tmp_path, {**config, "log": {"every": 2}}) as saves:
    assert saves.latest_step == 1
  with pytest.raises(UserError) as caught:
    Checkpoints(tmp_path, {**config, "vera": {"rank": 8}})
  assert "vera.rank: 4 there, 8 now" in str(caught.value)
  assert "seed" not in str(caught.value)


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ValueError("RESOURCE_EXHAUSTED: ... No space left on device"),
  ],
)
def test_a_full_disk_leaves_the_last_save(error, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise error

  with Checkpoints(tmp_path) as saves:
    saves.save(1, state(1.0), {})
    monkeypatch.setattr(saves._manager, "save", full)
    with pytest.raises(UserError, match="(?s)full: step 2 .* that of step 1"):
      saves.save(2, state(2.0), {})
  with Checkpoints(tmp_path) as saves:
    assert saves.restore(1, state())[0]["d"][0] == 1.0


def test_a_disk_that_fills_up_is_one_error(tmp_path, capfd):
  """Orbax's threads print no tracebacks beside it, however much is left."""
  mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a small disk needs root")
  try:
    with Checkpoints(tmp_path / "checkpoints") as saves:
      saves.save(1, state(1.0), {})
      with (tmp_path / "filler").open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
          while True:
            file.write(bytes(4096))
        for left in (0, 8, 24, 48):
          file.truncate(file.seek(0, os.SEEK_END) - 1024 * left)
          with pytest.raises(UserError, match="full: step 2 .* that of step 1"):
            saves.save(2, state(2.0), {})
        file.truncate(0)
      saves.save(2, state(2.0), {})
      assert steps(tmp_path / "checkpoints") == [1, 2]
      assert saves.restore(1, state())[0]["d"][0] == 1.0
  finally:
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)
  assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("remove", [shutil.rmtree, lambda f: f.rename(f"{f}-")])
def test_a_folder_that_is_removed_in_a_save_leaves_nothing(
  remove, tmp_path, monkeypatch
):
  """Orbax would make it anew, and the next start would refuse it."""
  folder = tmp_path / "run/checkpoints"
  with Checkpoints(folder) as saves:
    saves.save(1, state(), {})
    real = saves._manager.save

    def after_removal(*args, **options):
      remove(folder)
      return real(*args, **options)

    monkeypatch.setattr(saves._manager, "save", after_removal)
    with pytest.raises(FileNotFoundError, match="run/checkpoints"):
      saves.save(2, state(), {})
  assert not folder.exists()
