"""The paper's Table 1, computed: parameters and bytes of LoRA and VeRA.

Counted from the shapes of the adapters' own leaves, without weights. The
paper's formulas are L (d + r) for VeRA, 2 L d r for LoRA (section 3.2), with L
adapted layers of width d; float32.
"""

from typing import Any

import pandas as pd

from vera_jax.adapters.counting import adapter_size
from vera_jax.adapters.interface import Target
from vera_jax.adapters.lora import lora
from vera_jax.adapters.vera import vera

BYTES = 4  # of a float32
UNITS = {"K": 1e3, "M": 1e6, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


# Each transformer's number of layers and width; two square projections per
# layer are adapted.
MODELS = {
  "RoBERTa-base": (12, 768),
  "RoBERTa-large": (24, 1024),
  "GPT-3": (96, 12288),
}
# The paper's numbers; its KB, MB and GB are powers of 1024.
PRINTED = """
RoBERTa-base   1    lora     36.8 K   144 KiB
RoBERTa-base   1    vera     18.4 K    72 KiB
RoBERTa-base   16   lora    589.8 K     2 MiB
RoBERTa-base   16   vera     18.8 K    74 KiB
RoBERTa-base   256  lora   9437.1 K    36 MiB
RoBERTa-base   256  vera     24.5 K    96 KiB
RoBERTa-large  1    lora     98.3 K   384 KiB
RoBERTa-large  1    vera     49.2 K   192 KiB
RoBERTa-large  16   lora   1572.8 K     6 MiB
RoBERTa-large  16   vera     49.5 K   195 KiB
RoBERTa-large  256  lora  25165.8 K    96 MiB
RoBERTa-large  256  vera     61.4 K   240 KiB
GPT-3          1    lora      4.7 M    18 MiB
GPT-3          1    vera      2.4 M   9.1 MiB
GPT-3          16   lora     75.5 M   288 MiB
GPT-3          16   vera      2.8 M  10.5 MiB
GPT-3          256  lora   1207.9 M   4.6 GiB
GPT-3          256  vera      8.7 M    33 MiB
"""


def parameters(method: str, model: str, rank: int) -> int:
  """Trained numbers on query and key, counted from the adapter's own leaves."""
  adapter = vera(rank) if method == "vera" else lora(rank)
  layers, width = MODELS[model]
  square = Target(width, width, (layers,))
  return adapter_size(adapter, {("query",): square, ("key",): square})


def table1() -> pd.DataFrame:
  """Ours beside the printed numbers, and where those contradict the formula.

  A printed number contradicts when it is further off than one in its last
  digit, so that rounded and cut numbers both pass.
  """
  rows = []
  for line in PRINTED.strip().splitlines():
    name, rank, method, *numbers = line.split()
    count = parameters(method, name, int(rank))
    row: dict[str, Any] = {"model": name, "rank": int(rank), "method": method}
    row |= {"parameters": count, "bytes": BYTES * count}
    for what, number, unit in (
      ("parameters", *numbers[:2]),
      ("bytes", *numbers[2:]),
    ):
      paper = float(number) * UNITS[unit]
      last_digit = UNITS[unit] / 10 ** len(number.partition(".")[2])
      row[f"paper_{what}"] = paper
      row[f"printed_{what}"] = f"{number} {unit}"
      row[f"{what}_contradict"] = abs(paper - row[what]) > last_digit
    rows.append(row)
  return pd.DataFrame(rows)
