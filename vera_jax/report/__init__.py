"""What is read from finished runs: tables, tests, figures, adapters.

  load_sweep      a folder's results as a Sweep: a DataFrame with a row per run
  summary         one row per condition: median, spread, paper, significance
  signatures      the failures that a run shows
  adapter_norms   the norms of d and b, layer by layer
  spectra         singular values of the merged delta, layer by layer
  table1          parameters and bytes, from shapes (the paper's Table 1)

Tables are formatted in `tables`, figures drawn in `plots`. Only `spectra` and
predictions need the base's weights.
"""

from vera_jax.adapters.vector_norms import adapter_norms
from vera_jax.report.frame import Sweep, load_sweep
from vera_jax.report.signatures import signatures
from vera_jax.report.spectra import spectra
from vera_jax.report.summary import summary
from vera_jax.report.table1 import table1

__all__ = [
  "Sweep",
  "adapter_norms",
  "load_sweep",
  "signatures",
  "spectra",
  "summary",
  "table1",
]
