"""Knowledge of a domain by weight arithmetic (DogeRM, arXiv 2407.01470), in the synthetic world.

Run:     python -m experiments.dogerm_world               # what is missing, then the table
         python -m experiments.dogerm_world --only_table  # from experiments/results/dogerm_world
Cost:    40 minutes on a CPU core; the two bases are kept
Expect:  the table of DogeRM in the world in BENCHMARKS.md

A base reads text of all categories but the domain. A reward model learns pairs of the same
categories from it, its head first, on the frozen base, so that it reads what was there before, and
a language model goes on from the base with text of the domain alone. The two are mixed at every
share; validation pairs of the domain choose the share, test pairs tell what it is worth. In the
texts users remark on what is good and bad in a share `remarks` of the answers, and rewards are read
where such a remark would begin, so that what a language model knows of an answer stands where the
head reads it (with `read` answer: at the answer's end). A cell is a kind of other model: the
language model, and controls that must fail, namely one whose base began elsewhere, the same one
with its layers in another order, and noise as far from the reward model as it. Seeds are of pairs,
texts and heads, members of one program; they share the two bases.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import common, devices, dmoerm, dogerm, labelling, stored
from experiments.dmoerm import Lesson, Pace
from jaxrm import cache, checkpoint, heads, members, reward, tokens, train, tree
from jaxrm.backbones.layers import Decoder
from jaxrm.data import Preference
from jaxrm.datasets import synthetic

KINDS = ('language model', 'other initialisation', 'layers shuffled', 'noise')
# What the bases depend on; they are kept apart for other values.
OF_BASES = {
    *('domain', 'base_texts', 'base_domain', 'remarks', 'base_learning_rate', 'base_epochs'),
    *('train_batch_size', 'max_length', 'vocabulary', 'hidden_size', 'num_hidden_layers'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(devices.Devices):
    output_dir: Path = Path('runs/dogerm_world')  # of the bases
    results: Path = dogerm.RESULTS / 'dogerm_world'
    domain: str = 'ordering'
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    shares: int = 11  # from 0 to 1
    base_texts: int = 16_000
    base_domain: bool = False  # the base reads the domain, too
    domain_texts: int = 8000
    remarks: float = 0.7  # share of the texts with a user's remark on the answer
    read: Literal['remark', 'answer'] = 'remark'  # where rewards are read
    pairs: int = 4000
    test_pairs: int = 2000  # of the domain, as many to choose by, and as many of the others
    probe_epochs: int = 4  # of the head, on the frozen base; 0: it begins at random
    probe_learning_rate: float = 1e-2
    learning_rate: float = 1e-3  # of the reward model
    base_learning_rate: float = 3e-3
    domain_learning_rate: float = 1e-3
    num_train_epochs: int = 1  # of the reward model
    base_epochs: int = 2
    domain_epochs: int = 2
    train_batch_size: int = 32
    max_length: int = 160
    vocabulary: int = 1024
    hidden_size: int = 64
    num_hidden_layers: int = 2
    only_table: bool = False


class World(NamedTuple):
    """The bases, and how models that start from them are used."""

    rm: reward.RewardModel
    lm: reward.RewardModel
    bases: list[tree.Tree]
    tokenizer: Any
    mesh: Any


# Texts and pairs


def categories(c: Config, domain: bool) -> tuple[str, ...]:
    """The domain, or all others."""
    synthetic.text(0, seed=0, categories=(c.domain,))  # its name is checked
    return tuple(name for name in synthetic.CATEGORIES if (name == c.domain) == domain)


def texts(c: Config, n: int, seed: int, names: Sequence[str]) -> list[Preference]:
    """Conversations, of which the first answer and what comes after it is learned."""
    made = synthetic.text(n, seed=seed, categories=names, remarks=c.remarks)
    ends = [next(i for i, m in enumerate(t) if m['role'] == 'assistant') for t in made]
    return [
        Preference(t[:i], (t[i]['content'] if len(t) == i + 1 else t[i:],))
        for t, i in zip(made, ends, strict=True)
    ]


def encoded(c: Config, w: World, records: Sequence[Preference]) -> tokens.Tokens:
    return tokens.encode(records, w.tokenizer, max_length=c.max_length).tokens


def pairs(c: Config, w: World, split: str, seed: int, n: int, *, domain: bool) -> tokens.Tokens:
    """n pairs with a better answer; those learned from are labelled as people would."""
    labels = 'sampled' if split == 'train' else 'gold'
    names = categories(c, domain)
    made = synthetic.preferences(3 * n, seed=seed, split=split, categories=names, labels=labels)
    ordered = [record for record in made if record.ranks == (0, 1)]
    if c.read == 'remark':
        ordered = [before_remark(record, w.tokenizer) for record in ordered]
    found = encoded(c, w, ordered)
    if len(found.prompt) < n:
        raise ValueError(f'max_length: found {len(found.prompt)} short pairs, expected {n}')
    return tokens.select(found, np.arange(n))


def before_remark(record: Preference, tokenizer: Any) -> Preference:
    """The record as text, with the token behind each answer that begins the user's next turn."""
    asked = tokenizer.apply_chat_template(
        record.messages, tokenize=False, add_generation_prompt=True
    )
    answers = tuple(f'{answer.strip()}<|end|><|user|>' for answer in record.responses)
    return record._replace(messages=asked, responses=answers, rendered=True)


# Models


def world(c: Config) -> World:
    """The two bases of one vocabulary, learned if they are not there."""
    names = tuple(synthetic.CATEGORIES) if c.base_domain else categories(c, False)
    read = [texts(c, c.base_texts, seed, names) for seed in (0, 1)]
    tokenizer = common.train_tokenizer(common.texts(read[0]), c.vocabulary)
    config = common.tiny(len(tokenizer), width=c.hidden_size, layers=c.num_hidden_layers)
    decoder = Decoder(config)
    lm = reward.RewardModel(decoder, heads.LanguageModel(config.V, tied=True))
    rm = reward.RewardModel(decoder, heads.Scalar())
    w = World(rm, lm, [], tokenizer, devices.mesh(c))
    of_flags = cache.digest({k: v for k, v in stored.flags(c).items() if k in OF_BASES})[:8]
    folders = [c.output_dir / of_flags / f'base-{i}' for i in range(2)]
    if not all((folder / 'config.json').exists() for folder in folders):
        starts = [lm.init_backbone(jax.random.key(seed)) for seed in (0, 1)]
        sets = [encoded(c, w, x) for x in read]
        pace = Pace(c.base_learning_rate, c.base_epochs, c.train_batch_size, weight_decay=0.1)
        made = language(w, starts, [Lesson(x, i) for i, x in enumerate(sets)], pace)
        like = checkpoint.Pretrained('llama', config, tokenizer)
        for folder, backbone in zip(folders, made, strict=True):
            params = {'backbone': backbone, 'head': {}}
            checkpoint.export(folder, params, like, head_kind='lm_head', overwrite=True)
    found = [checkpoint.load_pretrained(folder, kind='backbone') for folder in folders]
    return w._replace(bases=[like.backbone for like in found])


def language(
    w: World, starts: Sequence[tree.Tree], lessons: Sequence[Lesson], pace: Pace
) -> list[tree.Tree]:
    """The backbones of language models that began so."""
    start_E = members.stack([{'head': {}, 'backbone': x} for x in starts])
    shape = shape_of(w, lessons, pace)
    objective = train.language_modelling(w.lm.logits)
    made = jax.device_get(dmoerm.learned(pace, start_E, lessons, shape, objective, mesh=w.mesh))
    return [members.select(made, e)['backbone'] for e in range(len(starts))]


def shape_of(w: World, lessons: Sequence[Lesson], pace: Pace) -> Any:
    some = dmoerm.joined([lesson.tokens for lesson in lessons])
    return dmoerm.shape_of(some, w.rm.backbone.config.D, pace.batch)


def rewards(c: Config, w: World) -> list[tree.Tree]:
    """A reward model for each seed."""
    D = w.rm.backbone.config.D
    lessons = [Lesson(pairs(c, w, 'train', s, c.pairs, domain=False), s) for s in c.seeds]
    pace = Pace(c.learning_rate, c.num_train_epochs, c.train_batch_size, weight_decay=0.1)
    shape, start_S = shape_of(w, lessons, pace), dmoerm.whole(w.rm, w.bases[0], c.seeds, D)
    if c.probe_epochs:
        first = Pace(c.probe_learning_rate, c.probe_epochs, c.train_batch_size)
        start_S['head'] = dmoerm.probed(first, w.rm, w.bases[0], lessons, shape, mesh=w.mesh)
    made = dmoerm.learned(pace, start_S, lessons, shape, train.preference(w.rm.score), mesh=w.mesh)
    return [members.select(jax.device_get(made), e) for e in range(len(c.seeds))]


def others(c: Config, w: World, models: Sequence[tree.Tree]) -> dict[str, list[tree.Tree]]:
    """By kind and seed, what is mixed into the reward models."""
    read = [encoded(c, w, texts(c, c.domain_texts, s, categories(c, True))) for s in c.seeds]
    lessons = [Lesson(x, s) for _ in w.bases for x, s in zip(read, c.seeds, strict=True)]
    starts = [base for base in w.bases for _ in c.seeds]
    pace = Pace(c.domain_learning_rate, c.domain_epochs, c.train_batch_size, weight_decay=0.1)
    made, S = language(w, starts, lessons, pace), len(c.seeds)
    both = [*zip(models, made[:S], c.seeds, strict=True)]
    each = (made[:S], made[S:], [dogerm.shuffled(lm, seed) for _, lm, seed in both],
            [dogerm.noise(rm['backbone'], lm, seed) for rm, lm, seed in both])  # fmt: skip
    return dict(zip(KINDS, each, strict=True))


# Cells


def cells(c: Config, kinds: Sequence[str]) -> None:
    """What is missing."""
    w = world(c)
    models = rewards(c, w)
    common.console.print('reward models: learned')
    mixed_in = others(c, w, models)
    common.console.print('language models: learned')
    score, of = jax.jit(w.rm.score), dogerm.shares(c.shares)
    sets = {
        'validation': pairs(c, w, 'validation', 0, c.test_pairs, domain=True),
        'domain': pairs(c, w, 'test', 0, c.test_pairs, domain=True),
        'others': pairs(c, w, 'test', 0, c.test_pairs, domain=False),
    }
    shape = dmoerm.shape_of(dmoerm.joined(list(sets.values())), c.hidden_size, 64)
    sweep = functools.partial(dogerm.swept, score, shape=shape, shares=of, mesh=w.mesh)
    for kind in kinds:
        found = [
            {name: sweep(rm, other, some) for name, some in sets.items()}
            for rm, other in zip(models, mixed_in[kind], strict=True)
        ]
        picks = [dogerm.chosen(of, x['validation'].right_Kn, x['domain'].right_Kn) for x in found]
        curves = {
            f'{name} {what}': labelling.rounded([value(x[name]) for x in found])
            for name in sets
            for what, value in MEASURES.items()
        }
        said = {'flags': stored.flags(c), 'shares': of, 'picks': picks, 'curves': curves}
        common.write_json(path(c, kind), said)
        common.console.print(f'{kind}: done')


MEASURES = {
    'accuracy': lambda x: x.right_Kn.mean(1),
    'mean': lambda x: x.mean_K,
    'std': lambda x: x.std_K,
}


def path(c: Config, kind: str) -> Path:
    return c.results / f'{kind.replace(" ", "_")}.json'


def table(c: Config) -> None:
    """A row for each kind of other model; curves as pictures."""
    found = {kind: stored.read(path(c, kind), stored.flags(c)) for kind in KINDS}
    found = {kind: x for kind, x in found.items() if x}
    if not found:
        return
    rows = {}
    for kind, x in found.items():
        others_SK = np.array(x['curves']['others accuracy'])
        at = [x['shares'].index(pick['share']) for pick in x['picks']]
        there = others_SK[np.arange(len(at)), at]
        rows[kind] = [*dogerm.gains(x['picks']).values(),
                      f'{others_SK[:, 0].mean():.3f} to {there.mean():.3f}']  # fmt: skip
    columns = [*dogerm.gains(found[next(iter(found))]['picks']), 'other categories']
    common.table(f'{c.domain}: {len(c.seeds)} seeds', rows, columns, paste=True)
    curve = lambda name: {k: np.array(x['curves'][name]) for k, x in found.items()}  # noqa: E731
    of = found[next(iter(found))]['shares']
    panels = {c.domain: curve('domain accuracy'), 'other categories': curve('others accuracy')}
    dogerm.picture(panels, of, c.results / 'curves.png')
    panels = {'mean reward': curve('domain mean'), 'deviation': curve('domain std')}
    dogerm.picture(panels, of, c.results / 'drift.png', y='reward on the domain')


def main(c: Config) -> None:
    """Learn what is missing, then print and draw."""
    missing = [kind for kind in KINDS if not path(c, kind).exists()]
    if missing and not c.only_table:
        cells(c, missing)
    table(c)


if __name__ == '__main__':
    common.launch(Config, main)
