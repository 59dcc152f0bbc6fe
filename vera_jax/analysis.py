"""The old name of `vera_jax.report`."""

import sys

from vera_jax import report

sys.modules[__name__] = report
