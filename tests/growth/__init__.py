"""Growth over time, measured; `python -m tests.growth` is the long form."""
