"""Answer lines of text with a trained adapter, or with a merged folder.

  python -m experiments.predict --adapter=RUN/adapter --input=texts.tsv
  python -m experiments.predict --model=MERGED --input=- --format=jsonl

One line out for each line in: label, score and each label's probability, with
tabs between (--format=jsonl: an object). For regression the score is the value.
A bad line is named on standard error and gives an empty line ({} in JSONL); the
rest goes on, and the exit code is 1 at the end.

A .tsv holds one text a line, or two. Its first line is a header if it names the
text columns (sentence or text; sentence1 and sentence2; or the task's own), and
then a header comes out as well. A .jsonl has those names as keys.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from absl import flags

from experiments import cli
from vera_jax.errors import UserError

ADAPTER = flags.DEFINE_string("adapter", None, "An adapter's folder.")
MODEL = flags.DEFINE_string(
  "model", None, "A whole classifier's folder, such as a merged one."
)
BASE = flags.DEFINE_string(
  "base", None, "The adapter's base. Unset: what adapter.json names."
)
INPUT = flags.DEFINE_string("input", None, "A .tsv or .jsonl file, or -.")
INPUT_FORMAT = flags.DEFINE_enum(
  "input_format", None, ["tsv", "jsonl"], "Unset: by the name; tsv for -."
)
FORMAT = flags.DEFINE_enum("format", "tsv", ["tsv", "jsonl"], "Of the output.")
MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "Tokens; longer texts are cut. Unset: as in training."
)
LINES = flags.DEFINE_integer(
  "lines", 256, "So many lines are answered at a time; 1 for a dialogue.", 1
)


def main() -> None:
  if not INPUT.value or bool(ADAPTER.value) == bool(MODEL.value):
    raise UserError("Give --input=FILE and either --adapter=DIR or --model=DIR")
  from vera_jax.data.texts import read_lines  # after the flags' errors

  with _opened(INPUT.value) as (file, progress):
    predictor = _predictor()
    task = predictor.classifier.task
    lines = read_lines(
      _counted(file, progress),
      format=_input_format(INPUT.value),
      columns=(task.columns, task.file_columns) if task else (),
      count=len(task.columns) if task else None,
    )
    bad, total = _answer(predictor, lines)
  if predictor.truncated:
    cut = f"{predictor.truncated} texts were cut at {predictor.max_length}"
    print(f"{cut} tokens.", file=sys.stderr)
  if bad:
    raise UserError(f"{bad} of {total} lines could not be used.")


def _predictor() -> Any:
  from vera_jax.adapters.files import load_adapter
  from vera_jax.models.pretrained import load_classifier, restore_adapter
  from vera_jax.serve.predictor import Predictor

  if MODEL.value:
    classifier = load_classifier(MODEL.value)
  else:
    saved = load_adapter(ADAPTER.value or "")
    classifier = restore_adapter(saved, BASE.value)
  return Predictor(classifier, max_length=MAX_LENGTH.value)


def _input_format(name: str) -> str:
  if INPUT_FORMAT.value:
    return INPUT_FORMAT.value
  return "jsonl" if name.endswith(".jsonl") else "tsv"


@contextmanager
def _opened(name: str) -> Iterator[tuple[IO[bytes], Callable[[int], None]]]:
  """The input, and what is told of the bytes read."""
  if name == "-":
    yield sys.stdin.buffer, lambda size: None
    return
  from rich.console import Console
  from rich.progress import Progress

  shown = sys.stderr.isatty() and not sys.stdout.isatty()
  bar = Progress(
    console=Console(stderr=True), disable=not shown, redirect_stdout=False
  )
  try:
    file = Path(name).expanduser().open("rb")
  except OSError as error:
    raise UserError(f"{name} can't be read: {error.strerror}.") from error
  with file, bar:
    size = os.fstat(file.fileno()).st_size
    task = bar.add_task(Path(name).name, total=size)
    yield file, lambda size: bar.advance(task, size)


def _counted(
  file: IO[bytes], progress: Callable[[int], None]
) -> Iterator[bytes]:
  for line in file:
    yield line
    progress(len(line))


def _answer(predictor: Any, lines: Iterable[Any]) -> tuple[int, int]:
  """Write an answer to each line; (bad lines, all lines)."""
  bad = total = 0
  labels = predictor.classifier.labels
  lines = iter(lines)
  while some := list(itertools.islice(lines, LINES.value)):
    good = [line.texts for line in some if line.texts]
    columns = [list(column) for column in zip(*good, strict=True)]
    answers = iter(predictor.answers(*columns) if good else [])
    for line in some:
      total += 1
      if line.error:
        bad += 1
        print(f"line {line.number}: {line.error}", file=sys.stderr)
      answer = next(answers) if line.texts else None
      if not line.header:
        print(_text(answer, labels))
      elif FORMAT.value == "tsv":
        print("\t".join(["label", "score", *labels]))
    sys.stdout.flush()
  return bad, total


def _text(answer: Any, labels: tuple[str, ...]) -> str:
  """An answer as a line of the output; of None, a bad line, an empty one."""
  if FORMAT.value == "jsonl":
    fields = {} if answer is None else {"score": answer.score}
    if answer is not None and labels:
      chances = dict(zip(labels, answer.probabilities, strict=True))
      fields = {"label": answer.label, **fields, "probabilities": chances}
    return json.dumps(fields, ensure_ascii=False)
  if answer is None:
    return ""
  numbers = (answer.score, *answer.probabilities)
  return "\t".join([answer.label, *(f"{number:.6f}" for number in numbers)])


def _until_closed() -> None:
  """`main`, up to where a reader such as `head` has seen enough."""
  try:
    main()
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
  cli.run(_until_closed, usage=__doc__)
