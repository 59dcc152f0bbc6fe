"""python -m experiments.chat, as a user types it."""

import importlib
import io
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from vera_jax.data import templates
from vera_jax.errors import UserError
from vera_jax.generate import generator as generator_file
from vera_jax.generate.conversation import Past, conversation_ids
from vera_jax.generate.generator import Generator


class Terminal(io.TextIOWrapper):
  def isatty(self) -> bool:
    return True


@pytest.fixture
def typed(monkeypatch):
  """The script's `main` with these lines typed, or at the end of a pipe."""
  # other scripts, which tests have imported, have flags of the same names
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith(("experiments.", "benchmarks.", "tests.")):
      for flag in list(defined):
        delattr(flags.FLAGS, flag.name)
  sys.modules.pop("experiments.chat", None)
  script = importlib.import_module("experiments.chat")
  # a form that the decoder of 48 positions has room for
  monkeypatch.setattr(templates, "WITHOUT_INPUT", "w1 {instruction} w2")

  def run(lines: str, *words: object, person: bool = False) -> None:
    kind = Terminal if person else io.TextIOWrapper
    monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(lines.encode())))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: person)
    with flagsaver.flagsaver():
      flags.FLAGS(["chat", "--template=alpaca", *map(str, words)])
      script.main()

  return run


def answers(generator: Generator, *turns: str, most: int) -> list[str]:
  """Each turn's, by a conversation that is read anew as a whole."""
  messages: list[dict[str, str]] = []
  for turn in turns:
    messages.append({"role": "user", "content": turn})
    ids = conversation_ids(generator.tokenizer, messages, template="alpaca")
    [answer] = generator.ids([ids], max_new_tokens=most)
    text = generator.decode(answer)
    messages.append({"role": "assistant", "content": text})
  return [message["content"] for message in messages[1::2]]


def test_turns_of_a_pipe(typed, words_adapter, adapted_generator, capsys):
  # one whose answer depends on the turn before
  for word in (f"w{number}" for number in range(20)):
    first, second = answers(adapted_generator, "w5", word, most=4)
    [alone] = answers(adapted_generator, word, most=4)
    if second != alone:
      break
  assert second != alone
  lines = f"w5\n{word}\n/reset\n\n{word}\n"
  typed(lines, f"--adapter={words_adapter}", "--max_new_tokens=4")
  done = capsys.readouterr()
  assert done.out.splitlines() == [first, second, alone]
  assert "A new conversation." in done.err
  assert "ends at --max_new_tokens=4" in done.err


def test_only_what_is_new_is_read(generator, monkeypatch):
  read = []
  prefill = generator_file.compiled_prefill

  def counted(module, variables, cache, ids, lengths):
    read.append(int(lengths[0]))
    return prefill(module, variables, cache, ids, lengths)

  monkeypatch.setattr(generator_file, "compiled_prefill", counted)
  past, prompt = Past(), [4, 5, 6]
  for _ in range(3):
    settings = {"max_new_tokens": 5}
    pieces = generator.stream_ids(prompt, past=past, **settings)
    assert "".join(pieces) == "".join(generator.stream_ids(prompt, **settings))
    assert past.ids[: len(prompt)] == prompt
    prompt = [*past.ids, 9, 10]
  # the last token that was written, and two more, in place of everything
  assert read[0::2] == [3, 3, 3] and read[1] < read[3] < read[5]


def test_a_full_context_is_said(typed, words_adapter, capsys):
  flags_given = (f"--adapter={words_adapter}", "--max_new_tokens=40")
  text = "w3 " * 30
  with pytest.raises(UserError, match="1 of 2 messages were not answered"):
    typed(f"{text}\n{text}\n", *flags_given)
  done = capsys.readouterr()
  assert "room for 48: it is not answered. /reset begins" in done.err
  assert len(done.out.splitlines()) == 1


def test_a_person_stops_an_answer(
  typed, words_adapter, adapted_generator, capsys, monkeypatch
):
  decode, calls = Generator.decode, []

  def interrupted(self, ids):
    calls.append(ids)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return decode(self, ids)

  [expected] = answers(adapted_generator, "w5", most=4)
  monkeypatch.setattr(Generator, "decode", interrupted)
  lines = "w5\n/nothing\n/help\n/reset\nw5\n/quit\nw5\n"
  typed(lines, f"--adapter={words_adapter}", "--max_new_tokens=4", person=True)
  done = capsys.readouterr()
  stopped, *_, whole, _ = done.out.split("> ")[1:]
  assert whole == f"{expected}\n"
  assert stopped.strip() and whole.startswith(stopped.strip())
  assert len(stopped) < len(whole)
  assert done.err.startswith("Stopped.")
  assert "no command /nothing" in done.err and "/reset" in done.out


def test_a_plain_decoder_writes_on(typed, tiny_decoder, generator, capsys):
  words = ("--template=plain", "--max_new_tokens=4")
  typed("w1 w2\n", f"--model={tiny_decoder}", *words)
  done = capsys.readouterr()
  assert [done.out.rstrip("\n")] == generator.texts(["w1 w2"], max_new_tokens=4)
  assert "no form for messages" in done.err
