"""torch's older files: their tensors, and nothing else, whatever they name."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import convert
from experiments.convert_efficientnet import MAGIC, SHA256, VERSION, read_state
from vera_jax.errors import UserError

HEADER = b"".join(pickle.dumps(x, 2) for x in (MAGIC, VERSION, {"little": 1}))


def tensor(key, size, shape, strides, offset=0):
  """A tensor's opcodes, as torch's pickler writes them."""

  def row(numbers):
    return b"(" + b"".join(b"I%d\n" % n for n in numbers) + b"t"

  storage = b"(Vstorage\nctorch\nFloatStorage\nV%s\nVcpu\nI%d\nNtQ"
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage % (key, size)
    + b"I%d\n" % offset
    + row(shape)
    + row(strides)
    + b"I00\nccollections\nOrderedDict\n)RtR"
  )


def file_of(state, storages):
  """A whole file; `state` are opcodes that leave an object on the stack."""
  numbers = b"".join(
    np.int64(len(x)).tobytes() + np.asarray(x, "<f4").tobytes()
    for x in storages.values()
  )
  keys = pickle.dumps([key.decode() for key in storages], 2)
  return HEADER + state + b"." + keys + numbers


ONE = {b"7": np.arange(6)}
STORAGES = {**ONE, b"9": np.arange(4)}
GOOD = (
  b"ccollections\nOrderedDict\n)RVfirst\n"
  + tensor(b"7", 6, (2, 3), (1, 2))  # turned, as cuDNN has kernels
  + b"sVsecond\n"
  + tensor(b"9", 4, (2,), (1,), offset=2)
  + b"s"
)


def test_tensors_are_read_turned_ones_and_parts_of_a_storage(tmp_path):
  (tmp_path / "a.pth").write_bytes(file_of(GOOD, STORAGES))
  found = read_state(tmp_path / "a.pth")
  assert list(found) == ["first", "second"]
  np.testing.assert_array_equal(found["first"], [[0, 2, 4], [1, 3, 5]])
  np.testing.assert_array_equal(found["second"], [2, 3])


CALL = b"cos\nsystem\n(Vtouch %s\ntR"


@pytest.mark.parametrize(
  "place", ["before", "as the state", "inside", "behind"]
)
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(place, tmp_path):
  hit = tmp_path / "hit"
  call = CALL % str(hit).encode()
  content = {
    "before": call + b"." + file_of(GOOD, STORAGES),
    "as the state": file_of(call, STORAGES),
    "inside": file_of(b"}Vfirst\n" + call + b"s", STORAGES),
    "behind": HEADER + GOOD + b"." + call + b".",
  }[place]
  pickle.loads(call + b".")  # noqa: S301 - it does harm where it may
  assert hit.exists()
  hit.unlink()
  (tmp_path / "a.pth").write_bytes(content)
  with pytest.raises(UserError, match=r"it names (os|posix)\.system"):
    read_state(tmp_path / "a.pth")
  assert not hit.exists()


@pytest.mark.parametrize(
  "content, words",
  [
    (file_of(b"}Vx\nI3\ns", {}), "x is no tensor"),
    (file_of(b"I3\n", {}), "it holds a int"),
    (file_of(b"}Vx\ncbuiltins\neval\ns", {}), "it names builtins.eval"),
    (
      file_of(b"}Vx\n" + tensor(b"7", 6, (2, 4), (4, 1)) + b"s", ONE),
      "ends at 7 of 6",
    ),
    (
      file_of(b"}Vx\n" + tensor(b"7", 6, (2,), (-1,), 1) + b"s", ONE),
      "a negative offset, size or stride",
    ),
    (
      file_of(b"}Vx\n" + tensor(b"7", 6, (2,), (1,)) + b"s", STORAGES),
      "no tensor names the storage 9",
    ),
    (file_of(GOOD, ONE), "it lacks the storages 9"),
    (file_of(GOOD, STORAGES)[:-9], "no whole file"),
    (b"\x80\x02}.", "no whole file"),
  ],
  ids=range(9),
)
def test_what_is_no_whole_state_dict(content, words, tmp_path):
  (tmp_path / "a.pth").write_bytes(content)
  with pytest.raises(UserError, match=words):
    read_state(tmp_path / "a.pth")


def test_another_file_than_the_known_one_is_not_even_opened(
  tmp_path, monkeypatch
):
  (tmp_path / "a.pth").write_bytes(file_of(GOOD, STORAGES))
  installed = SimpleNamespace(locate_file=tmp_path.joinpath)
  monkeypatch.setattr(convert, "distribution", lambda name: installed)
  with pytest.raises(UserError, match="not the file that is known here"):
    convert.package_file("some-package", "a.pth", sha256=SHA256)


@pytest.mark.parity
def test_torchs_own_file(tmp_path):
  torch = pytest.importorskip("torch")
  state = {"a": torch.randn(3, 4).T, "b": torch.arange(3).half()}
  file = tmp_path / "a.pth"
  torch.save(state, file, _use_new_zipfile_serialization=False)
  for name, value in read_state(file).items():
    np.testing.assert_array_equal(value, state[name].numpy())
