"""Several ratings of an answer by regression, beside the mean of the training ratings.

Run:     python -m experiments.ratings
         (or --dataset_train ratings.jsonl --dataset_test test.jsonl; --model_name_or_path DIR
         --use_peft for a LoRA adapter on a pretrained decoder)
Cost:    under a minute on two CPU cores for a tiny model on 6,000 prompts of the synthetic world
Expect:  a small part of the mean's squared error for what lies in the words (politeness,
         verbosity), and about all of it for what lies between prompt and answer (topic, relevance)

Stage 1 of ArmoRM (arXiv 2406.12845) by gradient: a missing rating takes no part. Writes an HF
classifier with one label for each objective, and result.json, into output_dir.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common, devices
from jaxrm import data, heads, processes, sharding, statistics, tokens, train
from jaxrm.datasets import synthetic


@dataclasses.dataclass(frozen=True)
class Config(common.Model, common.Training):
    dataset_train: str | None = None  # rated answers; by default of the synthetic world
    dataset_test: str | None = None
    output_dir: Path = Path('runs/ratings')
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    prompts: int = 6000  # of the synthetic world
    test_prompts: int = 1000
    chat: bool = False  # plain strings become a user and an assistant turn
    layout: str | None = None  # which columns to read, where there are those of several
    rating_columns: tuple[str, ...] = ()  # columns of one rating each
    cache: Path | None = Path('runs/cache')  # of tokens


def main(c: Config) -> None:
    """Train, evaluate, export."""
    if common.finished(c):
        return
    mesh = devices.mesh(c)
    names, train_set, test_set = sets(c)
    common.console.print(f'ratings: {", ".join(names)}')
    head = heads.MultiObjective(len(names))
    start = common.start(c, common.texts(train_set[:4000]), mesh=mesh, seed=c.seed, head=head)
    cache = {'cache': c.cache, 'write': processes.first()}
    encoded, test = (
        tokens.encode(records, start.like.tokenizer, max_length=limit, **cache)
        for records, limit in ((train_set, c.max_length), (test_set, None))
    )
    common.console.print(f'train: {encoded.report}\ntest: {test.report}')
    mean_J = means(encoded.tokens.rating, names)
    frozen = sharding.place(start.frozen, mesh)
    start = devices.economical(c, start, encoded.tokens, mesh)
    learned = common.run(
        c, start.trainable, frozen, encoded.tokens, train.regression(start.rm.score),
        mesh=mesh, width=start.like.config.D,
        what={'experiment': 'ratings', 'objectives': names, 'start': start.digest},
    )  # fmt: skip
    params = {**frozen, **learned}
    rate_cJ = np.concatenate(common.scores(start.rm, params, test.tokens, mesh))
    result = compare(names, rate_cJ, mean_J, test.tokens.rating)
    like = dataclasses.replace(start.like, objectives=tuple(names))
    common.export(c, params, like, start.rm.lora_scale, 'ratings')
    flags = common.identity(c)
    common.write_json(c.output_dir / 'result.json', {'objectives': result, 'flags': flags})


def sets(c: Config) -> tuple[list[str], list[data.Preference], list[data.Preference]]:
    """The objectives, and records with ratings of them, to train on and to test with."""
    if (c.dataset_train is None) != (c.dataset_test is None):
        raise ValueError('dataset_train, dataset_test: found one of them, expected both or none')
    if c.dataset_train is None:
        train_set = synthetic.preferences(c.prompts, seed=c.seed, labels='none')
        test = synthetic.preferences(c.test_prompts, seed=c.seed, split='test', labels='none')
        return list(synthetic.QUALITIES), train_set, test
    found = [
        data.load(name, layout=c.layout, chat=c.chat, rating_columns=c.rating_columns)
        for name in (c.dataset_train, c.dataset_test)
    ]
    common.console.print('\n'.join(x.mapping for x in found))
    names = [named(x) for x in found]
    if names[0] != names[1]:
        raise ValueError(f'{c.dataset_test}: found ratings of {names[1]}, expected {names[0]}')
    return names[0], found[0].records, found[1].records


def named(found: data.Loaded) -> list[str]:
    """The objectives of a set; its file may leave them without names."""
    for record, where in zip(found.records, found.where, strict=True):
        if not record.ratings:
            columns = f' (rating_columns of {", ".join(found.numbers)}?)' if found.numbers else ''
            message = f'found no ratings{columns}, expected one at least for each answer'
            raise ValueError(f'{where}: {message}')
    return list(found.objectives) or [
        f'rating {j}' for j in range(len(found.records[0].ratings[0]))
    ]


def means(rating_cJ: np.ndarray, names: list[str]) -> np.ndarray:
    """[J] means of the ratings that there are."""
    for name, rating_c in zip(names, rating_cJ.T, strict=True):
        if np.isnan(rating_c).all():
            raise ValueError(f'{name}: found no rating among the training records, expected some')
    return np.nanmean(rating_cJ, axis=0)


def compare(
    names: list[str], rate_cJ: np.ndarray, mean_J: np.ndarray, rating_cJ: np.ndarray
) -> dict[str, Any]:
    """Prints and returns the errors and rank correlations of each objective."""
    found = statistics.objectives(rate_cJ, rating_cJ)
    of_mean = statistics.objectives(np.broadcast_to(mean_J, rating_cJ.shape), rating_cJ)
    out = {
        name: {
            'rated': int(found.count_J[j]),
            'mse': float(found.mse_J[j]),
            'mse of the mean': float(of_mean.mse_J[j]),
            'spearman': float(found.spearman_J[j]),
        }
        for j, name in enumerate(names)
    }
    columns = ['rated', 'mse', 'mse of the mean', 'spearman']
    rows = {name: [f'{x:.4g}' for x in row.values()] for name, row in out.items()}
    common.table('held-out ratings', rows, columns)
    return out


if __name__ == '__main__':
    common.launch(Config, main)
