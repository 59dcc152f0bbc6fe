"""Scripts: flags and configs in, `vera_jax` does the work."""
