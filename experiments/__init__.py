"""Runnable experiments, one file each: `python -m experiments.NAME --help`."""

import jaxrm as jaxrm  # before transformers, which else advises to install PyTorch
