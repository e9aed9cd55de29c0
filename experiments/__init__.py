"""Runnable experiments, one file each: `python -m experiments.NAME --help`."""

import os

# Before transformers is imported, which else advises to install PyTorch.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
