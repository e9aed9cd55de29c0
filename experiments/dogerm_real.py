"""A language model of sums merged into reward models of real pairs, from one pretrained decoder.

Run:     JAXRM_DATA=DIR python -m experiments.real_data    # whose models and start this takes
         JAXRM_DATA=DIR python -m experiments.dogerm_real  # what is missing, then the table
         python -m experiments.dogerm_real --only_table    # from experiments/results/dogerm_real
Cost:    about 15 minutes on two CPU cores, after the first line
Expect:  the table of DogeRM on real data in BENCHMARKS.md

A language model for each seed goes on from the decoder with the solutions of GSM8K's train
problems, written as the pairs have them. A cell is the reward model of a set and a seed, mixed with
it at every share. Pairs of a right and a wrong solution of test problems are halved: one half
chooses the share, the other says what it is worth. The reward model's own test file shows what the
merge costs there.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, devices, dmoerm, dogerm, labelling, stored
from experiments.dmoerm import Lesson, Pace
from jaxrm import backbones, checkpoint, data, heads, members, reward, tokens, train
from jaxrm.backbones import attention
from jaxrm.data import Preference

RESULTS = dogerm.RESULTS / 'dogerm_real'
SUBSET = 'gsm8k-correctness'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(devices.Devices):
    model_name_or_path: str = 'runs/real_data/pretrain/model'  # what all began from
    models: Path = Path('runs/real_data')  # output_dir of experiments.real_data
    output_dir: Path = Path('runs/dogerm_real')  # of the language models
    results: Path = RESULTS
    sets: tuple[str, ...] = ('qa_feedback', 'hh_harmless')
    seeds: tuple[int, ...] = (0, 1, 2)
    shares: int = 11
    test_pairs: int = 150  # of the set's own
    texts: int = 7473
    learning_rate: float = 1e-3
    num_train_epochs: int = 2
    train_batch_size: int = 16
    max_length: int = 256
    only_table: bool = False


def solution(answer: str) -> str:
    """One of GSM8K's, without the calculator's marks."""
    return re.sub(r'<<.*?>>', '', answer).replace('\n#### ', '\nA: ')


def language_models(c: Config, folder: Path) -> list[Path]:
    """A folder for each seed, learned in one program if one is not there."""
    paths = [c.output_dir / f'lm-{seed}' / 'model' for seed in c.seeds]
    if all((path / 'config.json').exists() for path in paths):
        return paths
    rows = [row for _, row in data.read(folder / 'domain' / 'math_gsm8k_train.jsonl.gz')]
    records = [
        Preference(({'role': 'user', 'content': row['question']},), (solution(row['answer']),))
        for row in rows[: c.texts]
    ]
    mesh, like = devices.mesh(c), checkpoint.load_pretrained(c.model_name_or_path, kind='causal_lm')
    attend = attention.default(like.dtype, like.config, mesh)
    decoder = backbones.family(like.model_type).Backbone(like.config, like.dtype, attend)
    lm = reward.RewardModel(decoder, heads.LanguageModel(like.config.V, tied=like.config.tied))
    some = tokens.encode(records, like.tokenizer, max_length=c.max_length).tokens
    start = {'backbone': like.backbone, 'head': like.head or {}}
    made = jax.device_get(dmoerm.learned(
        Pace(c.learning_rate, c.num_train_epochs, c.train_batch_size),
        members.stack([start] * len(c.seeds)), [Lesson(some, seed) for seed in c.seeds],
        dmoerm.shape_of(some, like.config.D, c.train_batch_size),
        train.language_modelling(lm.logits), mesh=mesh,
    ))  # fmt: skip
    for e, path in enumerate(paths):
        params = members.select(made, e)
        checkpoint.export(path, params, like, head_kind='lm_head', overwrite=True)
    return paths


def halves(folder: Path) -> tuple[list[Preference], list[Preference]]:
    """The pairs to choose by, and those to test on, which have other problems."""
    rows = data.read(folder / 'rewardbench' / 'extra_pairs.jsonl.gz')
    columns = ('prompt', 'chosen', 'rejected')
    kept = [(w, {k: row[k] for k in columns}) for w, row in rows if row['subset'] == SUBSET]
    records = data.preferences(kept, chat=True).records
    sides = data.split_by_prompt(records, 0.5, seed=0)
    first, second = ([records[i] for i in side] for side in sides)
    return first, second


def cell(c: Config, folder: Path, name: str, model: str, lm: str) -> dict[str, Any]:
    """A reward model at every share."""
    of, at = dogerm.mixed(model, lm), dogerm.shares(c.shares)
    validation, test = halves(folder)
    own = data.load(folder / 'preference' / f'{name}.test.jsonl.gz').records[: c.test_pairs]
    sets = {'validation': validation, 'domain': test, 'own': own}
    found = {k: dogerm.records_swept(of, x, at, max_length=4 * c.max_length)
             for k, x in sets.items()}  # fmt: skip
    return {
        'shares': at,
        'pick': dogerm.chosen(at, found['validation'].right_Kn, found['domain'].right_Kn),
        'curves': {k: labelling.rounded(x.right_Kn.mean(1)) for k, x in found.items()},
        'mean': labelling.rounded(found['domain'].mean_K),
        'std': labelling.rounded(found['domain'].std_K),
    }


def path(c: Config, name: str, seed: int) -> Path:
    return c.results / f'{name}-{seed}.json'


def flags(c: Config) -> dict[str, Any]:
    """Those that a cell depends on."""
    names = ('shares', 'test_pairs', 'texts', 'learning_rate', 'num_train_epochs',
             'train_batch_size', 'max_length')  # fmt: skip
    return {name: getattr(c, name) for name in names}


def table(c: Config) -> None:
    """A row for each set's reward models; the curves."""
    rows, domain, own = {}, {}, {}
    for name in c.sets:
        every = [stored.read(path(c, name, seed), flags(c)) for seed in c.seeds]
        if found := [x for x in every if x]:
            domain[name], own[name] = (
                np.array([x['curves'][k] for x in found]) for k in ('domain', 'own')
            )
            gains = dogerm.gains([x['pick'] for x in found])
            ends = [f'{own[name][:, k].mean():.3f}' for k in (0, -1)]
            rows[name] = [*gains.values(), ', '.join(ends)]
            at, columns = found[0]['shares'], [*gains]
    if rows:
        title = f'{len(c.seeds)} seeds: right solutions of GSM8K above wrong ones'
        common.table(title, rows, [*columns, 'own pairs at 0, at 1'], paste=True)
        panels = {'solutions': domain, "the reward model's own pairs": own}
        dogerm.picture(panels, at, c.results / 'curves.png')


def main(c: Config) -> None:
    """Learn and score what is missing, then print and draw."""
    cells = [(name, seed) for name in c.sets for seed in c.seeds]
    missing = [] if c.only_table else [x for x in cells if not path(c, *x).exists()]
    if missing:
        if not (given := os.environ.get('JAXRM_DATA')):
            raise ValueError('JAXRM_DATA: found nothing, expected a folder with domain/*')
        folder = Path(given)
        lms = dict(zip(c.seeds, language_models(c, folder), strict=True))
        for name, seed in missing:
            model = c.models / f'{name}-pretrained-{seed}' / 'model'
            made = cell(c, folder, name, str(model), str(lms[seed]))
            common.write_json(path(c, name, seed), {'flags': flags(c), **made})
            common.console.print(f'{name}, seed {seed}: done')
    table(c)


if __name__ == '__main__':
    common.launch(Config, main)
