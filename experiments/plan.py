"""What a config's training step needs on a TPU pod that is not there.

  python -m experiments.plan --config=configs/rte.py:large --topology=v5e:16x16
  python -m experiments.plan --config=configs/rte.py --topology=v6e:2x4 \\
    --methods=vera --config.mesh.fsdp=2

Compiles the real step for the described chips (pip install libtpu; no TPU) and
prints what one chip holds, computes and sends, for vera, lora and full side by
side, the largest batch that fits, and the command that would train there. The
batch is config.optim.batch_size rows of one text each, config.data.max_length
tokens long, as if nothing could be packed; at least a row a chip.
"""

import os
import shlex
import sys
from typing import Any

from absl import flags
from rich.console import Console

from experiments import cli

CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string(
  "topology", "v5e:2x2", "Chips and how they lie: v5e:16x16, v6e:2x4, ..."
)
METHODS = flags.DEFINE_list(
  "methods", ["vera", "lora", "full"], "Side by side in the table."
)
ROWS = flags.DEFINE_integer(
  "rows", None, "Rows of the batch. Unset: config.optim.batch_size.", 1
)
SEARCH = flags.DEFINE_bool("search", True, "Find the largest batch.")
EFFORT = flags.DEFINE_float(
  "effort",
  0.0,
  "XLA's optimisation effort: -1 compiles sooner, plans worse.",
  -1,
  1,
)
OUT = flags.DEFINE_string("out", "results/plans", "Where the JSON goes.")


def main() -> None:
  config = cli.chosen(CONFIG)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no cloud for a TPU
  from benchmarks.plans import report  # after the flags' errors
  from benchmarks.plans.chips import describe_pod
  from benchmarks.plans.figures import plan
  from vera_jax.train.config import check_settings

  pod = describe_pod(TOPOLOGY.value)
  made: dict[str, Any] = {}
  for method in METHODS.value:
    chosen = config.copy_and_resolve_references()
    chosen.method = method
    check_settings(chosen)
    made[method] = plan(
      chosen,
      pod,
      rows=ROWS.value,
      search=SEARCH.value,
      effort=EFFORT.value,
    )
    about = report.about(config, pod, shlex.join(sys.argv[1:]))
    path = report.write({**about, "methods": made}, folder=OUT.value)
  console = Console()
  console.print(report.table(report.read(path)))
  console.print(report.notes(report.read(path)), markup=False, highlight=False)
  console.print(str(path), markup=False, highlight=False)


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
