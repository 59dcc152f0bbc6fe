"""Round-trip tests: an adapter through every format it can have."""
