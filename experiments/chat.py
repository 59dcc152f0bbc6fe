"""Talk with a decoder, with a trained adapter or from a whole folder.

  python -m experiments.chat --adapter=RUN/adapter
  python -m experiments.chat --model=FOLDER --temperature=0.7 --top_p=0.9
  … < questions.txt

Each line is a message, and the answer appears as it is written. /reset begins
a new conversation, /help says what there is, /quit or Ctrl-D ends. Ctrl-C stops
an answer; what was written of it stays in the conversation. At the end of a
pipe each line is answered in turn, and the exit code is 1 if one was not.

A message is put into what the adapter was trained with; for other adapters and
models into the tokenizer's chat template if there is one, else into nothing:
such a model was not trained to answer, and writes on. --template says another.
What was read of a conversation stays in memory, so that a turn reads only what
is new. The conversation has to fit into the model's context; where it is full,
that is said, and /reset makes room.
"""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from experiments import cli, interrupt
from experiments.decoding import define_decoding
from vera_jax.errors import UserError
from vera_jax.terminal import LINES, printable

DECODING = define_decoding(
  template=(
    "What messages are put into. Unset: as the adapter was trained, or the"
    " tokenizer's chat template, or nothing."
  ),
  max_new_tokens=512,
)
HELP = """\
/reset  begins a new conversation
/help   shows this
/quit   ends; so does Ctrl-D
Ctrl-C  stops an answer"""


def main() -> None:
  DECODING.model.named()  # one of them is
  cli.say_importing()
  how = DECODING.sampling()
  from vera_jax.data.templates import CHAT, PLAIN
  from vera_jax.data.tokenizer import load_tokenizer
  from vera_jax.generate.conversation import Past, conversation_ids
  from vera_jax.generate.generator import Generator

  decoder = DECODING.load()
  template = DECODING.template.value or decoder.about.get("template")
  if not template and load_tokenizer(decoder.folder).chat_template:
    template = CHAT
  generator = Generator(
    decoder, keep_adapter=DECODING.keep_adapter.value, template=template
  )
  room = decoder.room
  if generator.template == PLAIN:
    cli.complain("This model has no form for messages: it writes on.")
  person = bool(sys.stdin) and sys.stdin.isatty() and sys.stdout.isatty()
  if person:
    if signal.getsignal(signal.SIGINT) is interrupt:  # may end the program
      signal.signal(signal.SIGINT, signal.default_int_handler)
    print("/help shows the commands.")
  messages: list[dict[str, Any]] = []
  past, asked, unanswered = Past(), 0, 0
  for line in _lines(person):
    match line.strip():
      case "":
        continue
      case "/quit":
        break
      case "/reset":
        messages, past = [], Past()
        cli.complain("A new conversation.")
        continue
      case "/help":
        print(HELP)
        continue
      case word if word.startswith("/") and " " not in word:
        cli.complain(f"There is no command {word}.\n{HELP}")
        continue
    asked += 1
    messages.append({"role": "user", "content": line})
    answer, ended = "", ""
    try:
      tokens = conversation_ids(
        generator.tokenizer, messages, template=generator.template
      )
      most = min(DECODING.max_new_tokens.value, room - len(tokens))
      if most < 1:
        raise UserError(
          f"The conversation has {len(tokens)} tokens with this message, and"
          f" the model has room for {room}: it is not answered. /reset begins"
          " a new one."
        )
      for piece in generator.stream_ids(
        tokens,
        how=how,
        max_new_tokens=most,
        # each turn draws by a key of its own
        seed=(DECODING.seed.value + asked - 1) % 2**32,
        past=past,
      ):
        answer += piece
        print(printable(piece, keep=LINES), end="", flush=True)
      if past.ids[-1] not in generator.eos:
        ended = f"The answer ends at --max_new_tokens={most}."
        if len(past.ids) >= room:
          ended = (
            f"The model's context of {room} tokens is full: /reset begins a new"
            " conversation."
          )
    except KeyboardInterrupt:
      if not person:
        raise
      ended = "Stopped."
    except UserError as error:
      ended, unanswered = str(error), unanswered + 1
    if answer:
      print()
      messages.append({"role": "assistant", "content": answer})
    else:  # as if it had not been asked
      messages.pop()
      ended = ended or "The model ends at once, without an answer."
    if ended:
      cli.complain(ended)
  if unanswered and not person:
    raise UserError(f"{unanswered} of {asked} messages were not answered.")


def _lines(person: bool) -> Iterator[str]:
  """What is typed, or the lines of a pipe."""
  if sys.stdin is None:
    raise UserError("Standard input is closed: messages are read from it.")
  if isinstance(sys.stdin, io.TextIOWrapper):
    sys.stdin.reconfigure(errors="replace")
  if person:
    with suppress(ImportError):
      import readline  # noqa: F401 (it gives `input` arrow keys and a history)
  while True:
    try:
      line = input("> " if person else "")
    except EOFError:
      return
    except KeyboardInterrupt:
      if not person:
        raise
      print("\n/quit or Ctrl-D ends.")
      continue
    yield line


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
