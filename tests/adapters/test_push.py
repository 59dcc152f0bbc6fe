"""To the hub and back, against a stand-in for its API; the model card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.command import run
from tests.faults.downloads import COMMIT, NAME, TOKEN, hub
from vera_jax.adapters.card import CARD, model_card
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.push import push_adapter
from vera_jax.errors import UserError
from vera_jax.pretrained.classifier import load_classifier, restore_adapter
from vera_jax.serve.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
ASK = """
import os, sys
from vera_jax.adapters.files import load_adapter
from vera_jax.adapters.push import push_adapter
from vera_jax.errors import UserError
adapter, name, out = sys.argv[1:]
for ask in (
  lambda: load_adapter(name).folder,
  lambda: load_adapter(f"{name}@v1").folder,
  lambda: load_adapter(f"{name}@v2"),
  lambda: push_adapter(adapter, name),
):
  try:
    print(ask())
  except UserError as error:
    print(error)
from absl import flags
from starlette.testclient import TestClient
from experiments import cli, merge
from vera_jax.serve.bank import AdapterBank
from vera_jax.serve.http import Service
folder = load_adapter(adapter).about["base"]
films = cli.load_any_adapter(f"{name}@v1", None)  # as experiments.serve does
bank = AdapterBank({"films": films}, base=folder)
client = TestClient(Service(bank, base="tiny"), base_url="http://localhost")
asked = client.post("/v1/classify", json={"model": "films", "input": "word1"})
print(asked.json()["data"][0]["score"])
base = f"--base={folder}"
flags.FLAGS(["merge", f"--adapter={name}@v1", f"--out={out}", base])
merge.main()
"""


@pytest.mark.slow
def test_to_the_hub_and_back(random_adapter, tiny_model, tmp_path):
  """All that the hub gets is as it is here, but for this machine's paths; by
  its id it is loaded, merged and served."""
  pytest.importorskip("starlette.testclient")
  adapter, store = random_adapter("head", task="sst2"), tmp_path / "store"
  store.mkdir()
  about = json.loads((adapter / "adapter.json").read_text())
  assert Path(about["base"]).is_absolute()  # by which it is found here
  picture = f"{tmp_path}/my images/cat/1.png ('{tmp_path}/x/2.png': cut off)"
  about["data"] = {"test": {"examples": 3, "unreadable": [picture]}}
  (adapter / "adapter.json").write_text(json.dumps(about))
  card = (adapter / "README.md").read_text() + f"Mine: {about['base']}\n"
  (adapter / "README.md").write_text(card)
  files = ["README.md", "adapter.json", "adapter.safetensors"]
  with hub(store) as (address, _):
    client = {
      "HF_ENDPOINT": address,
      "HF_HOME": str(tmp_path / "cache"),
      "HF_HUB_OFFLINE": "0",
    }
    flags = f"--adapter={adapter}", f"--to={NAME}"
    pushed = run("push", *flags, HF_TOKEN=TOKEN, **client)
    assert pushed.stdout == f"{address}/{NAME}/commit/{COMMIT}\n"
    assert f"The base is named {tiny_model.name!r}" in pushed.stderr
    assert sorted(file.name for file in store.iterdir()) == files
    data = {"test": {"examples": 3, "unreadable": 1}}
    public = about | {"base": tiny_model.name, "data": data}
    assert json.loads((store / "adapter.json").read_text()) == public
    card = card.replace(about["base"], tiny_model.name)
    assert (store / "README.md").read_text() == card
    weights = "adapter.safetensors"
    assert (store / weights).read_bytes() == (adapter / weights).read_bytes()
    sent = b"".join((store / file).read_bytes() for file in files)
    for place in (tmp_path, tiny_model, adapter, ROOT, Path.home()):
      assert f"{place}/".encode() not in sent
    (store / "evil.py").write_text("")  # not fetched

    asked = subprocess.run(
      [sys.executable, "-c", ASK, adapter, NAME, tmp_path / "merged"],
      env={**os.environ, **client, "PYTHONPATH": str(ROOT), "HF_TOKEN": "no"},
      capture_output=True,
      text=True,
    )
    newest, v1, v2, refused, served, *_ = asked.stdout.splitlines()
    for found in (newest, v1):
      assert sorted(file.name for file in Path(found).iterdir()) == files
    assert v2.startswith(f"There is no adapter folder {NAME}@v2 here, and")
    assert refused.startswith(f"{NAME} can't be uploaded") and TOKEN != "no"

    name = f"--adapter={NAME}@v1"
    base = f"--base={tiny_model}"
    answer = run("predict", name, base, "--input=-", text="word1", **client)
  model = Predictor(restore_adapter(load_adapter(adapter)))
  (wanted,) = model.answers(["word1"])
  label, score, *_ = answer.stdout.split("\t")
  assert label == wanted.label
  assert float(score) == pytest.approx(wanted.score, abs=2e-6)
  assert float(served) == pytest.approx(wanted.score, abs=2e-6)
  merged = Predictor(load_classifier(tmp_path / "merged"))
  assert merged.answers(["word1"])[0].score == pytest.approx(wanted.score)


def test_what_is_no_adapter_is_not_uploaded(random_adapter, tmp_path):
  folder = random_adapter()
  for name in ("word", "a/b/c", f"{NAME}@v1"):
    with pytest.raises(UserError, match="no hub id .* owner/name"):
      push_adapter(folder, name)
  with pytest.raises(UserError, match="no adapter folder"):
    push_adapter(tmp_path / "none", NAME)
  (folder / "adapter.safetensors").write_bytes(b"")
  with pytest.raises(UserError, match="checksum differs"):
    push_adapter(folder, NAME)


@pytest.mark.parametrize("name", ["some/adapter", "some/adapter@v1"])
def test_without_the_hub_there_is_still_a_clear_error(name):
  words = "(?s)no file or folder .*be reached.*owner/name"
  with pytest.raises(UserError, match=words):
    load_adapter(name)


def test_the_card_is_made_from_the_result(random_adapter):
  folder = random_adapter(task="sst2")
  about = json.loads((folder / "adapter.json").read_text())
  assert (folder / CARD).read_text() == model_card(about)
  data = {"train": {"examples": 40, "truncated": 0, "fingerprint": "f00d"}}
  about |= {"seed": 3, "score_name": "accuracy", "score": 0.8125}
  card = model_card({**about, "data": data})
  for text in (
    "| method | VeRA, arXiv 2310.11454 |",
    "| rank | 8 (r; may exceed the layers' widths) |",
    "| targets | query, value (patterns of the layers",
    about["base_fingerprint"],
    about["projection_digest"],
    "| data | sst2; train 40 examples, sha256 f00d |",
    "| score | accuracy 0.8125",
    "| labels | negative, positive |",
  ):
    assert text in card
  assert "base_model" not in card  # a folder here is nobody else's
  assert str(Path(about["base"]).parent) not in card
  card = model_card({**about, "base": "roberta-base", "labels": ["a|b\n<c"]})
  assert '\nbase_model: "roberta-base"\n' in card
  assert "| labels | a\\|b &lt;c |" in card
  assert model_card({}).startswith("---\nlibrary_name: vera_jax\n")
  card = model_card({**about, "kind": "language_modelling"})
  assert "text-generation" in card and "AutoModelForCausalLM" in card
  assert "Predictor" not in card
  card = model_card({**about, "kind": "token_classification"})
  assert '"token-classification"' in card and "Predictor(" in card
  assert "text-classification" not in card and "PEFT" not in card
