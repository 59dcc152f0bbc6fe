"""What measures the library: `python -m benchmarks.NAME --help`."""
