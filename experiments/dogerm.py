"""What the experiments on merged reward models share: sweeps of shares, controls, tables, pictures.

The other model's share goes from 0, the reward model as it is, to 1, the other's backbone under the
reward model's head (DogeRM, arXiv 2407.01470).

Letters: S seeds, K shares, n records, c candidates, V tokens, D width.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import common
from experiments.separation import crossed, digits, of_digits, points
from jaxrm import (
    evaluate,
    fused,
    merge,
    report,
    reward,
    scorer,
    sharding,
    strength_report,
    sweep,
    tokens,
    tree,
    vocabulary,
)
from jaxrm.checkpoint import Pretrained, load_pretrained
from jaxrm.data import Preference

RESULTS = Path(__file__).parent / 'results'
Array = np.ndarray


def shares(steps: int) -> tuple[float, ...]:
    """From 0 to 1, both among them."""
    if steps < 2:
        raise ValueError(f'shares: found {steps}, expected at least 2, which are 0 and 1')
    return tuple(i / (steps - 1) for i in range(steps))


# Sweeps


class Swept(NamedTuple):
    """What a set's records are at every share."""

    right_Kn: Array
    mean_K: Array  # of the rewards
    std_K: Array


def right(score_Kc: Array, of: tokens.Tokens) -> Array:
    """[K, n] share of each record's pairs that are in order."""
    rank = evaluate.by_record(of.rank, of)
    scores = [evaluate.by_record(score_c, of) for score_c in score_Kc]
    return np.stack([evaluate.pairs(rank, each).accuracy for each in scores])


def swept(
    score: Any, params: tree.Tree, other: tree.Tree, of: tokens.Tokens, shape: Any,
    *, shares: Sequence[float], mesh: Any,
) -> Swept:  # fmt: skip
    """A set at every share, in one program; `score` is compiled."""
    packs = sharding.data_parallel(mesh)
    score_Kc = sweep.scores(score, params, other, of, shape, shares=shares, mesh=mesh, packs=packs)
    return Swept(right(score_Kc, of), *sweep.drift(score_Kc))


# Controls: what is not a model of the domain


def shuffled(backbone: tree.Tree, seed: int) -> tree.Tree:
    """The same layers in another order, in which none stands where it was."""
    flat = {k: np.asarray(x) for k, x in tree.flatten(backbone).items()}
    names = [name.removeprefix('top/') for name in flat if name.startswith('top/')]
    stacks = {n: np.concatenate([flat[f'layers/{n}'], flat[f'top/{n}'][None]]) for n in names}
    L, rng = len(stacks[names[0]]), np.random.default_rng(seed)
    cycle_L = rng.permutation(L)  # each takes the place of the next
    for x_L in stacks.values():
        x_L[cycle_L] = x_L[np.roll(cycle_L, 1)]
    for n, x_L in stacks.items():
        flat[f'layers/{n}'], flat[f'top/{n}'] = x_L[:-1], x_L[-1]
    return tree.unflatten(flat)


def noise(backbone: tree.Tree, other: tree.Tree, seed: int) -> tree.Tree:
    """As far from the backbone as the other, leaf by leaf, in a direction that means nothing."""
    rng, to = np.random.default_rng(seed), tree.flatten(other)

    def one(name: str, x: Any) -> Array:
        x = np.asarray(x, np.float32)
        step, far = rng.normal(size=x.shape), np.linalg.norm(np.asarray(to[name], np.float32) - x)
        return (x + far * step / np.linalg.norm(step)).astype(np.float32)

    return tree.map_named(one, backbone)


def permuted(params: tree.Tree, seed: int) -> tree.Tree:
    """The same function by other weights: hidden units, and those of the stream, in another order.

    Of a llama with a linear head; raises ValueError for leaves that those do not have.
    """
    rng, flat = np.random.default_rng(seed), tree.flatten(params)
    F = flat['backbone/top/down/kernel'].shape[0]
    D = flat['backbone/embed/embedding'].shape[1]
    stream_D, hidden_F = rng.permutation(D), rng.permutation(F)
    last = {'q|k|v': (stream_D, None), 'o': (None, stream_D), 'gate|up': (stream_D, hidden_F),
            'down': (hidden_F, stream_D)}  # fmt: skip

    def one(name: str, x: Any) -> Array:
        x = np.asarray(x)
        if re.search(r'embedding$|/(attn_norm|mlp_norm|norm)/scale$', name):
            return x[..., stream_D]
        if name.startswith('head/'):
            return x[stream_D]
        found = next((of for k, of in last.items() if re.search(rf'/({k})/kernel$', name)), None)
        if found is None:
            raise ValueError(f'{name}: found a leaf that is none of a llama')
        into, out = found
        x = x if into is None else x[..., into, :]
        return x if out is None else x[..., out]

    return tree.unflatten({name: one(name, x) for name, x in flat.items()})


# Two models, one vocabulary


def aligned(models: Sequence[Pretrained], names: Sequence[str]) -> tuple[list[tree.Tree], Any]:
    """Their backbones with the same rows, and the tokenizer; the first model's leads.

    Raises ValueError for models that compute different functions of the same weights; whether a
    head is the embedding is none of backbones.
    """
    tied = models[0].config.tied
    merge.check_configs([dataclasses.replace(m.config, tied=tied) for m in models], names)
    ids = [m.tokenizer.get_vocab() for m in models]
    tables = [m.backbone['embed']['embedding'] for m in models]
    sizes = [len(x) for x in tables]
    if all(x == ids[0] for x in ids) and len(set(sizes)) == 1:
        return [m.backbone for m in models], models[0].tokenizer
    plan = vocabulary.plan(ids, sizes, names=names)
    made = [vocabulary.table(plan, m, tables) for m in range(len(models))]
    out = [
        {**m.backbone, 'embed': {**m.backbone['embed'], 'embedding': x}}
        for m, x in zip(models, made, strict=True)
    ]
    return out, vocabulary.tokenizer(plan, [m.tokenizer for m in models])


class Mixed(NamedTuple):
    """A reward model that reads the common vocabulary, and what is mixed into it."""

    scorer: scorer.Scorer
    other: tree.Tree


def mixed(model: str, language_model: str) -> Mixed:
    """Of two folders; ValueError where they are not of one architecture."""
    loaded = scorer.load(model)
    decoder, params = loaded.model.backbone, fused.split(loaded.params)
    mine = Pretrained('', decoder.config, loaded.tokenizer, params['backbone'])
    theirs = load_pretrained(language_model, kind='backbone', dtype=mine.dtype)
    if theirs.tokenizer is None:
        raise ValueError(f'{language_model}: found no tokenizer')
    (backbone, other), tokenizer = aligned([mine, theirs], [model, language_model])
    config = dataclasses.replace(decoder.config, V=len(backbone['embed']['embedding']))
    rm = dataclasses.replace(loaded.model, backbone=decoder.clone(config=config))
    backbone, other = (sharding.place(x, loaded.mesh) for x in (backbone, other))
    made = dataclasses.replace(
        loaded, model=rm, params={**params, 'backbone': backbone}, tokenizer=tokenizer,
        compiled=common.compiled(rm),
    )  # fmt: skip
    return Mixed(made, other)


def records_swept(
    of: Mixed, records: Sequence[Preference], at: Sequence[float], *, max_length: int | None = None
) -> Swept:
    """Records at every share; long ones lose the left of their prompt."""
    ready = of.scorer.prepare(records, max_length=max_length, overlong='left')
    ranks, params = evaluate.ranks(records), of.scorer.params
    right_K, scores = [], []
    for share in at:
        blended = {**params, 'blend': reward.blend(params['backbone'], of.other, share)}
        found = dataclasses.replace(of.scorer, params=blended).score_prepared(ready)
        right_K.append(evaluate.pairs(ranks, found).accuracy)
        scores.append(np.concatenate(found))
    return Swept(np.stack(right_K), *sweep.drift(np.stack(scores)))


# Results


def chosen(of: Sequence[float], validation_Kn: Array, test_Kn: Array) -> dict[str, Any]:
    """The share that validation records choose; digits of the test records there and at the ends.

    `gap` is what the best share of the test records would add.
    """
    row = sweep.best_of(of, validation_Kn)
    best = sweep.best_of(of, test_Kn)
    at = {'none': 0, 'chosen': row, 'all': -1}
    gap = np.nanmean(test_Kn[best]) - np.nanmean(test_Kn[row])
    return {
        'share': of[row], 'best': of[best], 'gap': round(float(gap), 4),
        'right': {name: digits(test_Kn[k]) for name, k in at.items()},
    }  # fmt: skip


def gains(picks: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Of a cell's seeds: accuracy at the chosen shares, above both ends, in points."""
    of = {k: of_digits([pick['right'][k] for pick in picks]) for k in ('none', 'chosen', 'all')}
    each = [pick['share'] for pick in picks]
    return {
        'unmerged': f'{of["none"].mean():.3f}',
        'at the chosen share': str(crossed(of['chosen'])),
        'share 1': f'{of["all"].mean():.3f}',
        'above unmerged': points(of['chosen'] - of['none']),
        'above share 1': points(of['chosen'] - of['all']),
        'shares': f'{np.mean(each):.2f} ({min(each):g} to {max(each):g})',
        'oracle gap': f'{100 * np.mean([pick["gap"] for pick in picks]):.1f}',
    }


def picture(
    panels: Mapping[str, Mapping[str, Array]],
    of: Sequence[float],
    path: Path,
    *,
    y: str = 'accuracy',
) -> None:
    """A panel for each set: [S, K] of each line over the share, the mean and the seeds' range."""
    drawn, axes = report.canvas(len(panels))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for (name, x_SK), colour in zip(lines.items(), strength_report.LINES, strict=False):
            axis.plot(of, np.mean(x_SK, 0), '.-', color=colour, label=name)
            axis.fill_between(of, np.min(x_SK, 0), np.max(x_SK, 0), color=colour, alpha=0.12)
        axis.set(xlabel='share of the other model', title=title)
    axes[0].set(ylabel=y)
    axes[-1].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=120)
