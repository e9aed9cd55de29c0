"""What a gate is worth: ArmoRM's on the synthetic world, where what prompts call for is known.

Run:     python -m experiments.pretrain; python -m experiments.quickstart
         python -m experiments.armorm_world               # what is missing, then the tables
         python -m experiments.armorm_world --only_table  # from experiments/results/armorm_gate
Cost:    about 10 minutes on two CPU cores, after the first line
Expect:  the tables of the gate in BENCHMARKS.md

*Routing*: five categories of prompts whose preferences weigh the objectives differently; most
ratings are missing. *Length*: raters like length in every objective, and preferences do not know
it. Every seed has its own prompts, ratings and pairs; a cell is one seed, kept as JSON.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import armorm, common, devices, gating
from jaxrm import evaluate, features, statistics, tokens, tree

RESULTS = Path(__file__).parent / 'results' / 'armorm_gate'
Array = np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gating.Gating, devices.Devices):
    language_model: str = 'runs/pretrain/model'  # the frozen decoder
    reward_model: str = 'runs/quickstart/model'  # another, which knows the preferences (seed 0)
    features: Path = Path('runs/armorm')
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    length_bias: float = 1.0
    train_batch_size: int = 512
    gating_hidden_dim: int = 128
    initial_scale: float = 10.0
    only_table: bool = False


class World(NamedTuple):
    """Sets of one seed with their features, and the head that was fitted to the ratings."""

    pairs: armorm.Set
    test: armorm.Set
    learnt: tuple[features.Cached, tokens.Tokens]
    held: tuple[features.Cached, tokens.Tokens]
    head: tree.Tree

    @property
    def biased(self) -> tree.Tree:
        """The head without its transform."""
        return {**self.head, 'transform': np.eye(len(self.head['transform']), dtype=np.float32)}


def made(c: Config, mesh: Any, base: str, seed: int, bias: float = 0.0) -> World:
    """Features and objectives of a seed, on the decoder that the flag `base` names."""
    folder = c.features / f'{base}_features'
    flags = armorm.Data(
        model_name_or_path=getattr(c, base), features=folder, seed=seed, length_bias=bias
    )
    found = armorm.compute(flags, mesh, ('ratings', 'pairs', 'test'))
    fitted = armorm.objectives(flags, found['ratings'], found['pairs'])
    learnt, held = (
        (features.gather(folder, found[n].tokens), found[n].tokens) for n in ('pairs', 'test')
    )
    return World(found['pairs'], found['test'], learnt, held, fitted.head)


def gated(
    c: Config, mesh: Any, w: World, head: tree.Tree, *, seed: int, axis: int = -1,
    shuffle: bool = False,
) -> tuple[Array, dict[str, float]]:  # fmt: skip
    """Scores [c] of the held-out answers by a gate that learned, and what the gate is like."""
    learnt, held = w.learnt, w.held
    if shuffle:
        rng = np.random.default_rng(seed)
        learnt, held = (
            (of._replace(prompt_nD=rng.permutation(of.prompt_nD)), some)
            for of, some in (learnt, held)
        )
    rm, params = gating.learn(c, head, *learnt, mesh=mesh, seed=seed, axis=axis)
    gate = jax.device_get(params['gate'])
    about = {'scale': float(gate['scale'][0])}
    if axis == -1:
        weight_nJ = rm.head.gate.apply({'params': gate}, held[0].prompt_nD)
        about['in use'] = in_use(np.asarray(weight_nJ) / about['scale'])
    return gating.scores(rm, params, *held, mesh), about


def in_use(share_nJ: Array) -> float:
    """How many objectives a prompt's score is made of: the exponential of the mean entropy."""
    entropy_n = -(share_nJ * np.log(np.maximum(share_nJ, 1e-12))).sum(-1)
    return float(np.exp(entropy_n.mean()))


def routing(c: Config, mesh: Any, base: str, seed: int) -> dict[str, Any]:
    """A cell: the gate, what it might be worth without reading prompts, and its ceilings."""
    w = made(c, mesh, base, seed)
    plain, from_one = w.biased, dataclasses.replace(c, initial_scale=1.0)
    learned = {
        'gate': gated(c, mesh, w, plain, seed=seed),
        'gate, shuffled prompts': gated(c, mesh, w, plain, seed=seed, shuffle=True),
    }
    if base == 'language_model':
        learned |= {
            'gate from scale 1': gated(from_one, mesh, w, plain, seed=seed),
            'gate with the transform': gated(c, mesh, w, w.head, seed=seed),
            'softmax over the pair': gated(c, mesh, w, plain, seed=seed, axis=-2),
        }
    fixed = gating.alike(plain, w.learnt, w.held) | by_category(w)
    cell = {name: {'right': digits(x_c, w), **about} for name, (x_c, about) in learned.items()}
    return cell | {name: {'right': digits(x_c, w)} for name, x_c in fixed.items()}


def by_category(w: World) -> dict[str, Array]:
    """Scores [c] of the held-out answers by weights that are told the prompt's category."""
    of, on = (np.array([s.records[i].group for i in s.tokens.record]) for s in (w.pairs, w.test))
    count_n = np.diff(w.pairs.tokens.first)
    rate_cJ, held_cJ = (gating.rates(w.biased, x[0]) for x in (w.learnt, w.held))
    weight_nJ = np.zeros((len(on), rate_cJ.shape[1]))
    for category in set(on):
        here_c = np.repeat(of == category, count_n)
        own = w.pairs.tokens._replace(rank=np.where(here_c, w.pairs.tokens.rank, 0))
        weight_nJ[on == category] = gating.best_weights(rate_cJ, own)
    true_nJ = np.stack([armorm.weights(category) for category in on])
    each = lambda x_nJ: np.repeat(x_nJ, np.diff(w.test.tokens.first), axis=0)  # noqa: E731
    return {
        'best weights of the category': (held_cJ * each(weight_nJ)).sum(1),
        'true weights of the category': (held_cJ * each(true_nJ)).sum(1),
        'true weights, true ratings': (np.nan_to_num(w.test.tokens.rating) * each(true_nJ)).sum(1),
    }


def length(c: Config, mesh: Any, base: str, seed: int) -> dict[str, Any]:
    """A cell: scores with and without the transform where raters like length."""
    w = made(c, mesh, base, seed, c.length_bias)
    cell = {}
    for what, head in (('', w.biased), (' with the transform', w.head)):
        score = {'gate': gated(c, mesh, w, head, seed=seed)[0]}
        score |= gating.alike(head, w.learnt, w.held)
        for name, x_c in score.items():
            cell[name + what] = {'right': digits(x_c, w), **liking(x_c, w)}
    return cell


def digits(score_c: Array, w: World) -> str:
    """Which of the held-out pairs are right, a digit each."""
    return ''.join(str(int(x)) for x in gating.right(score_c, w.test.tokens))


def liking(score_c: Array, w: World) -> dict[str, float]:
    """Correlation of score and length: over all answers, and of the differences in a pair."""
    length_c = evaluate.lengths(w.test.tokens).astype(float)
    gap, longer = (x_c[0::2] - x_c[1::2] for x_c in (score_c, length_c))
    within = statistics.pearson(np.concatenate([gap, -gap]), np.concatenate([longer, -longer]))
    return {'spearman': statistics.spearman(score_c, length_c), 'within': within}


PARTS = {
    'routing-language_model': routing,
    'routing-reward_model': routing,
    'length-language_model': length,
}


def learn(c: Config) -> None:
    """Every cell that has no result yet."""
    mesh = devices.mesh(c)
    for seed in c.seeds:
        for part, fn in PARTS.items():
            path = RESULTS / f'{part}-{seed}.json'
            if not path.exists():
                cell = fn(c, mesh, part.partition('-')[2], seed)
                common.write_json(path, {'flags': flags(c), 'rows': cell})


def flags(c: Config) -> dict[str, Any]:
    """Those that a cell depends on."""
    names = [f.name for f in dataclasses.fields(gating.Gating)]
    return {name: getattr(c, name) for name in (*names, 'length_bias')}


def cells(c: Config, part: str) -> list[Mapping[str, Any]]:
    """The rows of each that there is; ValueError for one of other flags."""
    out = []
    for path in (RESULTS / f'{part}-{seed}.json' for seed in c.seeds):
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        if found['flags'] != flags(c):
            raise ValueError(f'{path}: is of a run with {found["flags"]}, not {flags(c)}')
        out.append(found['rows'])
    return out


def table(c: Config, part: str) -> None:
    """Accuracy over the held-out prompts of all seeds, and what the gate adds to each row."""
    found = cells(c, part)
    if not found:
        return
    right = {k: [np.array(list(cell[k]['right']), float) for cell in found] for k in found[0]}
    rows = {}
    for name, seeds in right.items():
        means, all_n = [x.mean() for x in seeds], np.concatenate(seeds)
        above = evaluate.paired(np.concatenate(right['gate']), all_n) if name != 'gate' else ''
        notes = {k: np.mean([cell[name][k] for cell in found]) for k in found[0][name]
                 if k != 'right'}  # fmt: skip
        rows[name] = [
            evaluate.interval(all_n), f'{min(means):.3f} to {max(means):.3f}', above,
            ', '.join(f'{k} {x:.2f}' for k, x in notes.items()),
        ]  # fmt: skip
    columns = ['accuracy', 'over seeds', 'gate - this', 'mean over seeds']
    common.table(f'{part}, {len(found)} seeds', rows, columns, paste=True)


def main(c: Config) -> None:
    """Learn, then print."""
    if not c.only_table:
        learn(c)
    for part in PARTS:
        table(c, part)


if __name__ == '__main__':
    common.launch(Config, main)
