"""What is read out of finished runs: tables, tests, figures, adapters.

  load_sweep      a folder's results as a Sweep: one DataFrame, a row a run
  summary         a row a condition: median, spread, paper, significance
  signatures      what failed runs look like
  figures         every figure that a sweep's results give
  adapter_norms   the norms of d and b, layer by layer
  spectra         singular values of the merged delta, layer by layer
  table1          parameters and bytes, from shapes (the paper's Table 1)

Nothing but `spectra` and predictions needs the base's weights.
"""

from vera_jax.adapters.norms import adapter_norms
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
