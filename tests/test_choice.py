"""The checkpoint of the step that did best, by a loss or by what is to be high."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrm import logs, resume, sharding, train

LOSS = [0.4, 0.9, 0.2, math.nan, 0.2, 0.6]
LINES = [
    line
    for step, loss in enumerate(LOSS, 1)
    for line in (
        {'step': step, 'loss': 9.0 - step},
        {'step': step, 'eval_loss': loss, 'eval_accuracy': loss},
    )
]


def test_a_loss_is_best_where_it_is_least():
    assert logs.best(LINES, 'eval_loss') == 3  # the first of two
    assert logs.best(LINES, 'eval_accuracy') == 2
    assert logs.best(LINES, 'eval_accuracy', greater_is_better=False) == 3
    assert logs.best(LINES, 'eval_loss', greater_is_better=True) == 2
    assert logs.best(LINES, 'loss') == 6
    assert logs.best(LINES[:2], 'eval_loss') == 1  # where it began counts
    with pytest.raises(ValueError, match="no value of 'eval_margin'"):
        logs.best(LINES, 'eval_margin')
    with pytest.raises(ValueError, match="no value of 'eval_loss'"):
        logs.best(LINES[7:8], 'eval_loss')


def test_the_checkpoint_of_that_step_comes_back(tmp_path):
    tx, mesh = optax.adam(0.1), sharding.make_mesh(data=1, devices=jax.devices()[:1])

    def fresh():
        return train.start({'head': {'kernel': jnp.ones((4, 1))}}, tx, mesh)

    state = fresh()
    with resume.Saver(tmp_path, steps=6, every=1, run={}, keep=6) as saver:
        for done in range(1, 7):
            state = jax.tree.map(lambda x: x + 1, state)
            saver(done, state, {})
    assert resume.steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    found = resume.restore(tmp_path, fresh(), step=logs.best(LINES, 'eval_loss'))
    np.testing.assert_array_equal(found.trainable['head']['kernel'], np.full((4, 1), 4))
    assert int(found.step) == 3
    assert int(resume.restore(tmp_path, fresh()).step) == 6
    with pytest.raises(ValueError, match=r'steps \[1, 2, 3, 4, 5, 6\], expected 7'):
        resume.restore(tmp_path, fresh(), step=7)
