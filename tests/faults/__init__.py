"""Fault tests: what a run survives, tried on real processes."""
