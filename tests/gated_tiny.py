"""The gated checkpoints of tests/goldens/gated, loaded once, and conversations for them."""

import functools
import json

import jax
import numpy as np
from torch_goldens import GOLDENS, golden, load, token_trees

import jaxrm
from jaxrm import heads, packing
from jaxrm.backbones.layers import Decoder
from jaxrm.data import Preference
from jaxrm.reward import RewardModel

GATED = GOLDENS.parent / 'gated'
TALKS = json.loads((GATED / 'k19.json').read_text())


@functools.cache
def loaded():
    return jaxrm.load(GATED / 'k19', dtype='float32')


def talk(*turns, system=None):
    roles = ('user', 'assistant') * len(turns)
    messages = [{'role': r, 'content': t} for r, t in zip(roles, turns, strict=False)]
    return [{'role': 'system', 'content': system}, *messages] if system else messages


def record(talk):
    return Preference(tuple(talk[:-1]), (talk[-1]['content'],))


def assert_near(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@functools.cache
def five():
    """The model of 5 objectives, jitted, and the golden rows padded."""
    p, case = load(GATED / 'k5'), golden(GATED / 'k5')
    head = {**p.head, 'gate': p.gate}
    model = RewardModel(Decoder(p.config), heads.of('gated', p.config, head, temperature=2.5))
    trees = token_trees(case)._replace(gate=case['gate'])
    rows = packing.padded(trees, np.arange(4), case['ids_BS'].shape)
    both = jax.jit(lambda params, pack: (model.features(params, pack), model.parts(params, pack)))
    return p, case, trees, rows, both
