"""The step as the loop calls it: with batches as the data give them."""

from collections.abc import Hashable, Sequence

import numpy as np
from jax import Array

from vera_jax.data.packing import Batch
from vera_jax.pretrained.sharding import RUNS
from vera_jax.train.clock import Clock
from vera_jax.train.distributed import are_several
from vera_jax.train.preemption import Stop
from vera_jax.train.setup import Setup
from vera_jax.train.step import Metrics, State
from vera_jax.train.trainable import Trainable


class PreparedStep:
  """(state, microbatches of the host) -> (state, metrics); donates the state.

  The metrics have two more than the step gives, known on the host: `tokens`,
  those of the texts and not of padding, 0 for images, and `flops`, of the
  program, which an ensemble's runs share.

  It compiles for each shape of a microbatch in other threads: the shapes of the
  first step while nothing else can be done, the others while steps run, or as
  they come (`Background`).
  """

  def __init__(
    self,
    setup: Setup,
    run: Trainable,
    state: State,
    clock: Clock,
    stop: Stop,
  ) -> None:
    """Prepare steps of `run` from states like this one."""
    self._setup, self._run, self._size = setup, run, run.size
    self._clock, self._stop = clock, stop
    self._compiled: set[Hashable] = set()
    self._step = setup.make_step(state, runs=run.size)
    self._is_first = True

  def __call__(
    self, state: State, microbatches: Sequence[Batch]
  ) -> tuple[State, Metrics]:
    setup, is_first = self._setup, self._is_first
    placed = [setup.put_batch(each, runs=self._size) for each in microbatches]
    shapes = [self._compile_for(batch) for batch in placed]
    if is_first:  # programs are compiled in the order of asking: these later
      for sample in setup.data.train_samples(runs=self._size):
        self._compile_for(setup.put_sample(sample, runs=self._size))
    if not is_first:  # all of the first step's time is for compiling
      self._clock.took("steps")
    for shape in shapes:
      if shape not in self._compiled:
        self._stop.wait_for(setup.background, shape)
        self._compiled.add(shape)
    self._clock.took("compiling")
    state, metrics = self._step(
      state, setup.frozen, placed, self._run.key, self._run.rates
    )
    if are_several() and setup.mesh.shape[RUNS] > 1:
      # each process has the numbers of its own runs, and is to know of all;
      # asked at once, the answer is there before the next step's
      metrics = setup.replicated(metrics)
    if is_first:
      setup.compile_evaluation()
      self._is_first = False
    flops = sum(setup.background.flops[shape] for shape in shapes)
    each = np.zeros(() if self._size is None else self._size)
    return state, metrics | {
      "tokens": each + self._tokens(microbatches),
      "flops": each + flops,
    }

  def _tokens(self, microbatches: Sequence[Batch]) -> np.ndarray:
    """[*runs], in all processes as many as in this one's share of the rows."""
    shard = self._setup.data.shard
    here = [
      (batch["segment_ids"] > 0).sum((-2, -1))
      for batch in microbatches
      if "segment_ids" in batch
    ]
    return np.asarray(sum(here) * shard.of / (shard.last - shard.first))

  def _compile_for(self, batch: dict[str, Array]) -> Hashable:
    """Begin to compile for a microbatch's shape, which is returned."""
    shape = tuple(array.shape for array in batch.values())
    self._setup.background.compile(
      shape,
      lambda: self._step.trace(self._setup.frozen, batch, self._run.key),
    )
    return shape
