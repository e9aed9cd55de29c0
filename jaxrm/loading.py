"""Any reward model from a folder or the hub, whatever it is made of."""

from pathlib import Path
from typing import Any

from jaxrm import mixture_files, routed, scorer


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    normalise: bool = False,
    **options: Any,
) -> scorer.Scorer | routed.Routed:
    """`scorer.load`, or of a DMoERM's folder `routed.load`; both score conversations.

    `normalise` takes the mean of a category's scores from each and divides by their spread, as
    measured when the DMoERM was made. Raises ValueError for what such a model does not have.
    """
    if mixture_files.is_one(path):
        if base is not None:
            raise ValueError(f'{path}: found a DMoERM, expected no base to go with it')
        return routed.load(path, normalise=normalise, **options)
    if normalise:
        raise ValueError(f'{path}: found no DMoERM, and other models have no normaliser')
    return scorer.load(path, base=base, **options)
