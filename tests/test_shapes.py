"""Chosen pack shapes hold every record, and hold them tightly."""

import numpy as np
import plain
import pytest

from jaxrm import packing, shapes, tokens


@pytest.mark.parametrize('seed', range(6))
def test_fit_gives_a_shape_that_holds_every_record(seed):
    rng = np.random.default_rng(seed)
    M = rng.integers(0 if seed else 2, 5, 60)
    t = plain.random_tokens(M, seed=seed, prompt=(1, 60), own=(1, 200 if seed % 2 else 20))
    shape = shapes.fit(t, size=512, multiple=16)
    packing.check_fits(t, shape)
    assert [s for _, s in shape.rows] == sorted({s for _, s in shape.rows})
    assert all(s % 16 == 0 and r > 0 for r, s in shape.rows)
    assert shape.tokens % 16 == 0
    assert shape.tokens >= 512
    packs = packing.plan(t, shape, order=np.arange(60))
    assert sum(map(len, packs)) == 60


def test_fit_packs_well_and_refuses_nothing():
    rng = np.random.default_rng(0)
    t = plain.random_tokens(np.full(600, 2), prompt=(10, 40), own=(5, 30))
    shape = shapes.fit(t, size=1024, multiple=8)
    packs = packing.plan(t, shape, order=rng.permutation(600))
    assert len(t.ids) / (len(packs) * shape.tokens) > 0.93
    one = plain.random_tokens([3], prompt=(100, 101), own=(50, 51))
    packing.check_fits(one, shapes.fit(one, size=8, multiple=8))
    with pytest.raises(ValueError, match='no record'):
        shapes.fit(tokens.select(one, []), size=8)
