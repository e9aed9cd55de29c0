"""Scores of a whole set, what training logs of them, and the hook that does it.

Scores of a set are one array [M] per record, in the order of its responses, whatever made them.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm import losses, packing, processes, rewardbench, shapes, sharding, statistics, tree
from jaxrm.backbones import attention
from jaxrm.data import Preference
from jaxrm.intervals import Interval as Interval
from jaxrm.intervals import interval as interval
from jaxrm.intervals import paired as paired
from jaxrm.packing import Pack
from jaxrm.statistics import pairs as pairs
from jaxrm.tokens import Encoded, Tokens

if TYPE_CHECKING:
    from jaxrm.logs import Log

Score = Callable[[tree.Tree, Pack], jax.Array]  # (params, pack) -> score_BM
Rule = Callable[[list[np.ndarray]], Mapping[str, float]]  # scores [M] of every record -> results


def candidate_scores(
    score: Callable[[tree.Tree, Pack], Any],
    params: tree.Tree,
    tokens: Tokens,
    shape: packing.Shape,
    *,
    mesh: Mesh,
    packs: int,
) -> Any:
    """[c] float32, the score of every candidate of `tokens`; `score` is already compiled.

    Of several ratings [c, J]; of a tree of arrays [B, M, ...] such a tree. A batch has `packs`
    packs, a multiple of the mesh's data axes. Every process gets all scores.
    """
    params, at, parts = sharding.place(params, mesh), [], []
    for pack, found in passed(score, params, packing.in_order(tokens, shape, packs), mesh):
        index = _candidate_index(tokens, pack).reshape(-1, pack.rank_PBM.shape[-1])
        at.append(index[index >= 0])
        parts.append([np.asarray(x_BM)[index >= 0] for x_BM in jax.tree.leaves(found)])
    order_c = np.argsort(np.concatenate(at))
    each = [np.concatenate(x).astype(np.float32)[order_c] for x in zip(*parts, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(found), each)


def passed(
    apply: Callable[[tree.Tree, Pack], Any], params: tree.Tree, packs: Iterable[Pack], mesh: Mesh
) -> Iterator[tuple[Pack, Any]]:
    """Each batch on the host, and what `apply` gives of it as arrays that this process can read.

    Given one batch late, so that the device never waits for the host; `params` are on the mesh.
    """
    waiting: list[tuple[Pack, Any]] = []
    for pack in packs:
        placed = sharding.place_batch(pack, mesh)
        with jax.set_mesh(mesh):
            waiting.append((pack, jax.tree.map(processes.whole, apply(params, placed))))
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _candidate_index(tokens: Tokens, pack: Pack) -> np.ndarray:
    """[P, B, M] candidate of `tokens`, -1 where there is none."""
    record_PB, M = pack.record_PB, pack.rank_PBM.shape[2]
    first = np.where(record_PB >= 0, tokens.first[record_PB], 0)[..., None]
    count = np.where(record_PB >= 0, tokens.first[record_PB + 1] - tokens.first[record_PB], 0)[
        ..., None
    ]
    m = np.arange(M)[None, None]
    return np.where(m < count, first + m, -1)


def by_record(score_c: np.ndarray, tokens: Tokens) -> list[np.ndarray]:
    """Scores [M] of each record of `tokens`."""
    return np.split(score_c, tokens.first[1:-1])


def ranks(records: Sequence[Preference]) -> list[Sequence[int]]:
    """Ranks of every record; an unranked one has all 0."""
    return [r.ranks if r.ranks is not None else (0,) * len(r.responses) for r in records]


def prompts(records: Sequence[Preference]) -> list[str]:
    """One text for each record, the same for equal prompts."""
    return [json.dumps([record.messages, record.tools], default=repr) for record in records]


def lengths(tokens: Tokens) -> np.ndarray:
    """int [c], tokens of every candidate after its prompt, those of the chat template included."""
    count = np.diff(tokens.first)
    return np.repeat(tokens.prompt - tokens.gate - 1, count) + tokens.length


# While training


def metrics(
    score_c: np.ndarray, tokens: Tokens, *, loss: Callable[..., jax.Array] = losses.bradley_terry
) -> dict[str, float]:
    """What train.preference says of a batch, of a whole set: means over records with a pair.

    `loss` is a function of losses.py. Raises ValueError without an ordered pair.
    """
    rank, scores = by_record(tokens.rank, tokens), by_record(score_c, tokens)
    each, found = pairs(rank, scores), statistics.rewards(rank, scores)
    loss_B = loss(
        _padded(score_c, tokens, 0),
        _padded(tokens.rank, tokens, -1),
        margin_BM=_padded(tokens.margin, tokens, 0),
        smoothing_B=tokens.smoothing,
    )
    there_B = ~np.isnan(each.accuracy)
    mean = lambda x_B: float(np.asarray(x_B, float)[there_B].mean())  # noqa: E731
    return {
        'loss': mean(loss_B),
        'accuracy': mean(each.accuracy),
        'margin': mean(each.margin),
        **{name: found[name] for name in ('min_reward', 'mean_reward', 'max_reward')},
        'ties': mean(each.ties),
    }


def benchmark(bench: rewardbench.Bench) -> Rule:
    """The rule of a published benchmark: scores and sections under the names of its table."""
    return lambda scores: dict(rewardbench.table(rewardbench.evaluate(bench, scores)))


def _padded(x_c: np.ndarray, tokens: Tokens, fill: float) -> np.ndarray:
    """[n, M] of each record's candidates."""
    count = np.diff(tokens.first)[:, None]
    m = np.arange(count.max())[None]
    at = np.minimum(tokens.first[:-1, None] + m, len(x_c) - 1)
    return np.where(m < count, x_c[at], np.array(fill, x_c.dtype))


def hook(
    score: Score,
    sets: Encoded | Mapping[str, Encoded],
    *,
    frozen: tree.Tree,
    mesh: Mesh,
    log: 'Log',
    width: int = 4096,
    loss: Callable[..., jax.Array] = losses.bradley_terry,
    center_rewards_coefficient: float = 0.0,
    rules: Mapping[str, Rule] | None = None,
) -> Callable[[int, Any, Any], None]:
    """A hook for train.fit that writes `metrics` of the sets into the log.

    Names are TRL's: `eval_accuracy`, or `eval_<name>_accuracy` when `sets` has names. `score` is
    already compiled, `frozen` and `width` are as in training. A set named in `rules` also gets the
    results of its rule, such as `benchmark`. Raises ValueError for a set with nothing to evaluate,
    or a rule without its whole set.
    """
    named = {'': sets} if isinstance(sets, Encoded) else {f'{k}_': v for k, v in sets.items()}
    rule = {f'{name}_': of for name, of in (rules or {}).items()}
    for name in rule.keys() - named.keys():
        raise ValueError(f'rules: found {name[:-1]!r}, expected a name among the sets')
    for name, encoded in named.items():
        _check_set(name, encoded, name in rule)
    frozen, packs = sharding.place(frozen, mesh), sharding.data_parallel(mesh)
    multiple = attention.row_multiple()
    fit = functools.partial(shapes.fit, size=4096, width=width, multiple=multiple)
    fitted = {name: fit(encoded.tokens) for name, encoded in named.items()}

    @jax.jit
    def full(score_BM, rank_BM, **options):
        centering = center_rewards_coefficient * losses.centering(score_BM, rank_BM)
        return loss(score_BM, rank_BM, **options) + centering

    def evaluate(done: int, state: Any, step_metrics: Any) -> None:
        log.flush()
        params = {**frozen, **state.trainable}
        for name, (tokens, _, _) in named.items():
            score_c = candidate_scores(score, params, tokens, fitted[name], mesh=mesh, packs=packs)
            found = metrics(score_c, tokens, loss=full)
            if name in rule:
                results = rule[name](by_record(score_c, tokens))
                found |= {re.sub(r'\W+', '_', k).strip('_').lower(): v for k, v in results.items()}
            log.write(done, {f'eval_{name}{k}': v for k, v in found.items()})

    return evaluate


def _check_set(name: str, encoded: Encoded, whole: bool) -> None:
    name = name[:-1] or 'set'
    if not len(statistics.ordered(by_record(encoded.tokens.rank, encoded.tokens)).record):
        raise ValueError(f'{name}: found no ordered pair, expected answers of different rank')
    if whole and encoded.report.dropped:
        found = f'{encoded.report.dropped} records dropped as over-long'
        raise ValueError(f'{name}: found {found}, expected all of them for its rules')
