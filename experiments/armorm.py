"""What the ArmoRM experiments share: where their data comes from, features and objectives of it.

The method is that of arXiv 2406.12845: ratings of an answer by ridge regression on the features of
a frozen reward model, freed from a liking for length, and weighed by a gate that reads the prompt.
The gate is in `gating`, the numbers that raters use in `scales`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import common, devices, scales
from jaxrm import (
    backbones,
    bundle,
    checkpoint,
    data,
    evaluate,
    features,
    heads,
    hf,
    hf_heads,
    marker,
    processes,
    regress,
    resume,
    reward,
    shapes,
    sharding,
    tokens,
    tree,
)
from jaxrm.backbones import attention
from jaxrm.data import Preference
from jaxrm.datasets import synthetic

Array = np.ndarray
HELD = 0.2  # of the prompts, to choose penalties by, and to test with where there is no test set


class Sources(NamedTuple):
    """What unset flags mean. Names are files or hub ids; columns hold one rating each.

    `scales` are those of the raters of ratings that are in (0, 1) already: to tell ratings by.
    """

    model: str
    verbosity: str  # the objective that stands for length
    ratings: str | None = None
    pairs: str | None = None
    test: str | None = None  # by default held-out pairs
    reference: str | None = None  # pairs on which length and ratings are compared; else `pairs`
    columns: tuple[str, ...] = ()
    scales: Mapping[str, regress.Scale] = {}


PRESETS = {
    'world': Sources('runs/pretrain/model', 'verbosity'),
    # The released model's, whose ratings are in (0, 1): of HelpSteer's 0 to 4 the bin centres.
    'armorm': Sources(
        model='sfairXC/FsfairX-LLaMA3-RM-v0.1',
        verbosity='helpsteer-verbosity',
        ratings='RLHFlow/ArmoRM-Multi-Objective-Data-v0.1',  # messages, and a column an objective
        pairs='RLHFlow/pair_data_v2_80K_wsafety',  # chosen, rejected
        reference='RLHFlow/UltraFeedback-preference-standard',  # chosen, rejected
        columns=hf_heads.OBJECTIVES,
        scales={n: s for n, s in zip(hf_heads.OBJECTIVES, hf_heads.SCALES, strict=True) if s},
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(devices.Devices):
    """The same flags for all phases."""

    preset: Literal['world', 'armorm'] = 'world'
    model_name_or_path: str | None = None  # a decoder, whose head is not read
    dataset_ratings: str | None = None  # answers with ratings
    dataset_pairs: str | None = None  # the better answer and the worse
    dataset_test: str | None = None
    dataset_reference: str | None = None
    rating_columns: tuple[str, ...] = ()
    rating_scales: tuple[str, ...] = ()  # such as verbosity=0:4, of ratings not in (0, 1) yet
    stored_scales: tuple[str, ...] = ()  # the same of ratings in (0, 1), to tell them by later
    verbosity: str | None = None
    chat: bool = False  # plain strings become a user and an assistant turn
    max_length: int | None = None  # longer records are dropped and counted
    features: Path = Path('runs/armorm/features')  # of this model, whatever the data
    cache: Path | None = Path('runs/cache')  # of tokens
    seed: int = 0
    prompts: int = 6000  # from here on: of the synthetic world; with ratings
    pairs: int = 12_000
    test_pairs: int = 2000
    rated: float = 0.15  # the share of its ratings that is there
    length_bias: float = 0.0  # raters like length so much, and nothing else of the data does

    @property
    def sources(self) -> Sources:
        """The preset's, with the flags over it."""
        given = {
            'model': self.model_name_or_path,
            'verbosity': self.verbosity,
            'ratings': self.dataset_ratings,
            'pairs': self.dataset_pairs,
            'test': self.dataset_test,
            'reference': self.dataset_reference,
            'columns': self.rating_columns,
        }
        return PRESETS[self.preset]._replace(**{k: v for k, v in given.items() if v})


# Sets


class Set(NamedTuple):
    """Records with an order or with ratings, and their token trees."""

    records: list[Preference]
    tokens: tokens.Tokens
    objectives: tuple[str, ...] = ()


def sets(c: Data, tokenizer: Any, names: Sequence[str]) -> dict[str, Set]:
    """Those of 'ratings', 'pairs', 'test' and 'reference' that are named, as tokens."""
    s = c.sources
    if (s.ratings is None) != (s.pairs is None):
        raise ValueError('dataset_ratings, dataset_pairs: found one of them, expected both or none')
    marker.check_template(tokenizer)
    records, objectives = world(c) if s.ratings is None else read(c, s, names)
    out = {}
    for name in names:
        encoded = tokens.encode(
            records[name], tokenizer, max_length=c.max_length,
            cache=c.cache, write=processes.first(),
        )  # fmt: skip
        common.console.print(f'{name}: {encoded.report}')
        of = objectives if name == 'ratings' else ()
        out[name] = Set(records[name], encoded.tokens, of)
    return out


def read(c: Data, s: Sources, names: Iterable[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The named sets from the files that they need, and the objectives.

    Raises DataError for pairs without a user turn, at whose end a gate would read, and for ratings
    that are not on their scale.
    """

    def load(name: str | None, columns: Sequence[str] = ()) -> data.Loaded:
        found = data.load(str(name), chat=c.chat, rating_columns=columns)
        common.console.print(found.mapping)
        return found

    def turns(name: str | None) -> list[Preference]:
        found = load(name)
        marker.check_turns(found.records, found.where)
        return found.records

    out, objectives = {}, ()
    if 'ratings' in names:
        found = load(s.ratings, s.columns)
        scales.check(found, scales.given(c.rating_scales, found.objectives))
        out['ratings'], objectives = found.records, found.objectives
    own = {'test': s.test, 'reference': s.reference}
    out |= {name: turns(path) for name, path in own.items() if path and name in names}
    if {'pairs', *(name for name, path in own.items() if not path)} & set(names):
        pairs = turns(s.pairs)
        share = 0 if s.test else HELD
        parts = data.split_by_prompt(pairs, share, seed=c.seed)
        kept, held = ([pairs[i] for i in part] for part in parts)
        out = {'pairs': kept, 'test': held, 'reference': kept} | out
    return out, objectives


def apart(found: Mapping[str, Set]) -> tuple[Set, dict[str, int]]:
    """The test set without the prompts of the other sets, and how many records each set takes.

    Raises ValueError where nothing is left.
    """
    test = found['test']
    asked = evaluate.prompts(test.records)
    count, seen = {}, np.zeros(len(asked), bool)
    for name in (name for name in found if name != 'test'):
        there = set(evaluate.prompts(found[name].records))
        here = np.array([prompt in there for prompt in asked])
        count[name], seen = int(here.sum()), seen | here
    (left,) = np.nonzero(~seen[test.tokens.record])
    if not len(left):
        raise ValueError(f'test: found every prompt in {sorted(count)} too, expected others')
    return test._replace(tokens=tokens.select(test.tokens, left)), count


def world(c: Data) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Sets of the synthetic world; its ratings are the qualities. No two share a prompt."""
    rng = np.random.default_rng(c.seed)
    rated = synthetic.preferences(c.prompts, seed=c.seed, split='validation', labels='none')
    pairs = synthetic.preferences(c.pairs, seed=c.seed)
    test = synthetic.preferences(c.test_pairs, seed=c.seed, split='test')
    if c.length_bias:
        pairs, test = ([blind(r, rng) for r in some] for some in (pairs, test))
    found = {'pairs': pairs, 'test': test, 'reference': pairs}
    return {'ratings': [seen(c, r, rng) for r in rated], **found}, synthetic.QUALITIES


def seen(c: Data, record: Preference, rng: np.random.Generator) -> Preference:
    """As raters give it: most ratings missing, by chance, and length liked in all of them."""
    rating_MJ, v = np.array(record.ratings), synthetic.QUALITIES.index('verbosity')
    biased_MJ = (rating_MJ + c.length_bias * rating_MJ[:, [v]]) / (1 + c.length_bias)
    biased_MJ[:, v] = rating_MJ[:, v]
    biased_MJ[rng.random(rating_MJ.shape) > c.rated] = np.nan
    return record._replace(ratings=tuple(map(tuple, biased_MJ.tolist())))


def blind(record: Preference, rng: np.random.Generator) -> Preference:
    """Ranked anew by somebody to whom length is nothing."""
    weight_J = weights(record.group) * (np.array(synthetic.QUALITIES) != 'verbosity')
    worth_M = np.nan_to_num(np.array(record.ratings)) @ weight_J / synthetic.TEMPERATURE
    order = np.argsort(-(worth_M + rng.gumbel(size=len(worth_M))))
    return record._replace(ranks=tuple(np.argsort(order).tolist()))


def weights(category: str | None) -> Array:
    """[J] what the qualities count in a category of the world."""
    of = synthetic.WEIGHTS[str(category)]
    return np.array([of.get(name, 0.0) for name in synthetic.QUALITIES])


# Features


def tokenizer(c: Data) -> Any:
    """The model's, without the model."""
    return bundle.read_tokenizer(checkpoint.resolve(c.sources.model))


def model(c: Data) -> str:
    """A hash of the decoder whose features are in the folder."""
    return hf.read_json(c.features / features.ABOUT)['model']


def compute(c: Data, mesh: Any, names: Sequence[str]) -> dict[str, Set]:
    """Adds what the folder lacks of the sets, and returns them."""
    like = checkpoint.load_pretrained(c.sources.model, kind='backbone')
    found = sets(c, like.tokenizer, names)
    attend = attention.default(like.dtype, like.config, mesh)
    backbone = backbones.family(like.model_type).Backbone(like.config, like.dtype, attend)
    rm = reward.RewardModel(backbone, heads.Scalar())
    some, width = joined([part.tokens for part in found.values()]), like.config.D
    shape = shapes.fit(some, size=4096, width=width, multiple=attention.row_multiple())
    done = features.compute(
        jax.jit(rm.features), {'backbone': like.backbone}, some, shape, c.features,
        model=resume.digest(like.backbone), mesh=mesh, packs=sharding.data_parallel(mesh),
        dtype=like.dtype, done=lambda n, of: common.console.print(f'{n} of {of} records'),
    )  # fmt: skip
    common.console.print(f'{done} records more in {c.features}')
    return found


def joined(parts: Sequence[tokens.Tokens]) -> tokens.Tokens:
    """All records one after the other, without their ratings: of one shape, for one program."""
    parts = [part._replace(rating=part.rating[:, :0]) for part in parts]
    names = tokens.Tokens._fields
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    for name in ('start', 'first'):
        sizes = np.concatenate([np.diff(getattr(part, name)) for part in parts])
        columns[name] = np.append(0, np.cumsum(sizes))
    return tokens.Tokens(**columns)


# Objectives


class Objectives(NamedTuple):
    """J ratings by name, as the head of a gated model, and how good they are."""

    names: tuple[str, ...]
    head: tree.Tree
    fitted: regress.Ridge
    count_J: Array  # how many ratings there are
    penalty_J: Array  # of verbosity; 1 for itself
    before_J: Array  # rank correlation with verbosity in the reference
    after_J: Array


def regressed(c: Data, rated: Set, *, shared_alpha: bool = False) -> regress.Ridge:
    """Ridge regression of each objective; a fifth of the prompts chooses the penalties.

    With `shared_alpha` one penalty for all, that with the least mean error over the objectives.
    """
    _, held = data.split_by_prompt(rated.records, HELD, seed=c.seed)
    count = np.diff(rated.tokens.first)
    held_c = np.repeat(np.isin(rated.tokens.record, held), count)
    of = scales.given(c.rating_scales, rated.objectives)
    label_cJ = scales.normalised(rated.tokens.rating, rated.objectives, of)

    def fit(**options: Any) -> regress.Ridge:
        parts = ((p.candidate_c, p.answer_cD) for p in features.parts(c.features, rated.tokens))
        return regress.ridge(parts, label_cJ, held_c, names=rated.objectives, **options)

    found = fit()
    if not shared_alpha:
        return found
    return fit(alphas=(regress.ALPHAS[found.mse_JA.mean(0).argmin()],))


def objectives(
    c: Data, rated: Set, reference: Set, *, debias: bool = True, shared_alpha: bool = False,
    correlation: Callable[[Array, Array], Array] = regress.spearman,
) -> Objectives:  # fmt: skip
    """Both closed-form fits: the ratings, and what of verbosity to take from each."""
    names, verbosity = rated.objectives, c.sources.verbosity
    if verbosity not in names:
        raise ValueError(f'--verbosity: found {verbosity!r}, expected one of {list(names)}')
    fitted, v = regressed(c, rated, shared_alpha=shared_alpha), names.index(verbosity)
    reward_cJ = np.empty((len(reference.tokens.length), len(names)), np.float32)
    for part in features.parts(c.features, reference.tokens):
        reward_cJ[part.candidate_c] = part.answer_cD.astype(np.float32) @ fitted.weight_JD.T
    penalty_J = np.zeros(len(names))
    if debias:
        penalty_J = regress.penalties(reward_cJ, v, correlation=correlation)
    T_JJ = regress.transform(penalty_J, v)
    before_J, after_J = (
        regress.spearman(x_cJ, reward_cJ[:, v]) for x_cJ in (reward_cJ, reward_cJ @ T_JJ)
    )
    kernel_DJ = np.ascontiguousarray(fitted.weight_JD.T)
    head = {'regression': {'kernel': kernel_DJ}, 'transform': T_JJ}
    count_J = np.isfinite(rated.tokens.rating).sum(0)
    return Objectives(names, head, fitted, count_J, penalty_J, before_J, after_J)
