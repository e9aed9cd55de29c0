"""The numbers that raters use: ratings of other scales brought into (0, 1), and what is kept of it.

A scale that is given with ratings says how to bring them into (0, 1); one that is stored says what
to show a rating as, and of ratings that are in (0, 1) already nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrm.data import DataError, Loaded
from jaxrm.regress import Scale

Array = np.ndarray


def given(
    texts: Sequence[str], names: Sequence[str], flag: str = 'rating_scales'
) -> dict[str, Scale]:
    """Scales such as verbosity=0:4 by objective; ValueError naming the flag."""
    found: dict[str, Scale] = {}
    for text in texts:
        name, _, ends = text.partition('=')
        low, _, high = ends.partition(':')
        if ends and name not in names:
            raise ValueError(f'--{flag}: found {name!r}, expected one of {list(names)}')
        if name in found:
            raise ValueError(f'--{flag}: found {name!r} twice, expected one scale an objective')
        try:
            found[name] = Scale(float(low), float(high))
        except ValueError:
            expected = 'name=low:high, two finite numbers, the smaller one first'
            raise ValueError(f'--{flag}: found {text!r}, expected {expected}') from None
    return found


def stored(c: Any, names: Sequence[str]) -> dict[str, Scale]:
    """The scales that go with the head: those of the preset, and under them those of both flags."""
    flags = 'rating_scales', 'stored_scales'
    here, before = (given(getattr(c, flag), names, flag) for flag in flags)
    if both := sorted(here.keys() & before.keys()):
        raise ValueError(f'--stored_scales: found {both}, which --rating_scales gives, too')
    return {n: s for n, s in c.sources.scales.items() if n in names} | before | here


def check(found: Loaded, scales: Mapping[str, Scale]) -> None:
    """Raises DataError for a rating outside its scale, or outside 0 to 1 where it has none."""
    if not found.objectives:
        raise DataError(f'{found.where[0]}: found no ratings by name, expected --rating_columns')
    limits = [scales.get(name) or Scale(0, 1) for name in found.objectives]
    rated = [(w, row) for w, r in zip(found.where, found.records, strict=True)
             for row in r.ratings or ()]  # fmt: skip
    rating_cJ = np.array([row for _, row in rated], np.float64)
    low_J, high_J = (np.array([[getattr(x, end) for x in limits]]) for end in ('low', 'high'))
    bad_cJ = (rating_cJ < low_J) | (rating_cJ > high_J)
    if bad_cJ.any():
        c, j = np.argwhere(bad_cJ)[0]
        name = found.objectives[j]
        more = '' if name in scales else f', or its scale as --rating_scales {name}=low:high'
        raise DataError(
            f'{rated[c][0]}: {name}: found {rating_cJ[c, j]:g}, expected {limits[j]}{more}'
        )


def normalised(rating_cJ: Array, names: Sequence[str], scales: Mapping[str, Scale]) -> Array:
    """float64 ratings in (0, 1): by their scales, those that have one."""
    out = np.array(rating_cJ, np.float64)
    for name, scale in scales.items():
        j = list(names).index(name)
        out[:, j] = scale.normalised(out[:, j])
    return out
