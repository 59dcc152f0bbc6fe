"""The baselines of `benchmarks.train`: PEFT, and torch without PEFT.

The loop that one would write with care: texts tokenised once, batches padded
to their longest text, dev batches sorted by length, SDPA attention, fused
AdamW. Imports nothing of vera_jax, whose libraries would count as its own.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import (
  AutoModelForSequenceClassification,
  AutoTokenizer,
  DataCollatorWithPadding,
  get_linear_schedule_with_warmup,
)

from benchmarks.process import Settings, serve

Row = dict[str, Any]  # an example's token ids and label
Collate = Callable[[list[Row]], Any]  # examples to a padded batch


def train(settings: Settings) -> dict[str, Any]:
  """Predictions on the dev splits after each epoch, numbers trained."""
  config, device = settings["config"], settings["device"]
  if config["method"] in ("vera", "lora"):
    import peft  # noqa: F401  counted among the imports
  imported = time.time()
  torch.manual_seed(config["seed"])
  tokenizer = AutoTokenizer.from_pretrained(settings["base"])
  splits = {
    name: encode(tokenizer, split, config["data"]["max_length"])
    for name, split in settings["splits"].items()
  }
  model = build(settings).to(device)
  collate = DataCollatorWithPadding(tokenizer)
  batches: DataLoader[Row] = DataLoader(
    cast(Dataset[Row], splits["train"]),
    batch_size=config["optim"]["batch_size"],
    shuffle=True,
    collate_fn=collate,
  )
  epochs = config["optim"]["epochs"]
  step = stepper(model, settings, steps=len(batches) * epochs)
  size, predictions = config["eval_batch_size"], []
  for _ in range(epochs):
    model.train()
    for batch in batches:
      step(batch)
    with computing(settings):
      dev = {
        name: predict(model, splits[name], collate=collate, size=size)
        for name in settings["dev_splits"]
      }
    predictions.append(dev)
  return outcome(model, settings, imported=imported, predictions=predictions)


def stepper(
  model: Any, settings: Settings, *, steps: int
) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
  """A function that makes one update by a batch and returns the loss, without
  waiting for the device."""
  config, device = settings["config"], settings["device"]
  optimiser = adamw(model, config)
  warmup = int(config["optim"]["warmup_ratio"] * steps)
  schedule = get_linear_schedule_with_warmup(optimiser, warmup, steps)

  def step(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with computing(settings):
      loss = model(**{k: x.to(device) for k, x in batch.items()}).loss
    loss.backward()
    optimiser.step()
    schedule.step()
    optimiser.zero_grad()
    return loss.detach()

  return step


def computing(settings: Settings) -> torch.autocast:
  """The type that products are computed in."""
  half = settings["dtype"] == "bfloat16"
  return torch.autocast(settings["device"], torch.bfloat16, enabled=half)


def mean(losses: list[torch.Tensor]) -> float:
  return torch.stack(losses).double().mean().item()


def outcome(model: Any, settings: Settings, **more: Any) -> dict[str, Any]:
  """What every baseline says of its training, and `more`."""
  cuda = settings["device"] == "cuda"
  return {
    "compilation": 0.0,
    "trained": sum(leaf.numel() for leaf in trainable(model).values()),
    "threads": torch.get_num_threads(),
    "attention": model.config._attn_implementation,
    "device_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    **more,
  }


def encode(tokenizer: Any, split: dict[str, Any], max_length: int) -> list[Row]:
  """Token ids without padding, the label beside them."""
  encoded = tokenizer(
    split["first"], split["second"], truncation=True, max_length=max_length
  )
  columns = {**encoded, "label": split["labels"]}
  return [
    dict(zip(columns, values, strict=True))
    for values in zip(*columns.values(), strict=True)
  ]


def build(
  settings: Settings,
  *,
  kind: Any = AutoModelForSequenceClassification,
  task: str | None = "SEQ_CLS",
) -> Any:
  """The pretrained model, the method's leaves trainable and in float32.

  `task` is PEFT's name of what the class `kind` is for, None for images.
  """
  config = settings["config"]
  model: Any = kind.from_pretrained(
    settings["base"], num_labels=settings["outputs"], dtype=torch.float32
  )
  if config["method"] in ("vera", "lora"):
    model = with_adapter(model, config, task)  # trains the classifier too
  elif config["method"] == "head":
    for name, leaf in model.named_parameters():
      leaf.requires_grad = "classifier" in name
  for leaf in model.parameters():
    if not leaf.requires_grad:
      leaf.data = leaf.data.to(getattr(torch, settings["dtype"]))
  return model


def with_adapter(model: Any, config: dict[str, Any], task: str | None) -> Any:
  """PEFT's model, by our settings and without PEFT's dropout."""
  import peft

  settings = config[config["method"]]
  shared = {
    "task_type": task,
    "r": settings["rank"],
    # alternatives that we write as one pattern: "query|q_proj"
    "target_modules": [
      n for names in settings["targets"] for n in names.split("|")
    ],
  }
  if task is None:
    shared["modules_to_save"] = ["classifier"]
  adapter: peft.PeftConfig
  if config["method"] == "vera":
    adapter = peft.VeraConfig(
      **shared, d_initial=settings["d_init"], vera_dropout=0.0
    )
  else:
    adapter = peft.LoraConfig(
      **shared, lora_alpha=settings["alpha"], lora_dropout=0.0
    )
  return peft.get_peft_model(model, adapter)


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
  return {n: p for n, p in model.named_parameters() if p.requires_grad}


def adamw(
  model: torch.nn.Module, config: dict[str, Any]
) -> torch.optim.Optimizer:
  """A learning rate of its own for adapter (or base) and head."""
  settings, leaves = config[config["method"]], trainable(model)
  head = [leaf for name, leaf in leaves.items() if "classifier" in name]
  others = [leaf for name, leaf in leaves.items() if "classifier" not in name]
  return torch.optim.AdamW(
    [
      {"params": others, "lr": settings.get("lr", 0.0)},
      {"params": head, "lr": settings["head_lr"] or 0.0},
    ],
    weight_decay=config["optim"]["weight_decay"],
    fused=True,
  )


@torch.inference_mode()
def predict(
  model: Any, rows: list[Row], *, collate: Collate, size: int
) -> list[float]:
  """Classes, or values for regression, in the order of the rows."""
  model.eval()
  device = next(model.parameters()).device
  order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
  answers: dict[int, float] = {}
  for start in range(0, len(order), size):
    part = order[start : start + size]
    logits = model(**collate([rows[i] for i in part]).to(device)).logits
    one = logits.shape[-1] == 1
    values = logits[:, 0].float() if one else logits.argmax(-1)
    answers |= zip(part, values.tolist(), strict=True)
  return [answers[i] for i in range(len(rows))]


if __name__ == "__main__":
  serve(train)
