"""In how many bits products are made, decided here for all.

TPUs and GPUs multiply float32 numbers in fewer bits unless they are asked
not to: a TPU as bfloat16, a GPU perhaps as TF32. A step's products are left
at that: in bfloat16, which `config.model.dtype=auto` means there, nothing is
lost by it, and JAX_DEFAULT_MATMUL_PRECISION=highest asks for more. The adapted
weights, which are what an adapter means wherever it is merged or exported, are
made in float32 on every device.
"""

from functools import partial

import jax

exact = partial(jax.default_matmul_precision, "highest")
