"""Let a decoder write on, with a trained adapter or from a whole folder.

  python -m experiments.generate --adapter=RUN/adapter --prompt="Once upon a"
  python -m experiments.generate --model=FOLDER --input=prompts.jsonl
  … --temperature=0.7 --top_p=0.9 --seed=1
  … --beams=10 --length_penalty=0.8 --no_repeat_ngram=4 --rules=lora
  … --template=chat --prompt="What is the capital of France?"

The answer to one prompt appears as it is written (with --beams at its end). A
file of prompts has an object with "prompt" in each line; its lines come out
with "answer" added, in their order. A bad line is named on standard error and
gives {}; the rest goes on, and the exit code is 1 at the end.

Without further flags the likeliest word is taken each time. --temperature draws
words, each prompt by a key of its own from --seed; --beams searches. --model
takes a folder in Hugging Face's layout, such as a merged one, a .gguf file, a
hub id or package:NAME/PATH. An adapter is merged into the weights first;
--keep_adapter decodes with it beside them.

With --template=chat (or --chat) a prompt is a user's message to an instruct
model, and is put into the model's own chat template; with --template=alpaca it
is an instruction in Alpaca's prompt; with --template=plain nothing is put
around it. Without the flag it is as an adapter was trained on instructions, and
plain for all other adapters and models.
"""

import itertools
from typing import Any

from absl import flags

from experiments import cli
from experiments.decoding import define_decoding
from vera_jax.errors import UserError
from vera_jax.terminal import LINES, json_line, printable

DECODING = define_decoding(
  template=(
    "What prompts are put into. Unset: as the adapter was trained, or plain."
  ),
  max_new_tokens=64,
)
PROMPT = flags.DEFINE_string("prompt", None, "One prompt.")
INPUT = flags.DEFINE_string(
  "input", None, "Prompts: a .jsonl file, or - for standard input."
)
CHAT = flags.DEFINE_bool("chat", False, "The same as --template=chat.")
BEAMS = flags.DEFINE_integer(
  "beams", None, "Beam search with as many beams.", 1
)
LENGTH_PENALTY = flags.DEFINE_float(
  "length_penalty", 1.0, "Of beam search: above 0 for longer answers."
)
EARLY_STOPPING = flags.DEFINE_enum(
  "early_stopping",
  "false",
  ["false", "true", "never"],
  "When beam search ends, as transformers has it.",
)
RULES = flags.DEFINE_enum(
  "rules",
  "hf",
  ["hf", "lora"],
  "Of beam search: transformers' or those of microsoft/LoRA's experiments.",
)
BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 16, "Prompts of a file that are answered together.", 1
)
OF_SAMPLING = ("temperature", "top_k", "top_p", "seed")
OF_BEAMS = ("length_penalty", "early_stopping", "rules")
CHUNK = 8  # batches of a file that are sorted by length together


def main() -> None:
  DECODING.model.named()  # one of them is
  if (PROMPT.value is None) == (INPUT.value is None):
    raise UserError("Give either --prompt=TEXT or --input=FILE.")
  idle = OF_SAMPLING if BEAMS.value else OF_BEAMS
  useless = [f"--{name}" for name in idle if flags.FLAGS[name].present]
  if useless:
    why = "without --beams" if idle is OF_BEAMS else "with --beams"
    raise UserError(f"{', '.join(useless)} has no effect {why}: leave it out.")
  template = DECODING.template.value
  if CHAT.value and template not in (None, "chat"):
    raise UserError(
      f"--chat is --template=chat, not {template}: give one of the two."
    )
  # Imported only now: a mistake in the flags is reported without the wait.
  cli.say_importing()
  from vera_jax.generate.beam import Beam
  from vera_jax.generate.generator import Generator

  how: Any
  if BEAMS.value:
    early = {"false": False, "true": True}
    how = Beam(
      BEAMS.value,
      LENGTH_PENALTY.value,
      DECODING.no_repeat_ngram.value,
      early.get(EARLY_STOPPING.value, EARLY_STOPPING.value),
      RULES.value,
    )
    how.check()
  else:
    how = DECODING.sampling()

  def make_generator() -> Generator:
    return Generator(
      DECODING.load(),
      keep_adapter=DECODING.keep_adapter.value,
      rows=BATCH_SIZE.value,
      template="chat" if CHAT.value else template,
    )

  settings: dict[str, Any] = {
    "how": how,
    "max_new_tokens": DECODING.max_new_tokens.value,
    "seed": DECODING.seed.value,
  }
  if PROMPT.value is not None:
    for piece in make_generator().stream(PROMPT.value, **settings):
      print(printable(piece, keep=LINES), end="", flush=True)
    print()
    return
  with cli.opened(INPUT.value or "-") as file:
    _answer_file(file, make_generator(), settings)


def _answer_file(file: Any, generator: Any, settings: dict[str, Any]) -> None:
  """A line of JSON on standard output for each line of the file.

  The prompts of some batches at a time are read and sorted by length, so that
  a batch has little padding.
  """
  from vera_jax.data.tables import read_rows

  bad = total = 0
  rows = read_rows(file, format="jsonl")
  while chunk := list(itertools.islice(rows, CHUNK * BATCH_SIZE.value)):
    encoded, wrong = [], {}
    for row in chunk:
      try:
        if row.error:
          raise UserError(row.error)
        if not isinstance(row.values.get("prompt"), str):
          raise UserError('it has no "prompt" that is a text')
        tokens = generator.encode(
          row.values["prompt"], max_new_tokens=settings["max_new_tokens"]
        )
        encoded.append(tokens)
      except UserError as error:
        wrong[row.number] = str(error)
        encoded.append(None)
    # a prompt's number is its line's, also where lines before it are bad
    good = [i for i, tokens in enumerate(encoded) if tokens is not None]
    answers = generator.ids(
      [encoded[i] for i in good],
      numbers=[total + i for i in good],
      **settings,
    )
    texts = dict(zip(good, map(generator.decode, answers), strict=True))
    for i, row in enumerate(chunk):
      if row.number in wrong:
        cli.complain(f"line {row.number}: {wrong[row.number]}")
      line = {**row.values, "answer": texts[i]} if i in texts else {}
      print(json_line(line), flush=True)
    total, bad = total + len(chunk), bad + len(wrong)
  if bad:
    raise UserError(f"{bad} of {total} lines could not be used.")


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
