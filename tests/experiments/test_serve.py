"""The command: which adapters it finds, and from training to serving."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.experiments.command import ROOT
from vera_jax.errors import UserError

pytest.importorskip("uvicorn", reason="requirements-serve.txt is missing")
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")
PORT = "--port=0"


def test_mistakes_are_said_before_anything_is_loaded(
  typed, random_adapter, tmp_path, monkeypatch
):
  monkeypatch.delenv("VERA_JAX_TOKEN", raising=False)
  adapters = tmp_path / "adapters"
  (random_adapter()).rename(adapters)
  (tmp_path / "empty").mkdir()
  (tmp_path / "token").write_text("\n")
  mistakes = {
    (): "--model=BASE, --adapters=FOLDER",
    (f"--adapters={tmp_path}/none",): "none is no adapter",
    (f"--adapters={tmp_path}/empty",): "holds no adapter",
    (f"--adapters={adapters},adapters={adapters}",): "one name, adapters",
    ("--model=m", "--host=0.0.0.0"): "give a token",
    ("--model=m", f"--token_file={tmp_path}/token"): "token is empty",
    ("--model=m", "--allow_loading"): "--allow_loading needs",
    ("--host=1.2.3.4.5", f"--token_file={ROOT}/LICENSE", "--model=m"): "sent",
    (f"--model={tmp_path}/m", PORT): "m",
  }
  for words, said in mistakes.items():
    with pytest.raises(UserError, match=said):
      typed("serve", *words)


def test_adapters_are_named_by_their_folders(random_adapter, tmp_path):
  from experiments.serve import named_adapters

  for place in ("of/ann", "of/run/adapter", "bob"):
    (tmp_path / place).parent.mkdir(exist_ok=True, parents=True)
    random_adapter().rename(tmp_path / place)
  (tmp_path / "of/pefts").mkdir()
  (tmp_path / "of/pefts/adapter_config.json").write_text("{}")
  (tmp_path / "of/notes").mkdir()
  (tmp_path / "of/a.txt").write_text("")
  of, bob = f"{tmp_path}/of", f"{tmp_path}/bob/"
  hub = "owner/name@main"
  adapters, folders = named_adapters([of, bob, f"eve={bob}", hub])
  assert adapters == {
    "ann": Path(of, "ann"),
    "pefts": Path(of, "pefts"),
    "run": Path(of, "run/adapter"),
    "bob": Path(bob),
    "eve": Path(bob),
    "name": hub,
  }
  assert folders == [Path(of)]


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_is_named(typed, random_adapter, tmp_path):
  random_adapter().rename(tmp_path / "ann")
  random_adapter(rank=4).rename(tmp_path / "bob")
  with pytest.raises(UserError, match="'bob'.*\n.*rank: 4 there, 8"):
    typed("serve", f"--adapters={tmp_path}", PORT)


@pytest.mark.slow
def test_from_training_to_serving(typed, tmp_path):
  """docs/serving.md: ten adapters trained as one ensemble, then a process that
  serves them until SIGTERM, which finishes what is running."""
  openai = pytest.importorskip("openai")
  base = Path(ROOT).parent / "shared/data/checkpoints/stories260K"
  if not base.is_dir():
    pytest.skip("the small Llama is not beside the checkout")
  texts = tmp_path / "texts.txt"
  texts.write_text("Once upon a time a cat sat on a mat.\nThe end.\n" * 20)
  users = tmp_path / "users"
  typed(
    *("train", "--config=language", f"--config.model.name={base}"),
    *(f"--config.data.train={texts}", f"--workdir={users}"),
    "--seeds=" + ",".join(map(str, range(10))),
    *("--config.optim.epochs=1", "--config.vera.rank=8"),
    *("--config.optim.adapter_lr=0.3", "--config.data.max_length=32"),
    f"--config.data.cache_dir={tmp_path}/cache",
  )
  token = tmp_path / "token"
  token.write_text("secret\n")
  command = [
    *(sys.executable, "-m", "experiments.serve", PORT, "--rows=4"),
    *(f"--model={base}", "--name=base", f"--adapters={users}"),
    *(f"--token_file={token}", "--length=256"),
  ]
  with subprocess.Popen(
    command,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  ) as process:
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("10 adapters of base on http://127.0.0.1:"), first
    with openai.OpenAI(
      base_url=first.split()[-1] + "/v1", api_key="secret", max_retries=0
    ) as client:

      def write(name, **settings):
        return client.completions.create(
          model=name, prompt="Once upon", temperature=0, **settings
        )

      names = {f"seed{i}" for i in range(10)}
      assert {x.id for x in client.models.list()} == {*names, "base"}
      texts = {write(x, max_tokens=24).choices[0].text for x in names}
      assert len(texts) > 1 and write("base").choices[0].text not in texts
      stream = write("seed3", max_tokens=200, stream=True)
      parts = [next(iter(stream))]
      process.send_signal(signal.SIGTERM)
      time.sleep(0.3)
      parts += list(stream)
      with pytest.raises(openai.APIConnectionError):
        write("seed3")
    _, log = process.communicate(timeout=60)
  assert parts[-1].choices[0].finish_reason in ("length", "stop")
  assert process.returncode == 0
  assert "model=seed3" in log and "secret" not in log and "Traceb" not in log
