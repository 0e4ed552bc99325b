"""Benchmarks: each module is a command, `python -m benchmarks.decode --help`; results go to `benchmarks/results/`."""
