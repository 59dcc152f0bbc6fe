"""Files from elsewhere: what is opened, and what is refused; JSON objects: a
clear error for each kind of damage; whole or not at all."""

import json
import os
import re
import socket
from pathlib import Path

import pytest

import vera_jax
from vera_jax.errors import UserError
from vera_jax.files import (
  JSON,
  JsonLine,
  json_lines,
  open_file,
  parse_json,
  read_bytes,
  read_json,
  read_lines,
  write_json,
)


@pytest.fixture
def make(tmp_path, monkeypatch):
  """Puts something that is no regular file at a path."""
  monkeypatch.chdir(tmp_path)  # the name of a socket must be short

  def socket_at(path):
    with socket.socket(socket.AF_UNIX) as made:
      made.bind(path.name)

  return {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "socket": socket_at,
    "device": lambda path: path.symlink_to("/dev/zero"),
  }


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_only_regular_files_are_opened(kind, make, tmp_path, monkeypatch):
  path = tmp_path / "x"
  make[kind](path)
  monkeypatch.setattr("os.open", None)  # no device is opened to look at it
  with pytest.raises(UserError, match=f"x can't be read: it is a {kind}, not"):
    open_file(path, inside=None, limit=JSON)


def test_what_replaces_a_file_before_it_is_opened_is_refused(
  tmp_path, monkeypatch
):
  path, regular = tmp_path / "x", os.stat(__file__)
  os.mkfifo(path)
  monkeypatch.setattr("os.stat", lambda *_, **__: regular)
  with pytest.raises(UserError, match="it is a pipe"):
    open_file(path, inside=None, limit=JSON)


def test_a_file_lies_below_its_folder(tmp_path):
  folder, elsewhere = tmp_path / "model", tmp_path / "private"
  (folder / "inner").mkdir(parents=True)
  (folder / "inner" / "file").write_bytes(b"here")
  elsewhere.write_bytes(b"there")
  (folder / "link").symlink_to("inner/file")
  (folder / "outside").symlink_to(elsewhere)
  (tmp_path / "alias").symlink_to(folder)
  for way in ("link", "inner/file", "inner/../link"):
    for start in (folder, tmp_path / "alias"):
      assert read_bytes(start / way, inside=start, limit=9) == b"here"
  for way in ("outside", "../private", str(elsewhere)):
    with pytest.raises(UserError, match=f"leads to {elsewhere}, outside of"):
      read_bytes(folder / way, inside=folder, limit=9)
  # what a person names may be a link to anywhere
  assert read_bytes(folder / "outside", inside=None, limit=9) == b"there"


def test_a_snapshot_of_the_hubs_cache_has_its_files_in_blobs(tmp_path):
  repository = tmp_path / "models--owner--name"
  snapshot = repository / "snapshots" / "0123abcd"
  (repository / "blobs").mkdir(parents=True)
  (repository / "blobs" / "9f").write_text("{}")
  (repository / "refs").mkdir()
  (repository / "refs" / "main").write_text("{}")
  (snapshot / "part").mkdir(parents=True)
  (snapshot / "config.json").symlink_to("../../blobs/9f")
  (snapshot / "part" / "config.json").symlink_to("../../../blobs/9f")
  (snapshot / "other.json").symlink_to("../../refs/main")
  assert read_json(snapshot / "config.json") == {}
  assert read_json(snapshot / "part" / "config.json") == {}
  with pytest.raises(UserError, match="outside of"):
    read_json(snapshot / "other.json")


@pytest.mark.parametrize(
  "way, words",
  [
    ("none", "There is no .*none"),
    ("loop", "loop can't be read: Too many levels"),
    ("a\0b", "'.*a.x00b' is no name of a file"),
    ("a" * 300, "can't be read: File name too long"),
    ("ten", "ten is not used: it has 10 bytes, and at most 9 are read"),
  ],
)
def test_a_file_that_cannot_be_opened_is_named(way, words, tmp_path):
  (tmp_path / "loop").symlink_to("loop")
  (tmp_path / "ten").write_bytes(b"0123456789")
  with pytest.raises(UserError, match=words):
    open_file(tmp_path / way, inside=tmp_path, limit=9)


def test_a_person_is_told_the_name_beside(tmp_path):
  (tmp_path / "reviews.csv").write_bytes(b"")
  for inside, words in (
    (None, r"reviw.csv\. Is it .*reviews.csv"),
    (tmp_path, r"csv\.$"),
  ):
    with pytest.raises(UserError, match=words):
      open_file(tmp_path / "reviw.csv", inside=inside, limit=9)


def test_a_file_without_a_size_is_read_no_further_than_allowed():
  # the kernel's files are regular ones of 0 bytes
  with pytest.raises(UserError, match="more than 9 bytes"):
    read_bytes("/proc/self/status", inside=None, limit=9)


def test_a_large_limit_takes_no_memory(tmp_path):
  (tmp_path / "a.json").write_bytes(b"[1]")
  limit = 2**60  # more than any machine has
  assert read_bytes(tmp_path / "a.json", inside=None, limit=limit) == b"[1]"


OPENS = re.compile(
  r"json\.loads?\(|\.read_(text|bytes)\(|Image\.open\(|\.open\((\"r|\))|safe_open\("
  r"|ParquetFile\(|np\.(load|memmap)\("
)
# What opens files, or reads JSON, beside the door: a file that was checked, or
# JSON that this process, or its own child, has just written.
BESIDE = {
  "__init__.py": "Path(__file__).read_text(",
  "adapters/saved.py": "json.loads(json.dumps(",
  "data/answers.py": "json.loads(examples.first",
  "data/chat.py": "json.loads(answer)",
  "data/chat_process.py": "json.loads(line)",
  "data/images.py": "formats=FORMATS|np.memmap(stored|np.memmap(new",
  "data/tables.py": "ParquetFile(",
  "data/tokens.py": "json.loads(tokenizer.|np.load(file, allow_pickle=False",
  "files.py": "json.loads(text, object_pairs_hook",
  "locks.py": 'Path(f"/proc/',
  "models/gguf_file.py": "np.memmap(file",
  "models/gguf_tokenizer.py": ".to_str())",
  "peft_io/tensors.py": "safe_open(file",
  "report/verdict.py": "json.loads(json.dumps(",
  "results.py": "json.loads(json.dumps(",
  "sweep/launchers/process.py": "_log.read_text(|_log.write_bytes(log.",
  "sweep/runner.py": "json.loads(json.dumps(",
  "sweep/worker.py": "json.loads(sys.stdin",
  "train/ensemble.py": "json.loads(slot.name)",
  "train/manifest.py": "json.loads(json.dumps(",
  "train/peers.py": "json.loads(value)|before = path.read_text()",
  "train/profile.py": "copy.write_bytes(file.read_bytes())",
  "train/start.py": 'Path("/proc/',
  "train/workdir.py": "json.loads(json.dumps(",
}


def test_there_is_one_door():
  """A file from elsewhere that is opened in another way is found here."""
  package = Path(vera_jax.__file__).parent
  for path in sorted(package.rglob("*.py")):
    known = BESIDE.get(str(path.relative_to(package)), "").split("|")
    for number, line in enumerate(path.read_text().splitlines(), 1):
      if OPENS.search(line):
        assert any(word and word in line for word in known), (path, number)


def test_lines_have_a_limit(tmp_path, monkeypatch):
  monkeypatch.setattr("vera_jax.files.LINE", 4)
  file = tmp_path / "x"
  file.write_bytes(b"abc\n\nabcd\n")
  with file.open("rb") as opened:
    lines = read_lines(opened, name=file)
    assert [next(lines), next(lines)] == [b"abc\n", b"\n"]
    with pytest.raises(UserError, match=r"x:3: the line has more than 4 bytes"):
      next(lines)


@pytest.mark.parametrize(
  "text, words",
  [
    ("[" * 20_000, "nested too deeply, more than 100"),
    ('{"a": ' * 102 + "1" + "}" * 102, "nested too deeply"),
    ('[{"b": 0, "a": 1, "a": 2}]', "the key 'a' is there twice"),
    ("[-1e999]", "not JSON compliant"),
    ("[NaN]", "not JSON compliant"),
    ("1" * 5000, "Exceeds the limit"),
    (r'{"a": "\ud800"}', "surrogates not allowed"),
    (b'"\xff"', "'utf-8' codec"),
  ],
)
def test_what_no_program_writes_is_no_json(text, words):
  with pytest.raises(ValueError, match=words):
    parse_json(text)


def test_json_may_be_nested_a_little_and_our_own_may_have_nan():
  deep = parse_json("[" * 101 + "]" * 101)
  assert len(json.dumps(deep)) == 202
  assert parse_json(r'["\ud83d\ude00", "\u00e9", 1e3]') == ["😀", "é", 1000.0]
  assert parse_json('{"loss": NaN, "a": -Infinity}', nan=True)["a"] < 0


def test_lines_of_json_are_objects_or_say_what_is_wrong():
  lines = [b'\xef\xbb\xbf{"a": 1}\n', b"\n", b"\xff\n", b"[1]\n", b'{"b": 2}']
  assert list(json_lines(lines)) == [
    JsonLine(1, {"a": 1}),
    JsonLine(2, error="it is empty"),
    JsonLine(3, error="it is not UTF-8"),
    JsonLine(4, error="it is no JSON object"),
    JsonLine(5, {"b": 2}),
  ]
  (line,) = json_lines([b'{"a": NaN}'])
  assert "not JSON compliant" in line.error
  (line,) = json_lines([b"[" * 20_000])
  assert "nested too deeply, more than 100 levels" in line.error


@pytest.mark.parametrize(
  "data, words",
  [
    (None, "There is no .*x.json"),
    (b'{"a": 1', "x.json can't be read as JSON: Expecting"),
    (b"\xff{}", "x.json can't be read as JSON: 'utf-8'"),
    (b"[1]", "x.json can't be read: it is not a JSON object"),
  ],
)
def test_damage_is_named_with_the_hint(data, words, tmp_path):
  file = tmp_path / "x.json"
  if data is not None:
    file.write_bytes(data)
  with pytest.raises(UserError, match=rf"^.*{words}.*\. Copy it again\.$"):
    read_json(file, hint="Copy it again.")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
  tmp_path, monkeypatch
):
  path = tmp_path / "x.json"
  write_json(path, {"a": 1})
  with pytest.raises(TypeError):
    write_json(path, {"a": object()})

  def full(handle):
    raise OSError("no space left")

  monkeypatch.setattr("os.fsync", full)
  with pytest.raises(OSError, match="no space left"):
    write_json(path, {"a": 2})
  assert json.loads(path.read_text()) == {"a": 1}
  assert list(tmp_path.iterdir()) == [path]
