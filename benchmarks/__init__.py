"""What `python -m experiments.benchmark` measures: a module a subcommand."""
