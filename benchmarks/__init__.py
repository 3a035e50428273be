"""Benchmarks: ``python -m benchmarks.run --help``. The method is in README.md."""
