"""PEFT's side of `benchmarks.train --task=e2e`: a decoder on completions.

The loop that one would write with care: rows tokenised once, batches padded to
their longest, loss and logits as transformers computes them, SDPA attention,
fused AdamW. Imports nothing of vera_jax, whose libraries would count as its
own.
"""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.process import Settings, serve
from benchmarks.train_torch import (
  computing,
  mean,
  outcome,
  stepper,
  with_adapter,
)

IGNORED = -100  # a label that transformers' loss leaves out


def train(settings: Settings) -> dict[str, Any]:
  """The dev rows' mean loss after each epoch, numbers trained."""
  config, device = settings["config"], settings["device"]
  import peft  # noqa: F401  counted among the imports

  imported = time.time()
  torch.manual_seed(config["seed"])
  tokenizer = AutoTokenizer.from_pretrained(settings["base"])
  splits = {
    name: encode(tokenizer, rows) for name, rows in settings["splits"].items()
  }
  model: Any = AutoModelForCausalLM.from_pretrained(
    settings["base"], dtype=torch.float32
  )
  model = with_adapter(model, config, "CAUSAL_LM").to(device)
  for leaf in model.parameters():
    if not leaf.requires_grad:
      leaf.data = leaf.data.to(getattr(torch, settings["dtype"]))
  order = settings["order"]
  step = stepper(model, settings, steps=len(order))
  epochs, losses, dev = config["optim"]["epochs"], [], []
  model.train()
  for number, rows in enumerate(order, 1):
    losses.append(step(collate([splits["train"][row] for row in rows])))
    if number % (len(order) // epochs) == 0:
      with computing(settings):
        dev.append(evaluate(model, splits["dev"], config["eval_batch_size"]))
  return outcome(
    model,
    settings,
    imported=imported,
    predictions=dev,
    train_loss=mean(losses),
  )


def encode(
  tokenizer: Any, rows: list[list[str]]
) -> list[tuple[list[int], int]]:
  """Each row's token ids, and how many of them are its prompt's."""
  encoded = []
  for row in rows:
    prompt, completion = (
      [*tokenizer(text, add_special_tokens=False).input_ids, end]
      for text, end in zip(row, [tokenizer.eos_token_id] * 2, strict=True)
    )
    encoded.append((prompt + completion, len(prompt)))
  return encoded


def collate(rows: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
  """Padded on the right; labels are those of the completions alone."""
  shape = len(rows), max(len(ids) for ids, _ in rows)
  ids, mask = torch.zeros(2, *shape, dtype=torch.long)
  labels = torch.full(shape, IGNORED)
  for i, (row, prompt) in enumerate(rows):
    ids[i, : len(row)] = torch.tensor(row)
    mask[i, : len(row)] = 1
    labels[i, prompt : len(row)] = ids[i, prompt : len(row)]
  return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.inference_mode()
def evaluate(model: Any, rows: list[tuple[list[int], int]], size: int) -> float:
  """The mean loss of a completion's token, in nats."""
  model.eval()
  total = count = 0
  rows = sorted(rows, key=lambda row: len(row[0]))
  device = next(model.parameters()).device
  for start in range(0, len(rows), size):
    batch = collate(rows[start : start + size])
    learned = int((batch["labels"] != IGNORED).sum())
    loss = model(**{k: x.to(device) for k, x in batch.items()}).loss
    total += loss.item() * learned
    count += learned
  model.train()
  return total / count


if __name__ == "__main__":
  serve(train)
