"""Gates that differ from ArmoRM's in one thing, and the synthetic worlds in which they learn."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from experiments import armorm, gating
from jaxrm import features, regress, tree

Array = np.ndarray


class Variant(NamedTuple):
    """A gate, by what sets it apart from the one that is named `gate`."""

    head: str = 'plain'  # one of a World's
    shuffled: bool = False  # it reads other prompts than those of the pairs
    last: bool = False  # it reads the last token of each answer
    scale: float | None = None  # to start from
    flags: Mapping[str, Any] = {}  # other flags of Gating


VARIANTS = {
    'gate': Variant(),
    'gate, shuffled prompts': Variant(shuffled=True),
    'gate on the last token': Variant(last=True),
    'gate, temperature 1': Variant(flags={'gating_temperature': 1.0}),
    'gate, scale from 1': Variant(scale=1.0),
    'gate, scale frozen at 1': Variant(flags={'initial_scale': 1.0, 'learn_scale': False}),
    'gate, one alpha for all': Variant('one alpha'),
    'gate with the transform': Variant('transform'),
    'gate with a transform by Pearson': Variant('by Pearson'),
    'softmax over the pair': Variant(flags={'script_softmax': True}),
}


class World(NamedTuple):
    """Sets of one seed with their features, and heads that were fitted to the ratings."""

    seed: int
    pairs: armorm.Set
    test: armorm.Set
    learnt: features.Cached
    held: features.Cached
    heads: dict[str, tree.Tree]

    def rated(self, head: str, *, script: bool = False) -> list[gating.Pairs]:
        """Ratings of the pairs to learn from and of the held-out ones."""
        each = (self.learnt, self.pairs.tokens), (self.held, self.test.tokens)
        return [(gating.rated(self.heads[head], of, script=script), some) for of, some in each]


def made(c: armorm.Data, mesh: Any) -> World:
    """Features and objectives of a seed of the synthetic world."""
    found = armorm.compute(c, mesh, ('ratings', 'pairs', 'test'))
    fit = lambda **how: armorm.objectives(c, found['ratings'], found['pairs'], **how).head  # noqa: E731
    heads = {
        'plain': fit(debias=False),
        'one alpha': fit(debias=False, shared_alpha=True),
        'transform': fit(),
        'by Pearson': fit(correlation=regress.pearson),
    }
    pairs, test = found['pairs'], found['test']
    learnt, held = (features.gather(c.features, some.tokens) for some in (pairs, test))
    return World(c.seed, pairs, test, learnt, held, heads)


def both(w: World, v: Variant) -> list[gating.Pairs]:
    """What a gate learns from and is tested on."""
    rng, out = np.random.default_rng(w.seed), []
    rated = w.rated(v.head, script='script_softmax' in v.flags)
    for pairs, raw in zip(rated, (w.learnt, w.held), strict=True):
        of, some = gating.shuffled(pairs, rng) if v.shuffled else pairs
        if v.last:
            of = of._replace(answer_cD=np.concatenate([of.answer_cD, raw.answer_cD], axis=1))
        out.append((of, some))
    return out


def by_answer(rm: Any) -> gating.Score:
    """score_BM of weights that are those of each answer, whose features follow its ratings."""
    gate = rm.head.gate

    def score(params: tree.Tree, of: features.Batch, *, dropout: float = 0.0, key: Any = None):
        rate, z = of.answer_PBMD[..., : gate.objectives], of.answer_PBMD[..., gate.objectives :]
        rngs = {'dropout': key} if dropout else None
        weight = gate.apply({'params': params['gate']}, z, dropout=dropout, rngs=rngs)
        return rearrange((rate * weight).sum(-1), 'p b m -> (p b) m')

    return score


def learned(
    c: gating.Gating, mesh: Any, worlds: Sequence[World], names: Sequence[str]
) -> list[dict[str, tuple[Array, dict[str, float]]]]:
    """For each world the scores [c] of the held-out answers by each gate, and notes on the gate.

    The gates of all worlds, and of all variants with the same flags, learn in one program.
    """
    out: list[dict[str, tuple[Array, dict[str, float]]]] = [{} for _ in worlds]
    programs = lambda name: (str(VARIANTS[name].flags), VARIANTS[name].last)  # noqa: E731
    for _, group in itertools.groupby(sorted(names, key=programs), programs):
        tasks = [(i, name, both(w, VARIANTS[name])) for name in group for i, w in enumerate(worlds)]
        flags, last = VARIANTS[tasks[0][1]].flags, VARIANTS[tasks[0][1]].last
        how = {'mesh': mesh, 'score': by_answer if last else gating.by_prompt}
        lessons = [gating.Lesson(*learnt, worlds[i].seed, VARIANTS[name].scale)
                   for i, name, (learnt, _) in tasks]  # fmt: skip
        J = next(iter(worlds[0].heads.values()))['transform'].shape[0]
        rm, gates = gating.learn(dataclasses.replace(c, **flags), lessons, J, **how)
        for (i, name, (_, held)), gate in zip(tasks, gates, strict=True):
            about = {'scale': float(gate['scale'][0])}
            if not last and 'script_softmax' not in flags:
                weight_nJ = rm.head.gate.apply({'params': gate}, held[0].prompt_nD)
                about['in use'] = in_use(np.asarray(weight_nJ) / about['scale'])
            out[i][name] = gating.scores(rm, gate, held, **how), about
    return [{name: found[name] for name in names} for found in out]


def in_use(share_nJ: Array) -> float:
    """How many objectives a prompt's score is made of: the exponential of the mean entropy."""
    entropy_n = -(share_nJ * np.log(np.maximum(share_nJ, 1e-12))).sum(-1)
    return float(np.exp(entropy_n.mean()))


def by_category(w: World) -> dict[str, Array]:
    """Scores [c] of the held-out answers by weights that are told the prompt's category."""
    of, on = (np.array([s.records[i].group for i in s.tokens.record]) for s in (w.pairs, w.test))
    (learnt, some), (held, held_tokens) = w.rated('plain')
    each = lambda x_nJ: np.repeat(x_nJ, np.diff(held_tokens.first), axis=0)  # noqa: E731
    best = {negative: np.zeros((len(on), held.answer_cD.shape[1])) for negative in (False, True)}
    for category, negative in itertools.product(set(on), best):
        here_c = np.repeat(of == category, np.diff(some.first))
        own = some._replace(rank=np.where(here_c, some.rank, 0))
        found = gating.best_weights(learnt.answer_cD, own, negative=negative)
        best[negative][on == category] = found
    true_nJ = np.stack([armorm.weights(category) for category in on])
    return {
        'best weights of the category': (held.answer_cD * each(best[False])).sum(1),
        'best of the category, any sign': (held.answer_cD * each(best[True])).sum(1),
        'true weights of the category': (held.answer_cD * each(true_nJ)).sum(1),
        'true weights, true ratings': (np.nan_to_num(held_tokens.rating) * each(true_nJ)).sum(1),
    }
