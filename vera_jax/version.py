"""The version of vera_jax, as results and adapters name it."""

__version__ = "0.1.0"
