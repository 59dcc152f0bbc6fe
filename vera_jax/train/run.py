"""All that a run is made of, built from its config."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vera_jax.adapters.apply import Adapted
from vera_jax.data.loader import steps_per_epoch
from vera_jax.errors import UserError
from vera_jax.hub import resolve
from vera_jax.models.bert import BertConfig, input_shapes
from vera_jax.models.hf_weights import load_config
from vera_jax.train.data import Data, build_data
from vera_jax.train.model import Model, build_model
from vera_jax.train.optim import optimiser
from vera_jax.train.sharding import batch_shards, make_mesh


class Run(NamedTuple):
  """What a run is made of, or a group of runs: `config` is the first one's.

  `optimiser` makes the transformation from `hyperparameters`.
  """

  config: ConfigDict
  base: Path
  mesh: Mesh
  data: Data
  model: Model
  optimiser: Callable[..., optax.GradientTransformation]
  epoch_steps: int

  @property
  def steps(self) -> int:
    return self.epoch_steps * self.config.optim.epochs

  @property
  def tx(self) -> optax.GradientTransformation:
    return self.optimiser(**hyperparameters(self.config))


def learning_rates(config: ConfigDict) -> dict[str, float]:
  """`config.optim`'s rates, or where they are unset the method's own."""
  own = config[config.method]
  adapter, head = config.optim.adapter_lr, config.optim.head_lr
  return {
    "adapter_lr": own.get("lr", 0.0) if adapter is None else adapter,
    "head_lr": own.head_lr if head is None else head,
  }


def hyperparameters(config: ConfigDict) -> dict[str, float]:
  """The optimiser's numbers that the members of a group have each their own."""
  decay = config.optim.weight_decay
  return {**learning_rates(config), "weight_decay": decay}


def build_run(config: ConfigDict) -> Run:
  """Read the data, load the base, make adapter, head and optimiser."""
  mesh = make_mesh(**config.mesh)
  base = resolve(config.model.name)
  data = build_data(config, folder=base, shards=batch_shards(mesh))
  check_fit(load_config(base), data)
  model = build_model(
    config, folder=base, num_labels=data.task.num_labels, mesh=mesh
  )
  epoch_steps = steps_per_epoch(
    len(data.tokens["train"]), config.optim.batch_size
  )
  make_optimiser = partial(
    optimiser,
    model.labels,
    steps=epoch_steps * config.optim.epochs,
    warmup_ratio=config.optim.warmup_ratio,
    grad_clip=config.optim.grad_clip,
  )
  return Run(config, base, mesh, data, model, make_optimiser, epoch_steps)


def check_fit(model: BertConfig, data: Data) -> None:
  """Refuse texts that are beyond the model's tables; lookups never fail."""
  longest = max(int(split.lengths.max()) for split in data.tokens.values())
  room = model.max_position_embeddings - model.first_position
  if longest > room:
    raise UserError(
      f"The longest text has {longest} tokens, but the model has positions for"
      f" {room}: set config.data.max_length={room} or lower."
    )
  highest = max(int(split.ids.max()) for split in data.tokens.values())
  if highest >= model.vocab_size:
    raise UserError(
      f"The tokenizer gave the id {highest}, but the model's vocabulary ends"
      f" before {model.vocab_size}: the two don't belong together."
    )


def introduction(run: Run, titles: Sequence[str]) -> list[str]:
  """What a run, or a group by its titles, is about to do, for a person."""
  config, counts, tokens = run.config, run.model.counts, run.data.tokens
  device = jax.devices()[0]
  trained = counts.adapter + counts.head
  cut = {name: t.truncated for name, t in tokens.items() if t.truncated}
  who = titles[0] if len(titles) == 1 else f"{len(titles)} members at once"
  shapes = " or ".join(map(str, run.data.train_layout.rows))
  lines = [
    f"{config.task}, {config.method} on {config.model.name},"
    f" {who}; {jax.device_count()} x {device.device_kind}",
    f"trained: adapter {counts.adapter:,}, head {counts.head:,} of"
    f" {trained + counts.frozen:,} ({trained / (trained + counts.frozen):.2%})",
    f"data: {len(tokens['train']):,} training examples in {run.epoch_steps}"
    f" steps an epoch, packed into {shapes} rows of"
    f" {run.data.train_layout.length} tokens",
    *_contractions(run),
    *run.model.notes,
  ]
  if len(titles) > 1:
    lines.append(f"members: {'; '.join(titles)}")
  if cut:
    texts = ", ".join(f"{n} of {len(tokens[s])} in {s}" for s, n in cut.items())
    lines.append(f"cut at {config.data.max_length} tokens: {texts}")
  return lines


def _contractions(run: Run) -> Iterator[str]:
  """How the adapter is multiplied at a usual batch's shape, in one line."""
  module, layout = run.model.module, run.data.train_layout
  if not isinstance(module, Adapted):
    return
  rows = layout.rows[len(layout.rows) // 2]
  a_shard = rows // batch_shards(run.mesh)
  plans = module.plans(**input_shapes(a_shard, layout.length, layout.slots))
  counts = Counter(plans.values())
  told = ", ".join(f"{plan} in {n}" for plan, n in counts.most_common())
  yield f"contraction at {rows} rows: {told} of {len(plans)} adapted products"


def about(run: Run, config: ConfigDict) -> dict[str, Any]:
  """What a result and an adapter's file say of the run that made them."""
  task = run.data.task
  return {
    "task": task.name,
    "method": config.method,
    "seed": config.seed,
    "base": config.model.name,
    "labels": list(task.labels),
    "score_name": task.metrics[0],
    "projection_digest": run.model.digest,
  }
