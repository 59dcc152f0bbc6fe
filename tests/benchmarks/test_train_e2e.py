"""E2E's rows on both sides: the same texts, tokens, batches and losses."""

import gzip
import json

import numpy as np
import pytest

from benchmarks import train, train_e2e, train_ours
from tests.tasks.decoder_files import LLAMA, WORDS, write_decoder
from vera_jax.tasks.task import task_for


@pytest.fixture
def texts(tmp_path):
  """(the config, its texts) of a tiny decoder and a dozen rows."""
  source, base = tmp_path / "source", tmp_path / "tiny"
  source.mkdir()
  base.mkdir()
  write_decoder(base, {**LLAMA, "num_hidden_layers": 1})
  rng = np.random.default_rng(0)
  lines = [
    "||".join(" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 5, 2))
    for _ in range(12)
  ]
  text = "".join(f"{line} \n" for line in lines)
  (source / "train.txt.gz").write_bytes(gzip.compress(text.encode()))
  (source / "valid.txt").write_text(text)
  config = train_e2e.get_config()
  config.data.source, config.model.name = str(source), str(base)
  config.data.max_train_examples, config.optim.batch_size = 10, 4
  config.data.max_length, config.vera.rank, config.vera.lr = 20, 4, 0.1
  config.method = "vera"
  config.data.cache_dir = str(tmp_path / "tokens")
  return config, train_e2e.Texts(config, tmp_path)


def test_our_side_reads_the_same_rows(texts):
  config, texts = texts
  tokens = task_for(config).load(config, texts.base).tokens
  assert len(tokens["train"]) == texts.examples == 10
  assert len(tokens["dev"]) == texts.dev_examples == 12
  assert len(tokens["train"].ids) == texts.count
  order = texts.for_torch(config)["order"]
  assert sorted(sum(order, [])) == list(range(10))
  assert [len(batch) for batch in order] == [4, 4, 2]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own
def test_both_sides_learn_the_same(texts, tmp_path):
  """As many numbers, and at a rate of almost 0 the same losses."""
  pytest.importorskip("peft")
  from benchmarks import train_e2e_torch

  config, texts = texts
  config.vera.lr = 1e-9
  settings = json.loads(
    json.dumps(
      texts.for_torch(config)
      | train.place_of(train.Trainer(train.PEFT, "vera", "cpu"))
      | {"config": config.to_dict()}
    )
  )
  theirs = train_e2e_torch.train(settings)
  ours = train_ours.train(
    {"config": config.to_dict(), "workdir": str(tmp_path / "run")}
  )
  assert theirs["trained"] == ours["trained"]
  assert theirs["train_loss"] == pytest.approx(ours["train_loss"], rel=1e-5)
  scores = texts.scores(theirs["predictions"])
  assert scores == pytest.approx(ours["scores"], rel=1e-5)
