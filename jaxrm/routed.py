"""A loaded DMoERM (arXiv 2403.01197): a router chooses the inner model that scores an answer."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrm import (
    evaluate,
    fused,
    mixture,
    mixture_files,
    packing,
    scorer,
    shapes,
    sharding,
    tokens,
    tree,
)
from jaxrm.backbones import attention
from jaxrm.data import DataError, Preference
from jaxrm.mixture_files import Plan
from jaxrm.reward import RewardModel
from jaxrm.scorer import Conversation, Prepared, Scorer

ROUTES = ('predicted', 'gold', 'random')


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Where an answer's prompt went, and what the experts there say of the answer.

    The score is the MLP's, of the experts' features: it is not a sum of the capabilities' scores.
    """

    score: float
    category: str
    probabilities: dict[str, float]  # the router's, of all categories
    capabilities: dict[str, float]  # scores of the experts' own heads

    def __str__(self) -> str:
        share = self.probabilities[self.category]
        lines = [f'{self.category} ({share:.0%} by the router): {self.score:+.4f}']
        width = max(map(len, self.capabilities))
        return '\n'.join(
            lines + [f'  {name:{width}} {x:+.4f}' for name, x in self.capabilities.items()]
        )


class Ready(NamedTuple):
    """Records by route: the router's logits and the chosen category of each, and its token trees.

    `parts` has for every category that was chosen the positions of its records, and what the inner
    model takes.
    """

    logits_nC: np.ndarray
    route_n: np.ndarray
    parts: Mapping[int, tuple[np.ndarray, Prepared]]

    def gathered(self, of: Callable[[int, Prepared], Sequence[Any]]) -> list[Any]:
        """Something of every record, by of(category, what is prepared of it)."""
        out: list[Any] = [None] * len(self.route_n)
        for category, (at, ready) in self.parts.items():
            for i, value in zip(at, of(category, ready), strict=True):
                out[i] = value
        return out

    def lengths(self) -> list[np.ndarray]:
        """int [M] of every record: the tokens of its answers."""
        return self.gathered(lambda _, ready: ready.lengths())


@dataclasses.dataclass(frozen=True)
class Routed:
    """A DMoERM in memory, with the methods of `scorer.Scorer`."""

    plan: Plan
    router: RewardModel
    router_params: tree.Tree
    inner: tuple[Scorer, ...]  # by category
    normalise: bool = False  # scores by the plan's normaliser

    @property
    def model(self) -> Any:
        """That of the first category; what it is made of is the same for all."""
        return self.inner[0].model

    @property
    def tokenizer(self) -> Any:
        return self.inner[0].tokenizer

    def with_tokenizer(self, tokenizer: Any) -> 'Routed':
        """The same model, reading what this tokenizer makes of texts."""
        inner = tuple(one.with_tokenizer(tokenizer) for one in self.inner)
        return dataclasses.replace(self, inner=inner)

    def score(self, conversations: Sequence[Conversation], **options: Any) -> np.ndarray:
        """float32 [n], the reward of the last turn of each conversation; options as in `prepare`.

        Conversations are as for `scorer.Scorer.score`.
        """
        scores = self.score_records(*scorer.parsed(conversations), **options)
        return np.array([s for (s,) in scores], np.float32)

    def explain(self, conversations: Sequence[Conversation], **options: Any) -> list[Explanation]:
        """The score of each conversation, its route, and what the experts say."""
        records, where = scorer.parsed(conversations)
        ready = self.prepare(records, where=where, **options)
        found = ready.gathered(lambda c, part: self.inner[c].found(self._apart[c], part))
        odds_nC = np.exp(ready.logits_nC - ready.logits_nC.max(1, keepdims=True))
        odds_nC /= odds_nC.sum(1, keepdims=True)
        out = []
        for (score_M, each_ME), c, odds_C in zip(found, ready.route_n, odds_nC, strict=True):
            name, value = self.plan.categories[c], float(self._normalised(c, score_M)[0])
            points = dict(zip(self.plan.capabilities[name], each_ME[0].tolist(), strict=True))
            odds = dict(zip(self.plan.categories, odds_C.tolist(), strict=True))
            out.append(Explanation(value, name, odds, points))
        return out

    @functools.cached_property
    def _apart(self) -> list[Callable[..., Any]]:
        """Of each category (params, pack) -> the score and the capabilities'."""
        models: Any = [one.model for one in self.inner]
        return [jax.jit(model.parts) for model in models]

    def score_records(
        self, records: Sequence[Preference], where: Sequence[str] | None = None, **options: Any
    ) -> list[np.ndarray]:
        """float32 [M] for every record, all its responses; ranks play no part."""
        return self.score_prepared(self.prepare(records, where=where, **options))

    def prepare(
        self,
        records: Sequence[Preference],
        *,
        route: str = 'predicted',
        where: Sequence[str] | None = None,
        **options: Any,
    ) -> Ready:
        """What `score_prepared` takes; the router reads every distinct prompt once.

        `route` takes the router's category, the records' own group ('gold') or one by a hash of the
        prompt ('random'): a control. Other options as in `scorer.Scorer.prepare`. Raises DataError
        for what cannot be scored.
        """
        if route not in ROUTES:
            raise ValueError(f'route: found {route!r}, expected one of {ROUTES}')
        where = where or [f'record {i}' for i in range(len(records))]
        shown = [mixture.shown(r, self.plan.turns) for r in records]
        self.inner[0].prepare(shown, where=where, **options)  # finds all that is wrong with them
        logits_nC = self._logits(records, where)
        route_n = logits_nC.argmax(1)
        if route != 'predicted':
            given = [self._given(route, r, w) for r, w in zip(records, where, strict=True)]
            route_n = np.array(given, int)
        parts = {}
        for c in sorted(set(route_n.tolist())):
            at = np.flatnonzero(route_n == c)
            mine, names = ([x[int(i)] for i in at] for x in (shown, where))
            parts[c] = at, self.inner[c].prepare(mine, where=names, **options)
        return Ready(logits_nC, route_n, parts)

    def _given(self, route: str, record: Preference, where: str) -> int:
        names = self.plan.categories
        if route == 'random':
            digest = hashlib.sha256(repr(record.messages).encode()).digest()
            return int.from_bytes(digest[:8]) % len(names)
        if record.group not in names:
            raise DataError(f'{where}: group: found {record.group!r}, expected one of {names}')
        return names.index(record.group)

    def _logits(self, records: Sequence[Preference], where: Sequence[str]) -> np.ndarray:
        """[n, C] of the router."""
        prompts = [mixture.asked(r, w) for r, w in zip(records, where, strict=True)]
        keys = [repr(p.messages) for p in prompts]
        distinct = {key: i for i, key in reversed(list(enumerate(keys)))}
        order = {key: row for row, key in enumerate(distinct)}
        if not distinct:
            return np.zeros((0, len(self.plan.categories)), np.float32)
        asked = [prompts[i] for i in distinct.values()]
        config = self.router.backbone.config
        found = logits(
            self._route, self.router_params, asked, self.tokenizer, mesh=self.inner[0].mesh,
            width=config.D, max_length=config.max_position,
        )  # fmt: skip
        return found[[order[key] for key in keys]]

    @functools.cached_property
    def _route(self) -> Callable[..., jax.Array]:
        return jax.jit(self.router.score)

    def score_prepared(self, ready: Ready) -> list[np.ndarray]:
        """As `score_records`."""
        return ready.gathered(
            lambda c, part: [
                self._normalised(c, scores) for scores in self.inner[c].score_prepared(part)
            ]
        )

    def _normalised(self, category: int, scores: np.ndarray) -> np.ndarray:
        if not self.normalise:
            return scores
        if self.plan.normaliser is None:
            raise ValueError('normalise: found no normaliser in dmoerm.json')
        mean, std = self.plan.normaliser[self.plan.categories[category]]
        return ((scores - mean) / std).astype(np.float32)


def logits(
    route: Callable[..., jax.Array],
    params: tree.Tree,
    prompts: Sequence[Preference],
    tokenizer: Any,
    *,
    mesh: Mesh,
    width: int,
    max_length: int | None = None,
) -> np.ndarray:
    """[n, C] of records without answers, by a router's compiled score; longer prompts lose words.

    They are cut at the left: the last words stay.
    """
    encoded = tokens.encode(prompts, tokenizer, max_length=max_length, overlong='left').tokens
    shape = shapes.fit(encoded, size=4096, width=width, multiple=attention.row_multiple())
    packs = packing.in_order(encoded, shape, sharding.data_parallel(mesh))
    out: np.ndarray | None = None
    for pack, found_BC in evaluate.passed(route, sharding.place(params, mesh), packs, mesh):
        found, record_B = np.asarray(found_BC), pack.record_PB.reshape(-1)
        if out is None:
            out = np.empty((len(encoded.prompt), found.shape[1]), np.float32)
        out[record_B[record_B >= 0]] = found[record_B >= 0]
    assert out is not None  # as there are prompts
    return out


def load(
    path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None, normalise: bool = False
) -> Routed:
    """The DMoERM of a folder; raises ValueError when it is not whole."""
    mesh = mesh or sharding.make_mesh()
    plan, asked = mixture_files.read_plan(path), mixture_files.load_router(path, dtype=dtype)
    inner, vocabulary = [], _vocabulary(asked.tokenizer, path)
    for category in plan.categories:
        model, params, base = mixture_files.load_inner(path, category, dtype=dtype, mesh=mesh)
        if _vocabulary(base.tokenizer, path) != vocabulary:
            raise ValueError(f"{path}: {category}: its tokenizer is not the router's")
        placed = fused.place(params, mesh)
        pooling = (base.bundle or {}).get('pooling')
        functions: Any = model  # a Scorer needs a backbone and a score
        score = jax.jit(model.score)
        inner.append(Scorer(functions, placed, base.tokenizer, mesh, score, pooling))
    router = mixture_files.reward_model(asked, mesh)
    placed = sharding.place({'backbone': asked.backbone, 'head': asked.head}, mesh)
    return Routed(plan, router, placed, tuple(inner), normalise)


def _vocabulary(tokenizer: Any, path: str | Path) -> tuple[dict[str, int], str]:
    if tokenizer is None:
        raise ValueError(f'{path}: found a model without a tokenizer')
    return tokenizer.get_vocab(), str(tokenizer.chat_template)
