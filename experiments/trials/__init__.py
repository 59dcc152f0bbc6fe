"""The faults that `experiments.faults` tries, and what they are tried on."""
