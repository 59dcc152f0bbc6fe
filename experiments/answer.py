"""Ask a decoder questions: MT-Bench's, Vicuna's, or some with choices.

  python -m experiments.answer --adapter=RUN/adapter --questions=question.jsonl
    --out=answers.jsonl    (in one line)
  python -m experiments.answer --model=FOLDER --choices=copa.jsonl

--questions takes a file in FastChat's form, and writes the answers to all turns
in the form that FastChat's judges read, a line as soon as a question has all of
its answers. A file that has answers is not written to again. Nothing is scored.
Words are drawn at FastChat's temperature for a question's category; --greedy
draws none. A turn for which the model has too little room is answered more
shortly, or with nothing; how many there were is said at the end.

--choices takes multiple choice in COPA's or ARC's form, from a .jsonl file or
the hub (aps/super_glue:copa, allenai/ai2_arc:ARC-Easy:test), several joined by
commas. Each choice is scored by its log-likelihood behind the question, as a
whole and per character.

Questions for a judge are put into the model's chat template. --template=alpaca
or plain is for a model that has none; an adapter is asked as it was trained.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import flags
from rich.table import Column, Table

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.places import local_place
from vera_jax.terminal import Console

MODEL = cli.define_model("A whole decoder: a folder, a .gguf file or a hub id.")
QUESTIONS = flags.DEFINE_string(
  "questions", None, "Questions in FastChat's form, a .jsonl file."
)
OUT = flags.DEFINE_string("out", None, "The new file of answers.")
MODEL_ID = flags.DEFINE_string(
  "model_id",
  None,
  "The model's name in the answers. Unset: its folder's, or run's.",
)
CHOICES = flags.DEFINE_list("choices", [], "Files or hub ids, by commas.")
TEMPLATE = flags.DEFINE_enum(
  "template", None, ["chat", "alpaca", "plain"], "What questions are put into."
)
GREEDY = flags.DEFINE_bool("greedy", False, "Take the likeliest words.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 1024, "The most tokens of an answer.", 1
)
SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.", 0, 2**32 - 1)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16, "Questions that are answered together.", 1
)


def main() -> None:
  MODEL.named()  # one of them is
  if bool(QUESTIONS.value) == bool(CHOICES.value):
    raise UserError(
      "Give either --questions=FILE --out=FILE or --choices=FILE."
    )
  if bool(QUESTIONS.value) != bool(OUT.value):
    raise UserError("--questions and --out belong together: name both files.")
  out = local_place(OUT.value or "", "--out")
  if out.is_file() and out.stat().st_size:
    raise UserError(
      f"{out} has answers, which are not replaced: name another file for --out,"
      " or remove this one. Of an interrupted command it has the first"
      " questions' answers; put the other questions into a file of their own."
    )
  # Imported only now: a mistake in the flags is reported without the wait.
  cli.say_importing()
  from vera_jax.data.templates import CHAT
  from vera_jax.generate import choices
  from vera_jax.serve import questions

  # read first, for a model takes longer
  asked = []
  if QUESTIONS.value:
    asked = questions.read_judge_questions(QUESTIONS.value)
  posed = choices.read_choices(CHOICES.value)
  decoder = MODEL.load()
  if posed:
    _choose(decoder, posed)
    return
  template = TEMPLATE.value or str(decoder.about.get("template") or CHAT)
  _write(decoder, asked, template, out)


def _choose(decoder: Any, posed: dict[str, Any]) -> None:
  from vera_jax.generate.choices import answer_questions
  from vera_jax.progress import ProgressBar

  table = Table(
    "questions",
    *(
      Column(name, justify="right")
      for name in ("number", "accuracy", "accuracy, normalised")
    ),
  )
  for name, questions in posed.items():
    total = sum(len(question.choices) for question in questions)
    with ProgressBar(steps=total, doing=name) as bar:
      accuracy = answer_questions(decoder, questions, progress=bar.advance)
    numbers = f"{accuracy.plain:.4f}", f"{accuracy.normalised:.4f}"
    table.add_row(name, str(len(questions)), *numbers)
  Console().print(table)


def _write(decoder: Any, asked: list[Any], template: str, out: Path) -> None:
  from vera_jax.generate.generator import Generator
  from vera_jax.progress import ProgressBar
  from vera_jax.serve.questions import answer_turns, as_line

  with _writable(out):  # tried before the answers are made, which takes long
    out.parent.mkdir(parents=True, exist_ok=True)
    out.open("a").close()
  folder = Path(MODEL.named()).absolute()
  if folder.name == "adapter":  # of a run, which has the name
    folder = folder.parent
  generator = Generator(decoder, rows=BATCH_SIZE.value, template=template)
  answers = answer_turns(
    generator,
    asked,
    greedy=GREEDY.value,
    max_new_tokens=MAX_NEW_TOKENS.value,
    seed=SEED.value,
  )
  turns = sum(len(question.turns) for question in asked)
  done = shortened = 0
  with ProgressBar(steps=turns, doing="answers") as bar:
    for question, answered in zip(asked, answers, strict=True):
      line = as_line(
        question, answered.turns, model_id=MODEL_ID.value or folder.name
      )
      with _writable(out), out.open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")
      done += len(answered.turns)
      shortened += answered.shortened
      bar.advance(done)
  print(f"{len(asked)} questions, {turns} turns: {out}")
  if shortened:
    print(
      f"{shortened} turns had room for fewer new tokens than"
      f" --max_new_tokens={MAX_NEW_TOKENS.value}, or for none: their answers"
      " may be cut or empty."
    )


@contextmanager
def _writable(out: Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(f"{out} can't be written: {error.strerror}.") from error


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
