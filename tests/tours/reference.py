"""The same base, adapters and pairs in torch and PEFT."""

import contextlib
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from vera_jax.train.evaluate import Logits

from tests.tours.ground import Ground
from vera_jax.data.examples import Examples
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError

PEFT_BATCH = 32
RATES = {"vera": 2e-2, "lora": 5e-3}


def need_torch() -> None:
  for name in ("torch", "peft"):
    if find_spec(name) is None:
      raise UserError(
        f"The tour needs {name}, which is not installed:"
        " pip install -r requirements-parity.txt"
      )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Without torch's and PEFT's bars and advice."""
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    yield


def train(ground: Ground, method: str) -> Any:
  """A new adapter and head, after a few steps of AdamW."""
  import peft
  import torch

  model = peft.get_peft_model(
    in_torch(ground.base), _peft_config(ground.config, method)
  ).train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimiser = torch.optim.AdamW(trained, lr=RATES[method])
  labels = torch.from_numpy(np.asarray(ground.train.labels)).long()
  for start in range(0, len(labels), PEFT_BATCH):
    rows = slice(start, start + PEFT_BATCH)
    inputs = _encoded(ground.train, rows, ground)
    model(**inputs, labels=labels[rows]).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
  return model.eval()


def _peft_config(config: ConfigDict, method: str) -> Any:
  import peft

  own = config[method]
  same: dict[str, Any] = {"task_type": "SEQ_CLS"}
  same |= {"r": own.rank, "target_modules": list(own.targets)}
  if method == "lora":
    return peft.LoraConfig(lora_alpha=own.alpha, **same)
  return peft.VeraConfig(**same)


def _encoded(pairs: Examples, rows: slice, ground: Ground) -> Any:
  tokenizer = load_tokenizer(ground.base)
  texts = pairs.first[rows], (pairs.second or [])[rows]
  return tokenizer(*texts, padding=True, return_tensors="pt")


def in_torch(folder: Path) -> Any:
  import torch
  from transformers import AutoModelForSequenceClassification as Auto

  torch.manual_seed(0)  # of a new head, and of dropout
  return Auto.from_pretrained(folder, num_labels=2).eval()


def in_peft(folder: Path, ground: Ground) -> Any:
  import peft

  base = in_torch(ground.base)
  return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def logits(model: Any, ground: Ground) -> Logits:
  import torch

  with torch.no_grad():
    inputs = _encoded(ground.probes, slice(None), ground)
    return model(**inputs).logits.numpy()
