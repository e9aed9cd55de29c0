"""Runnable experiments, one file each: `python -m experiments.NAME --help`."""
