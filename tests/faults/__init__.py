"""The faults that `tests.faults.run` tries, and what they are tried on."""
