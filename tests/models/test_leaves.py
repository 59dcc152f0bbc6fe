"""A mesh's slices of a checkpoint are those of the whole, to the bit."""

import json
from collections import ChainMap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from benchmarks.load_share import checksums
from benchmarks.loading import together, write_base
from tests.models.decoders import GPT2, LLAMA
from tests.slow import rest_is_slow
from vera_jax.errors import UserError
from vera_jax.models import safetensors_file
from vera_jax.models.family import read_fields
from vera_jax.models.hf_weights import load_params, to_hf
from vera_jax.models.safetensors_file import SafetensorsFile
from vera_jax.operations.quantised import codes_digest
from vera_jax.pretrained.blueprint import blueprint
from vera_jax.pretrained.sharding import (
  leaf_sharding,
  make_mesh,
  param_shardings,
)

WIDE = {
  "llama": {**LLAMA, "hidden_size": 128, "intermediate_size": 256},
  "gpt2": {**GPT2, "n_embd": 128, "n_head": 4},
}


def write_shards(folder: Path, kind: str, dtype=jnp.bfloat16) -> None:
  """A random decoder in two files and an index."""
  fields = WIDE[kind]
  plan = blueprint(fields, head="language_modelling", outputs=0, dtype=dtype)
  rng = np.random.default_rng(0)
  params = {
    path: rng.standard_normal(leaf.shape, np.float32).astype(dtype)
    for path, leaf in plan.shapes.items()
  }
  tensors = list(to_hf(unflatten_dict(params), plan.config).items())
  index = {}
  for part in (0, 1):
    file = f"model-0000{part + 1}-of-00002.safetensors"
    save_file(dict(tensors[part::2]), folder / file)
    index |= dict.fromkeys(dict(tensors[part::2]), file)
  text = json.dumps({"weight_map": index})
  (folder / "model.safetensors.index.json").write_text(text)
  (folder / "config.json").write_text(json.dumps(fields))


@pytest.fixture
def bytes_read(monkeypatch) -> list[int]:
  """The sizes of all reads; they are small, and no gap is read over."""
  monkeypatch.setattr(safetensors_file, "BLOCK", 3000)
  monkeypatch.setattr(safetensors_file, "PAGE", 1)
  sizes, read_into = [], SafetensorsFile.read_into

  def counted(self, out, start):
    sizes.append(out.nbytes)
    read_into(self, out, start)

  monkeypatch.setattr(SafetensorsFile, "read_into", counted)
  return sizes


@pytest.mark.parametrize(
  "kind, quantise, sizes, scan",
  rest_is_slow(
    [
      ("llama", "int8", (2, 2, 2), True),
      ("llama", "none", (1, 4, 2), False),
      ("llama", "nf4", (2, 2, 2), True),
      ("gpt2", "none", (1, 2, 4), True),
      ("gpt2", "int8", (2, 2, 2), False),
      ("gpt2", "bfloat16", (8, 1, 1), True),
    ]
  ),
)
def test_slices_are_those_of_the_whole(
  kind, quantise, sizes, scan, tmp_path, bytes_read
):
  write_shards(tmp_path, kind)
  made = blueprint(WIDE[kind], head="language_modelling", outputs=0, scan=scan)
  mesh, rules = make_mesh(*sizes), made.family.rules
  load = partial(
    load_params,
    tmp_path,
    unflatten_dict(made.shapes),
    quantise=quantise,
    kernels=made.kernels,
  )
  whole = load().params
  times = 1 + (
    quantise == "int8" and sizes[1] > 1
  )  # its scales need all inputs
  assert max(bytes_read) <= 3000
  once = sum(bytes_read)
  bytes_read.clear()
  sliced = load(place=partial(leaf_sharding, mesh=mesh, rules=rules)).params
  assert once <= sum(bytes_read) <= times * once
  assert jax.tree.structure(sliced) == jax.tree.structure(whole)
  for path, leaf in flatten_dict(whole).items():
    leaves = map(jax.tree.leaves, (leaf, flatten_dict(sliced)[path]))
    for want, got in zip(*leaves, strict=True):
      assert got.dtype == want.dtype
      np.testing.assert_array_equal(np.asarray(got), want, err_msg=str(path))
  wanted = param_shardings(whole, mesh, rules)
  assert jax.tree.map(lambda x: x.sharding, sliced) == wanted
  assert codes_digest(sliced) == codes_digest(whole)


@pytest.mark.parametrize("page", [1, 4096])
@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 2), (6,), (0, 3)])
def test_any_slice_of_a_tensor(shape, page, tmp_path, monkeypatch):
  monkeypatch.setattr(safetensors_file, "PAGE", page)
  monkeypatch.setattr(safetensors_file, "BLOCK", 24)
  values = np.arange(np.prod(shape), dtype=np.float16).reshape(shape)
  save_file({"x": values, "y": values + 1}, tmp_path / "a.safetensors")
  part = tuple(slice(size // 4, size - size // 3) for size in shape)
  with SafetensorsFile(tmp_path / "a.safetensors") as file:
    assert set(file.keys()) == {"x", "y"}
    np.testing.assert_array_equal(file.get_tensor("y"), values + 1)
    tensor = file.get_slice("x")
    np.testing.assert_array_equal(tensor[part], values[part])
    for axis in range(min(2, len(shape))):
      blocks = list(tensor.blocks(part, axis=axis))
      if blocks:
        both = np.concatenate([x for _, x in blocks], axis=axis)
        np.testing.assert_array_equal(both, values[part])


def with_header(text: str, data: bytes = b"") -> bytes:
  return len(text).to_bytes(8, "little") + text.encode() + data


ENTRY = '{"x": {"dtype": "F32", "shape": %s, "data_offsets": %s}}'


@pytest.mark.parametrize(
  "content",
  [
    with_header("[]"),
    with_header('{"x": 1}'),
    with_header('{"x": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}'),
    with_header(ENTRY % ("[1]", "[0, 8]"), bytes(8)),
    with_header(ENTRY % ("[1]", "[-4, 0]")),
    with_header(ENTRY % ("[true]", "[0, 4]"), bytes(4)),
    with_header(ENTRY % ("[1]", "[0]"), bytes(4)),
    with_header(ENTRY % ("[1]", "[0, 4]"), bytes(5)),
    with_header(ENTRY % ("[1e999]", "[0, 4]"), bytes(4)),
    (2**62).to_bytes(8, "little"),
  ],
)
def test_a_damaged_header_is_refused(content, tmp_path):
  (tmp_path / "a.safetensors").write_bytes(content)
  with pytest.raises(UserError, match="no whole safetensors file"):
    SafetensorsFile(tmp_path / "a.safetensors")


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
  file = tmp_path / "a.safetensors"
  save_file({"x": np.ones(9, np.float32)}, file)
  with SafetensorsFile(file) as opened:
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="became shorter"):
      opened.get_tensor("x")


@pytest.mark.slow
def test_processes_load_their_shares_within_a_limit(tmp_path):
  """No process may address more than 1.25 times its share and 100 MB."""
  wide = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8192}
  numbers = write_base(tmp_path, {**LLAMA, **wide}) / 2
  kinds, mesh = ("none", "int8"), make_mesh(2, 2, 2)
  answers = together(
    tmp_path, (1, 2, 2), quantise=kinds, dtype="float32"
  )  # which ends with an error beyond the limit
  for kind, *loads in zip(kinds, *(x["loads"] for x in answers), strict=True):
    for load in loads:
      assert load["peak"] < load["room"] < 4 * numbers
    plan = blueprint(
      read_fields(tmp_path),
      head="language_modelling",
      outputs=0,
      quantise=kind,
    )
    params = load_params(
      tmp_path,
      unflatten_dict(plan.shapes),
      quantise=kind,
      kernels=plan.kernels,
      place=partial(leaf_sharding, mesh=mesh, rules=plan.family.rules),
    ).params
    slices = [load["checksums"] for load in loads]
    assert dict(ChainMap(*slices)) == checksums(params)
    assert max(map(len, slices)) < len(checksums(params))
    assert {load["codes"] for load in loads} == {codes_digest(params)}
