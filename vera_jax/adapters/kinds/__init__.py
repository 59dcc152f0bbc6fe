"""Kinds of layers beside flax's dense ones.

Each file registers how the kernel of its layers is seen as a matrix, and how
their product is made. Without a file, its layers are not adapted, and the rest
works.
"""

from vera_jax.adapters.kinds import cells, conv, derived, einsum, embed

__all__ = ["cells", "conv", "derived", "einsum", "embed"]
