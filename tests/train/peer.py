"""One of several processes of a run that computes next to nothing.

python -m tests.train.peer COORDINATOR COUNT NUMBER FOLDER [MISHAP]

With a mishap it has that one after a few steps: read (a batch never comes),
mistake (a UserError), crash (any other error). Exits as the commands do.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jax.experimental import multihost_utils

from experiments import cli
from vera_jax.errors import UserError
from vera_jax.train import peers
from vera_jax.train.distributed import initialize
from vera_jax.train.peers import errors_in, leave, read_next

STEPS = 5  # before the mishap
peers.LOST = peers.STUCK = 20.0  # seconds; half of a run's


def main() -> None:
  coordinator, processes, number, folder, *mishap = sys.argv[1:]
  initialize(coordinator, int(processes), int(number))

  def batches() -> Iterator[int]:
    step = 0
    while True:
      if step == STEPS and mishap == ["read"]:
        time.sleep(1e6)
      if step == STEPS and mishap == ["mistake"]:
        raise UserError("A mistake of the user's.")
      if step == STEPS and mishap == ["crash"]:
        raise ZeroDivisionError("A mistake of ours.")
      yield step
      step += 1

  with errors_in(Path(folder), Path(folder, "another run")):
    steps = batches()
    while True:
      step = read_next(steps)
      multihost_utils.process_allgather(np.int32(step))
      print("step", step, flush=True)
      time.sleep(0.1)


if __name__ == "__main__":
  leave(cli.exit_code(main))
