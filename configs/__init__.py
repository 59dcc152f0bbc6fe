"""Settings of the experiments: names and numbers only."""
