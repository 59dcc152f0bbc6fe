"""What a config's training step needs on a TPU pod that is not there.

  python -m experiments.plan --config=configs/rte.py:large --topology=v5e:16x16
  python -m experiments.plan --config=configs/rte.py --topology=v6e:2x4 \\
    --methods=vera --config.mesh.fsdp=2
  python -m experiments.plan --config=configs/instruct.py:llama3_70b \\
    --topology=v5e:16x16 --methods=vera,frozen --effort=-1
  python -m experiments.plan --config=configs/rte.py --topology=v5e:2x4 \\
    --methods=vera --seeds=0,1,2,3,4

Compiles the real step for the described chips (pip install libtpu; no TPU) and
prints what one chip stores, computes and sends, for vera, lora, full and the
frozen network side by side, and the command that would train there. No weights
are needed where the model is a known one, and no data. The batch is
config.optim.batch_size rows of one text each, config.data.max_length tokens
long, as if nothing could be packed; at least one row per chip.

The mesh is the config's; where that is the default one, and the step would not
fit, it is searched (--mesh=search does so in any case).

With --seeds there is a column for each way to split the runs over the chips,
each step being one of all runs, beside that of one run on one chip.
"""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from experiments import cli
from vera_jax.adapters.methods import links_of
from vera_jax.errors import UserError
from vera_jax.places import place
from vera_jax.terminal import Console

FROZEN = "frozen"
CONFIG = cli.define_config()
TOPOLOGY = flags.DEFINE_string(
  "topology", "v5e:2x2", "Chips and their arrangement: v5e:16x16, v6e:2x4, ..."
)
METHODS = flags.DEFINE_list(
  "methods",
  ["vera", "lora", "full", "frozen"],
  "Side by side in the table; frozen: the network with a trained number per"
  " output of VeRA's layers.",
)
ROWS = flags.DEFINE_integer(
  "rows", None, "Rows of the batch. Unset: config.optim.batch_size.", 1
)
SEEDS = flags.DEFINE_list(
  "seeds", [], "Seeds that train at once. Unset: one run."
)
LEARNED = flags.DEFINE_integer(
  "learned", None, "Learned tokens of a row, of texts. Unset: all.", 1
)
LABELS = flags.DEFINE_integer(
  "labels",
  None,
  "Classes, where they are the data's own. Unset: reads the data.",
  1,
)
MESH = flags.DEFINE_enum(
  "mesh",
  None,
  ["config", "search"],
  "The config's mesh, or the one whose step is bounded by the fewest seconds."
  " Unset: the config's, unless that is the default one and the step on it"
  " would not fit.",
)
SEARCH = flags.DEFINE_bool(
  "search",
  None,
  "Find the largest batch, by five programs or so. Unset: for networks of less"
  " than 10^9 numbers.",
)
EFFORT = flags.DEFINE_float(
  "effort",
  0.0,
  "XLA's optimisation effort: -1 compiles sooner, plans worse.",
  -1,
  1,
)
MEMORY = flags.DEFINE_float(
  "memory",
  None,
  "GiB of temporaries that XLA plans for at most. It makes use of what a chip"
  " has, to send ahead of time, and does with less under a limit. Unset: all.",
  0.1,
)
OUT = flags.DEFINE_string("out", "results/plans", "Where the JSON goes.")


def main() -> None:
  config = cli.chosen(CONFIG)
  out = place(OUT.value)
  for method in METHODS.value:
    if method != FROZEN:
      links_of(method)
  # Imported only now: a mistake in the flags is reported without the wait.
  cli.say_importing()
  from experiments.plans import report
  from experiments.plans.chips import describe_pod, use_no_accelerator
  from experiments.plans.figures import plan
  from experiments.plans.frozen import frozen_network
  from vera_jax.files import read_json, write_json
  from vera_jax.train.config import check_settings

  use_no_accelerator()
  pod = describe_pod(TOPOLOGY.value)
  name = f"{Path(config.model.name).name}-{pod.name.replace(':', '-')}"
  if SEEDS.value:
    name = f"{len(SEEDS.value)}-runs-{name}"
  path = out / f"{name}.json"
  methods: dict[str, Any] = {}
  runs = len(SEEDS.value) or None
  for method in METHODS.value:
    chosen = config.copy_and_resolve_references()
    # the bias that the frozen network trains is in its method's place
    chosen.method = "head" if method == FROZEN else method
    check_settings(chosen)
    columns: dict[str, tuple[Any, ...]] = {method: (chosen, pod, None)}
    if runs:
      one = pod._replace(devices=pod.devices[:1])
      columns = {f"{method}, one run on one chip": (alone(chosen), one, None)}
      columns |= {
        f"{method}, {split}": (each, pod, runs)
        for split, each in splits(chosen, len(pod.devices))
      }
    for column, (settings, chips, together) in columns.items():
      methods[column] = plan(
        settings,
        chips,
        rows=ROWS.value,
        learned=LEARNED.value,
        labels=LABELS.value,
        runs=together,
        mesh_of=MESH.value,
        search=SEARCH.value,
        effort=EFFORT.value,
        memory=int(MEMORY.value * 2**30) if MEMORY.value else None,
        **(frozen_network(chosen) if method == FROZEN else {}),
      )
      # Written after each, so that an interrupted plan keeps the others.
      first = next(iter(methods.values()))
      about = report.metadata(
        config,
        pod,
        shlex.join(sys.argv[1:]),
        first["mesh"] if first["searched"] else None,
      )
      path.parent.mkdir(parents=True, exist_ok=True)
      write_json(path, {**about, "runs": runs, "methods": methods})
  result, console = read_json(path), Console()
  console.print(report.table(result))
  if runs:
    together = {k: x for k, x in methods.items() if "one run" not in k}
    console.print(f"fewest FLOPs a chip: {report.leanest(together)}")
  console.print(
    "To train there, on every host at once, with a folder that all see:\n"
    f"  {result['run']} --workdir=FOLDER\n{path}",
  )


def alone(config: ConfigDict) -> ConfigDict:
  """The config of a run on one device."""
  one = config.copy_and_resolve_references()
  one.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "runs": 1})
  return one


def splits(
  config: ConfigDict, devices: int
) -> Iterator[tuple[str, ConfigDict]]:
  """(a phrase, the config) for each division between `runs` and `data`."""
  if min(config.mesh.fsdp, config.mesh.tensor) < 1:
    raise UserError(
      "--seeds divides between runs and data what the other axes leave: give"
      " config.mesh.fsdp and config.mesh.tensor sizes of 1 or more."
    )
  left = devices // (config.mesh.fsdp * config.mesh.tensor)
  for parts in range(left, 0, -1):
    if left % parts == 0:
      each = config.copy_and_resolve_references()
      each.mesh.update({"runs": parts, "data": left // parts})
      yield f"runs={parts}, data={left // parts}", each


if __name__ == "__main__":
  cli.run(main, usage=__doc__)
