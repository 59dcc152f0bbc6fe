"""Answer texts or images with a trained adapter, or with a merged folder.

  python -m experiments.predict --adapter=RUN/adapter --input=texts.tsv
  python -m experiments.predict --model=MERGED --input=- --format=jsonl
  python -m experiments.predict --adapter=RUN/adapter --input=PHOTOGRAPHS

One line comes out for each line read: label, score and each label's
probability, with tabs between (--format=jsonl: an object). For regression the
score is the value. A bad line is named on standard error and gives an empty
line ({} in JSONL); the rest goes on, and the exit code is 1 at the end.

A .tsv holds one text per line, or two, or as many as the task has columns
(COPA: premise, choice1, choice2, question). Its first line is a header if it
names the text columns (sentence or text; sentence1 and sentence2; or the task's
own), and then a header comes out as well. A .jsonl has those names as keys, as
have the objects of a .json's list; a .csv (with quotes) and a .parquet always
have them as columns.

An adapter trained on your own texts (experiments.classify) knows its columns:
they are looked for in all formats. Where several labels may apply, the label is
those above one half, joined by "|". Of one that tags words, a line has the tags
and the probability of each, with spaces between; words are what stands between
spaces, or a JSON list.

Where the base reads images, the input is an image file, or a folder whose image
files are answered, those in folders inside it too; each line begins with the
file's path.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from vera_jax.data.image_files import SUFFIXES as IMAGE_SUFFIXES
from vera_jax.data.image_files import ImageFile, image_files
from vera_jax.data.tables import (
  FORMATS,
  SUFFIXES,
  format_of,
  parquet_rows,
  read_rows,
)
from vera_jax.errors import UserError
from vera_jax.places import local_copy
from vera_jax.progress import show_stage
from vera_jax.terminal import json_line, printable

PLAIN = ("", ".txt")  # endings of what is read as TSV; "" for - as well
MODEL = cli.define_model("A whole classifier's folder, such as a merged one.")
INPUT = flags.DEFINE_string(
  "input",
  None,
  "A .csv, .tsv, .jsonl, .json or .parquet file, or -; an image file or a"
  " folder of them.",
)
INPUT_FORMAT = flags.DEFINE_enum(
  "input_format", None, FORMATS, "Unset: by the ending; tsv for -."
)
FORMAT = flags.DEFINE_enum("format", "tsv", ["tsv", "jsonl"], "Of the output.")
MAX_LENGTH = flags.DEFINE_integer(
  "max_length", None, "Tokens; longer texts are cut. Unset: as in training."
)
LINES = flags.DEFINE_integer(
  "lines", 256, "Lines to answer at a time; 1 for a dialogue.", 1
)


def main() -> None:
  MODEL.named()  # one of them is
  if not INPUT.value:
    raise UserError("Say what to answer: --input=FILE.")
  source = local_copy(INPUT.value)
  if source.is_dir() or source.suffix.lower() in IMAGE_SUFFIXES:
    predict_images(source)
    return
  file_format = input_format(INPUT.value, INPUT_FORMAT.value)
  # Imported only now: a mistake in the flags is reported without the wait.
  cli.say_importing()
  from vera_jax.data.texts import read_lines, read_texts
  from vera_jax.models.kinds import TAGS
  from vera_jax.serve.predictor import (
    Predictor,
    answer_lines,
    own_columns,
    text_columns,
  )

  if file_format == "parquet" and INPUT.value == "-":
    raise UserError("Parquet is read from a file, not from standard input.")

  bad = total = 0
  with cli.opened(INPUT.value) as file:
    classifier = MODEL.load()
    show_stage("compiling, then answering")
    predictor = Predictor(classifier, max_length=MAX_LENGTH.value)
    columns = text_columns(classifier)
    check = predictor.task and predictor.task.to_texts
    names = ["label", "score", *predictor.labels]
    if classifier.kind == TAGS:
      names = ["tags", "scores"]
    if file_format == "parquet":
      lines = read_texts(parquet_rows(source), columns=columns, check=check)
    elif file_format in ("csv", "json") or own_columns(classifier):
      rows = read_rows(file, format=file_format)
      lines = read_texts(rows, columns=columns, check=check)
    else:
      lines = read_lines(
        file,
        format=file_format,
        columns=columns,
        count=len(columns[0]) if columns else None,
        check=check,
      )
    unit = "row" if file_format in ("json", "parquet") else "line"
    for line, answer in answer_lines(predictor, lines, at_once=LINES.value):
      total += 1
      if line.error:
        bad += 1
        cli.complain(f"{unit} {line.number}: {line.error}")
      if not line.header:
        print(_text(answer, predictor.labels), flush=True)
      elif FORMAT.value == "tsv":
        print(_cells(*names), flush=True)
  if predictor.truncated:
    cut = f"{predictor.truncated} texts were cut at {predictor.max_length}"
    cli.complain(f"{cut} tokens.")
  if bad:
    raise UserError(f"{bad} of {total} lines could not be used.")


def predict_images(source: Path) -> None:
  """Answer an image file, or a folder of them."""
  # after the flags' errors
  cli.say_importing()
  from vera_jax.serve.image_predictor import ImagePredictor, answer_files

  inside = source if source.is_dir() else None
  paths = image_files(source) if inside else [source]
  files = [ImageFile(path, inside) for path in paths]
  if not files:
    raise UserError(f"{source} holds no image files.")
  predictor = ImagePredictor(MODEL.load())
  show_stage("compiling, then answering")
  labels = predictor.labels
  if FORMAT.value == "tsv":
    print(_cells("file", "label", "score", *labels), flush=True)
  bad = 0
  for path, answer in answer_files(predictor, files, at_once=LINES.value):
    if isinstance(answer, str):
      bad += 1
      cli.complain(f"{path}: {answer}")
    line = _text(None if isinstance(answer, str) else answer, labels)
    if FORMAT.value == "jsonl":
      print(json_line({"file": str(path), **json.loads(line)}), flush=True)
    else:
      print(f"{_cells(path)}\t{line}", flush=True)
  if bad:
    raise UserError(f"{bad} of {len(files)} images could not be read.")


def input_format(name: str, asked: str | None) -> str:
  """How a file is read: as the flag says, or else by its name's ending.

  Raises:
    UserError: another format, whose header or quotes would be taken for text.
  """
  ending = Path(name).suffix.lower()
  if asked is None and ending not in (*PLAIN, *SUFFIXES):
    raise UserError(
      f"{name}: {ending} files are not read here, only {', '.join(SUFFIXES)}."
      " Convert it, or say by --input_format that it is one of these all the"
      " same."
    )
  return asked or ("tsv" if ending in PLAIN else format_of(name))


def _text(answer: Any, labels: tuple[str, ...]) -> str:
  """An answer as a line of the output; an empty one for None, a bad line."""
  tagged = hasattr(answer, "tags")
  if FORMAT.value == "jsonl" and tagged:
    return json_line(answer._asdict())
  if FORMAT.value == "jsonl":
    fields = {} if answer is None else {"score": answer.score}
    if answer is not None and labels:
      chances = dict(zip(labels, answer.probabilities, strict=True))
      fields = {"label": answer.label, **fields, "probabilities": chances}
      if answer.labels or not answer.label:  # several may apply
        fields = {"labels": answer.labels, **fields}
        del fields["label"]
    return json_line(fields)
  if answer is None:
    return ""
  if tagged:
    scores = " ".join(f"{score:.6f}" for score in answer.scores)
    return _cells(" ".join(answer.tags), scores)
  numbers = (answer.score, *answer.probabilities)
  return _cells(answer.label, *(f"{number:.6f}" for number in numbers))


def _cells(*texts: Any) -> str:
  """A line of a TSV, in which a text's own tabs and line ends are escapes."""
  return "\t".join(map(printable, texts))


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
