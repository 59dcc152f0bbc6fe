"""The same base, adapters and pairs in torch and PEFT."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from tests.tours.fixtures import Fixtures
from vera_jax.data.examples import Examples
from vera_jax.data.tokenizer import load_tokenizer
from vera_jax.errors import UserError

BATCH = 32
# PEFT's config of each method, its settings but for the targets, its rate.
CONFIGS: dict[str, tuple[str, dict[str, Any], float]] = {
  "vera": ("VeraConfig", {"r": 256}, 2e-2),
  "lora": ("LoraConfig", {"r": 8, "lora_alpha": 8}, 5e-3),
  "dora": (
    "LoraConfig",
    {"r": 8, "lora_alpha": 8, "use_dora": True, "use_rslora": True},
    5e-3,
  ),
  "pvera": ("PveraConfig", {"r": 256}, 2e-2),
  "randlora": ("RandLoraConfig", {"r": 32}, 2e-3),
  "unilora": ("UniLoraConfig", {"r": 4, "theta_d_length": 7680}, 2e-2),
  "ia3": ("IA3Config", {"feedforward_modules": []}, 5e-2),
}


def need_torch() -> None:
  for name in ("torch", "peft", "gguf", "llama_cpp_py_sync"):
    if find_spec(name) is None:
      raise UserError(
        f"The tour needs {name}, which is not installed:"
        " pip install -r requirements-parity.txt"
      )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Without torch's and PEFT's progress bars and warnings."""
  import transformers

  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    yield


def train(fixtures: Fixtures, method: str) -> Any:
  """A PEFT model with a new adapter and head, after a few steps of AdamW."""
  import peft
  import torch

  name, options, rate = CONFIGS[method]
  options = {"target_modules": ["query", "value"], **options}
  config = getattr(peft, name)(task_type="SEQ_CLS", **options)
  model = peft.get_peft_model(in_torch(fixtures.base), config).train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimiser = torch.optim.AdamW(trained, lr=rate)
  labels = torch.from_numpy(np.asarray(fixtures.train.labels)).long()
  for start in range(0, len(labels), BATCH):
    rows = slice(start, start + BATCH)
    inputs = _encoded(fixtures.train, rows, fixtures)
    model(**inputs, labels=labels[rows]).loss.backward()
    optimiser.step()
    optimiser.zero_grad()
  return model.eval()


def _encoded(pairs: Examples, rows: slice, fixtures: Fixtures) -> Any:
  texts = pairs.first[rows], (pairs.second or [])[rows]
  tokenizer = load_tokenizer(fixtures.base)
  return tokenizer(*texts, padding=True, return_tensors="pt")


def in_torch(folder: Path) -> Any:
  """transformers' torch classifier of a folder."""
  import torch
  from transformers import AutoModelForSequenceClassification as Auto

  torch.manual_seed(0)  # of a new head, and of dropout
  return Auto.from_pretrained(folder, num_labels=2).eval()


def in_peft(folder: Path, fixtures: Fixtures) -> Any:
  """PEFT's model of an adapter's folder."""
  return with_adapter(in_torch(fixtures.base), folder)


def decoder(folder: Path, *, gguf: Path | None = None) -> tuple[Any, Any]:
  """transformers' decoder and tokenizer, of a folder or of a GGUF file.

  The config is the folder's in either case, since transformers doesn't read all
  sizes from the header of a GPT-2.
  """
  import torch
  from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

  place = gguf.parent if gguf else folder
  name = gguf.name if gguf else None
  model = AutoModelForCausalLM.from_pretrained(
    place,
    gguf_file=name,
    config=AutoConfig.from_pretrained(folder),
    dtype=torch.float32,
  )
  return model.eval(), AutoTokenizer.from_pretrained(place, gguf_file=name)


def with_adapter(model: Any, folder: Path) -> Any:
  """PEFT's model of a base and an adapter's folder."""
  import peft

  return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def next_words(model: Any, ids: np.ndarray) -> np.ndarray:
  """A torch decoder's logits, [rows, tokens, vocabulary]."""
  import torch

  with torch.no_grad():
    return model(input_ids=torch.from_numpy(ids).long()).logits.numpy()


def texts(
  model: Any, tokenizer: Any, prompts: Sequence[str], *, new: int
) -> list[str]:
  """What a torch decoder writes behind prompts, greedily."""
  found = []
  for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    answer = out[0, inputs["input_ids"].shape[1] :]
    found.append(tokenizer.decode(answer, skip_special_tokens=True))
  return found


def logits(model: Any, fixtures: Fixtures) -> np.ndarray:
  """What a torch model answers to the probe pairs, [pairs, 2]."""
  import torch

  with torch.no_grad():
    inputs = _encoded(fixtures.probes, slice(None), fixtures)
    return model(**inputs).logits.numpy()
