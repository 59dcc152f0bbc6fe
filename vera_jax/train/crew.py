"""The members that one compiled program trains, and their state on the devices.

What is trained, the optimiser's slots and numbers, the dropout keys and the
batches have a first axis, one slot a member. The base and the projections have
not, and in a crew of one nothing has: its program is that of a run alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from vera_jax.data.loader import (
  sample_batch,
  train_batches,
)
from vera_jax.data.packing import Batch
from vera_jax.train.member import Member
from vera_jax.train.run import Run, hyperparameters
from vera_jax.train.runtime import Background
from vera_jax.train.sharding import BATCH, portion_of, put, put_rows
from vera_jax.train.step import State, jit_member_step

Tree = Any
Passes = tuple[Batch, ...]


def behind_members(sharding: NamedSharding) -> NamedSharding:
  """The same placing behind a first axis, which no device splits."""
  return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))


class Crew:
  """One slot a member. A slot may be idle: computed, and read by nobody."""

  state: Tree  # a State, each leaf stacked

  def __init__(
    self,
    run: Run,
    members: Sequence[Member],
    states: Mapping[Member, State],
  ) -> None:
    """Stack the members' states; a slot without gets a copy of another's."""
    self.run, self.members = run, list(members)
    filler = next(iter(states.values()))
    self._alone = jax.tree.map(lambda leaf: leaf.sharding, filler)
    self._sharding = NamedSharding(run.mesh, BATCH)
    self._portion = portion_of(self._sharding)
    self.state = self._stack([states.get(m, filler) for m in members])
    configs = [member.config for member in members]
    self._keys = _stack([jax.random.key(config.seed) for config in configs])
    self._numbers = _stack(
      [jax.tree.map(np.float32, hyperparameters(config)) for config in configs]
    )
    self._step = jit_member_step(
      self.state,
      apply=run.model.module.apply,
      optimiser=run.optimiser,
      members=len(members),
    )
    self._programs = Background()
    self._take = jax.jit(_take, out_shardings=self._alone)

  def _stack(self, states: Sequence[State]) -> Tree:
    if len(states) == 1:
      return states[0]
    shardings = jax.tree.map(behind_members, self._alone)
    return jax.jit(lambda *s: _stack(s), out_shardings=shardings)(*states)

  def batches(self, start_step: int) -> Iterator[tuple[int, Passes]]:
    """Each member's own order, from any step."""
    tokens, layout = self.run.data.tokens["train"], self.run.data.train_layout
    seeds = [member.config.seed for member in self.members]
    settings: dict[str, Any] = {
      "batch_size": self.run.config.optim.batch_size,
      "start_step": start_step,
      "shard": self._portion,
    }
    own = seeds[0] if len(seeds) == 1 else seeds
    return train_batches(tokens, layout, seeds=own, **settings)

  def step(self, passes: Passes) -> dict[str, Array]:
    """Take a step; the figures are on the way when this returns."""
    self._compile(passes)
    self.state, metrics = self._step(
      self.state,
      self.run.model.frozen,
      put_rows(passes, self._split, self._portion),
      self._keys,
      self._numbers,
    )
    return metrics

  @property
  def _split(self) -> NamedSharding:
    """Where batches lie."""
    alone = len(self.members) == 1
    return self._sharding if alone else behind_members(self._sharding)

  def _compile(self, passes: Passes) -> None:
    """Wait for these passes' programs; the other shapes' come behind them."""
    rows = [self._portion.global_rows(b["labels"].shape[-2]) for b in passes]
    for count in (*rows, *self.run.data.train_layout.rows):
      self._programs.compile(count, partial(self._lower, count))
    for count in rows:
      self._programs.wait(count)

  def _lower(self, rows: int) -> Any:
    data = self.run.data
    batch = sample_batch(
      data.tokens["train"],
      data.train_layout,
      rows=rows,
      runs=None if len(self.members) == 1 else len(self.members),
    )
    frozen, own = self.run.model.frozen, (self._keys, self._numbers)
    return self._step.lower(frozen, put(batch, self._split), *own)

  def figures(
    self, metrics: Mapping[str, Array]
  ) -> Iterator[tuple[Member, dict[str, float]]]:
    """Each member's own; waits until they are there."""
    columns = {k: np.atleast_1d(np.asarray(v)) for k, v in metrics.items()}
    for place, member in enumerate(self.members):
      yield member, {name: float(x[place]) for name, x in columns.items()}

  def state_of(self, member: Member) -> State:
    """A member's state, as a run alone has it."""
    if len(self.members) == 1:
      return self.state
    return self._take(self.state, self.members.index(member))


def _stack(trees: Sequence[Tree]) -> Tree:
  """A first axis over the trees; none for a single one."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _take(tree: Tree, place: Int[Array, ""]) -> Tree:
  return jax.tree.map(lambda leaf: leaf[place], tree)
