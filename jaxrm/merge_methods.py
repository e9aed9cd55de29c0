"""The ways to merge: what each is called, takes, and is computed by."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxrm import merge_dense, merge_sparse


class Parameter(NamedTuple):
    """What a method can be told: one value an input if `each` (the base has none), else one.

    Without a default (None) it has to be given. `kind` is float, int, bool, or the tuple of the
    values that it may have; numbers are not below `least` nor above `most`.
    """

    default: float | int | bool | str | None = None
    each: bool = False
    kind: Any = float
    least: float = -math.inf
    most: float = math.inf


class Method(NamedTuple):
    """A row of METHODS; `base` is 'required', 'optional' or 'none' (refused).

    `merge` is called with the inputs, the base, the result's dtype and all parameters; of a method
    that is `random`, or may be, also with name, seed and masks. `check` is called with all
    parameters, and raises ValueError for those that do not go together.
    """

    merge: Callable[..., jax.Array]
    parameters: Mapping[str, Parameter]
    base: str = 'none'
    least: int = 1  # inputs besides the base
    most: int | None = None
    random: bool = False
    check: Callable[..., None] = lambda **_: None


WEIGHT = Parameter(each=True)
RESCALE = (False, True, 'none', 'l1', 'inverse_density')  # False is 'none', True is 'l1'
NO, YES = Parameter(False, kind=bool), Parameter(True, kind=bool)


def _family(
    drop: str | None, *, normalize: bool = False, rescale: bool = False, ties: bool = False
) -> Method:
    """Task arithmetic or one of its sparse kin, which take alike parameters."""
    parameters = {
        'weight': WEIGHT,
        'density': Parameter(1.0, each=True, least=0, most=1),
        'normalize': Parameter(normalize, kind=bool),
        'rescale': Parameter(rescale, kind=RESCALE),
        'lambda': Parameter(1.0),
    }
    if drop == 'extremes':
        parameters['gamma'] = Parameter(0.01, each=True, least=0, most=1)
    if drop == 'rank':
        parameters['epsilon'] = Parameter(0.15, each=True, least=0, most=0.5)
    if ties:
        parameters['sign'] = Parameter('sum', kind=('sum', 'count'))

    def merge(xs, base, dtype, **given):
        scale = given.pop('lambda')
        return merge_sparse.merge(xs, base, dtype, drop=drop, scale=scale, **given)

    def check(*, density, epsilon=(), **_):
        if drop == 'rank':
            merge_sparse.check_epsilon(density, epsilon)

    return Method(merge, parameters, 'required', random=True, check=check)


METHODS: dict[str, Method] = {
    'linear': Method(
        merge_dense.linear,
        {'weight': WEIGHT, 'normalize': YES},
        check=lambda weight, normalize: merge_dense.check_sum(weight, normalize),
    ),
    'warm': Method(merge_dense.average, {}),
    'passthrough': Method(merge_dense.passthrough, {'scale': Parameter(1.0, each=True)}, most=1),
    'slerp': Method(merge_dense.slerp, {'t': Parameter()}, 'required', most=1),
    'nuslerp': Method(
        merge_dense.nuslerp,
        {'weight': WEIGHT, 'nuslerp_row_wise': NO, 'nuslerp_flatten': YES},
        'optional',
        least=2,
        most=2,
    ),
    'multislerp': Method(
        merge_dense.multislerp,
        {'weight': WEIGHT, 'normalize_weights': YES, 'eps': Parameter(1e-8, least=0)},
        'optional',
        check=lambda weight, normalize_weights, **_: merge_dense.check_sum(
            weight, normalize_weights
        ),
    ),
    'karcher': Method(
        merge_dense.karcher,
        {'max_iter': Parameter(10, kind=int, least=0), 'tol': Parameter(1e-5, least=0)},
    ),
    'model_stock': Method(merge_dense.model_stock, {'filter_wise': NO}, 'required', least=2),
    'task_arithmetic': _family(None),
    'ties': _family('smallest', normalize=True, ties=True),
    'dare_linear': _family('chance', rescale=True),
    'dare_ties': _family('chance', rescale=True, ties=True),
    'breadcrumbs': _family('extremes'),
    'breadcrumbs_ties': _family('extremes', ties=True),
    'della': _family('rank', normalize=True, rescale=True, ties=True),
    'della_linear': _family('rank', rescale=True),
}
