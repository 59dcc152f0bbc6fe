"""python -m experiments.generate, as a user types it."""

import importlib
import io
import json
import shutil
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from vera_jax.adapters.card import model_card
from vera_jax.data import templates
from vera_jax.errors import UserError
from vera_jax.generate.beam import Beam
from vera_jax.generate.sampling import Sampling


@pytest.fixture(scope="module")
def typed():
  """The script's `main` with the flags given, in this process."""
  # other scripts, which tests have imported, have flags of the same names
  for module, found in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith(("experiments.", "benchmarks.", "tests.")):
      for flag in list(found):
        delattr(flags.FLAGS, flag.name)
  sys.modules.pop("experiments.generate", None)
  script = importlib.import_module("experiments.generate")

  def run(*words: object) -> None:
    with flagsaver.flagsaver():
      flags.FLAGS(["generate", *map(str, words)])
      script.main()

  return run


def test_a_file_of_prompts(
  typed, words_adapter, adapted_generator, tmp_path, capsys
):
  prompts = ["w1 w2", "w3 w4 w5 w6", "w7"]
  lines = [
    json.dumps({"id": 5, "prompt": prompts[0]}),
    "{",
    json.dumps({"prompt": prompts[1]}),
    json.dumps({"text": "w1"}),
    json.dumps({"prompt": ""}),
    json.dumps({"prompt": prompts[2], "answer": "an old one"}),
  ]
  file = tmp_path / "prompts.jsonl"
  file.write_text("\n".join(lines))
  with pytest.raises(UserError, match="3 of 6 lines could not be used"):
    typed(
      f"--adapter={words_adapter}",
      f"--input={file}",
      "--max_new_tokens=8",
      "--temperature=1.5",
      "--seed=3",
      "--batch_size=4",
    )
  done = capsys.readouterr()
  assert "line 2: " in done.err and "line 5: The prompt is" in done.err
  assert 'line 4: it has no "prompt"' in done.err
  found = list(map(json.loads, done.out.splitlines()))
  # each line draws by its own number
  tokens = [adapted_generator.encode(p, max_new_tokens=8) for p in prompts]
  ids = adapted_generator.ids(
    tokens,
    how=Sampling(temperature=1.5),
    seed=3,
    max_new_tokens=8,
    numbers=[0, 2, 5],
  )
  texts = list(map(adapted_generator.decode, ids))
  assert found == [
    {"id": 5, "prompt": prompts[0], "answer": texts[0]},
    {},
    {"prompt": prompts[1], "answer": texts[1]},
    {},
    {},
    {"prompt": prompts[2], "answer": texts[2]},
  ]


def test_one_prompt_from_adapter_and_folder(
  typed, words_adapter, tiny_decoder, adapted_generator, capsys
):
  flag = "--max_new_tokens=8"
  # merged into the weights and beside them it writes the same
  typed(f"--adapter={words_adapter}", "--prompt=w1 w2", flag, "--keep_adapter")
  [expected] = adapted_generator.texts(["w1 w2"], max_new_tokens=8)
  assert capsys.readouterr().out == expected + "\n"
  typed(f"--model={tiny_decoder}", "--prompt=w1 w2", flag)
  assert capsys.readouterr().out != expected + "\n"


def test_beam_search_of_standard_input(
  typed, words_adapter, adapted_generator, capsys, monkeypatch
):
  lines = b'{"prompt": "w1 w2"}\n{"prompt": "w9"}\n'
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
  typed(
    f"--adapter={words_adapter}",
    "--input=-",
    "--max_new_tokens=8",
    "--beams=3",
    "--length_penalty=0.8",
    "--no_repeat_ngram=2",
    "--rules=lora",
  )
  out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  how = Beam(3, 0.8, no_repeat_ngram=2, rules="lora")
  texts = adapted_generator.texts(["w1 w2", "w9"], how=how, max_new_tokens=8)
  assert [line["answer"] for line in out] == texts


def test_a_message_needs_a_chat_template(typed, tiny_decoder):
  with pytest.raises(UserError, match="no chat template.* with --template="):
    typed(f"--model={tiny_decoder}", "--prompt=w1 w2", "--chat")


def test_an_adapter_is_asked_as_it_was_trained(
  typed, words_adapter, adapted_generator, tmp_path, monkeypatch, capsys
):
  prompt = "w1 {instruction} w2"
  monkeypatch.setattr(templates, "WITHOUT_INPUT", prompt)
  shutil.copytree(words_adapter, tmp_path / "tuned")
  path = tmp_path / "tuned/adapter.json"
  about = json.loads(path.read_text()) | {"template": "alpaca"}
  path.write_text(json.dumps(about))
  texts = adapted_generator.texts(["w5", "w1 w5 w2"], max_new_tokens=8)
  assert texts[0] != texts[1]
  for adapter, flags_given, expected in (
    (tmp_path / "tuned", [], texts[1]),
    (tmp_path / "tuned", ["--template=plain"], texts[0]),
    (words_adapter, ["--template=alpaca"], texts[1]),
  ):
    some = ("--prompt=w5", "--max_new_tokens=8", *flags_given)
    typed(f"--adapter={adapter}", *some)
    assert capsys.readouterr().out == expected + "\n"
  # so the card's command is the same for all
  card = model_card(about | {"kind": "language_modelling"})
  assert "vera-jax generate --adapter=ADAPTER --prompt=TEXT" in card
  assert "| prompts are put into the template | alpaca |" in card


@pytest.mark.parametrize(
  "words, message",
  [
    ([], "either --adapter"),
    (["--model=a", "--adapter=b", "--prompt=c"], "either --adapter"),
    (["--model=a"], "either --prompt"),
    (["--model=a", "--prompt=b", "--input=c"], "either --prompt"),
    (["--model=a", "--prompt=b", "--rules=lora"], "--rules has no effect"),
    (
      ["--model=a", "--prompt=b", "--beams=2", "--seed=1", "--top_k=3"],
      "--top_k, --seed has no effect with --beams",
    ),
    (["--model=a", "--prompt=b", "--top_p=0.5"], "give a temperature"),
    (
      ["--model=a", "--prompt=b", "--chat", "--template=plain"],
      "--chat is --template=chat, not plain",
    ),
    (["--model=a", "--input=no.jsonl"], "There is no no.jsonl"),
    (["--adapter=nowhere", "--prompt=b"], "no adapter folder nowhere"),
  ],
)
def test_mistakes(typed, words, message):
  with pytest.raises(UserError, match=message):
    typed(*words)
