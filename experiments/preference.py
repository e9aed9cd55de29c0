"""A Bradley-Terry reward model on preference pairs, beside what needs no model.

Run:     python -m experiments.preference --dataset_train pairs.jsonl --dataset_test test.jsonl
         (add --model_name_or_path DIR --use_peft for a LoRA adapter on a pretrained decoder)
Cost:    a minute or two on two CPU cores for a tiny model from scratch on 1,500 pairs
Expect:  see the table of real data in BENCHMARKS.md

Writes an HF checkpoint, learning curves, a score histogram and result.json into output_dir; a
stopped run goes on, a finished one is not run again.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from experiments import common, devices
from jaxrm import (
    baselines,
    data,
    evaluate,
    logs,
    losses,
    processes,
    report,
    reward,
    sharding,
    statistics,
    tokens,
    train,
)


@dataclasses.dataclass(frozen=True)
class Config(common.Model, common.Training, common.Hub):
    dataset_train: str = tyro.MISSING  # .jsonl(.gz), .json, .parquet or hub name
    dataset_test: str = tyro.MISSING
    output_dir: Path = Path('runs/preference')
    learning_rate: float = 1e-3
    num_train_epochs: int = 3
    weight_decay: float = 0.1
    center_rewards_coefficient: float = 0.0
    loss: Literal['bradley_terry', 'scaled', 'robust', 'saturating'] = 'bradley_terry'
    robust_epsilon: float = 0.1  # the share of flipped labels that the robust loss expects
    lm_coefficient: float = 0.0  # of the text of the better answers, on a language model
    chat: bool = False  # plain strings become a user and an assistant turn
    layout: str | None = None  # which columns to read, where there are those of several
    eval_steps: int = 100
    cache: Path | None = Path('runs/cache')  # of tokens
    result: Path | None = None  # a second copy of result.json


def main(c: Config) -> None:
    """Train, evaluate, export."""
    if common.finished(c):
        return
    mesh, repo = devices.mesh(c), common.repository(c)
    train_set, test_set = (
        data.load(n, layout=c.layout, chat=c.chat) for n in (c.dataset_train, c.dataset_test)
    )
    common.console.print(f'{train_set.mapping}\n{test_set.mapping}')
    check_margins(c, train_set)
    language = c.lm_coefficient > 0
    said = common.texts(train_set.records)
    start = common.start(c, said, mesh=mesh, seed=c.seed, language=language)
    cache = {'cache': c.cache, 'write': processes.first()}
    encoded, test = (
        tokens.encode(x.records, start.like.tokenizer, max_length=limit, **cache)
        for x, limit in ((train_set, c.max_length), (test_set, None))
    )
    common.console.print(f'train: {encoded.report}\ntest: {test.report}')
    records = [test_set.records[i] for i in test.tokens.record]
    start = devices.economical(c, start, encoded.tokens, mesh)
    objective = objective_of(c, start.rm)
    frozen = sharding.place(start.frozen, mesh)
    held_out = functools.partial(
        evaluate.hook, common.compiled(start.rm), test, frozen=frozen, mesh=mesh,
        width=start.like.config.D, center_rewards_coefficient=c.center_rewards_coefficient,
    )  # fmt: skip
    learned = common.run(
        c, start.trainable, frozen, encoded.tokens, objective,
        mesh=mesh, width=start.like.config.D,
        what={'experiment': 'preference', 'start': start.digest},
        evaluations=lambda log: [(c.eval_steps, held_out(log=log))],
    )  # fmt: skip
    params = {**frozen, **learned}
    found = {
        'reward model': common.scores(start.rm, params, test.tokens, mesh),
        'longer wins': baselines.longer_wins(records),
        'bag of words': baselines.bag_of_words(train_set.records)(records),
    }
    right = {k: evaluate.pairs(evaluate.ranks(records), v).accuracy for k, v in found.items()}
    prompts = evaluate.prompts(records)
    intervals = {name: evaluate.interval(x, prompts=prompts) for name, x in right.items()}
    common.table(f'{c.dataset_test}: accuracy', {k: [v] for k, v in intervals.items()}, ['95 %'])
    sides = common.sides(evaluate.ranks(records), found['reward model'])
    processes.alone(lambda: pictures(c.output_dir, sides))
    common.export(c, params, start.like, start.rm.lora_scale, 'preference')
    metrics = {f'held-out accuracy of {name}': x for name, x in intervals.items()}
    common.publish(c, repo, start.like.tokenizer, metrics)
    result = {
        'accuracy': intervals,
        'right': [round(float(x), 4) for x in right['reward model']],
        'train': encoded.report._asdict(),
        'test': test.report._asdict(),
        'flags': common.identity(c),
    }
    for path in filter(None, (c.result, c.output_dir / 'result.json')):
        common.write_json(path, result)


def objective_of(c: Config, rm: reward.RewardModel) -> train.Objective:
    """What the flags ask for."""
    loss: Callable[..., Any] = {
        'bradley_terry': losses.bradley_terry,
        'scaled': losses.scaled_bradley_terry,
        'saturating': losses.saturating,
        'robust': functools.partial(losses.robust, epsilon=c.robust_epsilon),
    }[c.loss]
    centering = {'center_rewards_coefficient': c.center_rewards_coefficient}
    if not c.lm_coefficient:
        return train.preference(rm.score, loss, **centering)
    a = c.lm_coefficient
    return train.generative(rm.score_and_logits, loss, lm_coefficient=a, **centering)


def check_margins(c: Config, found: data.Loaded) -> None:
    """Raises ValueError for a pair that the scaled loss would give no weight, or a negative one."""
    if c.loss != 'scaled':
        return
    for record, where in zip(found.records, found.where, strict=True):
        margins = record.margins or (0.0,) * len(record.responses)
        pairs = statistics.ordered([record.ranks or ()])
        if not all(margins[i] > margins[j] for i, j in zip(pairs.better, pairs.worse, strict=True)):
            expected = 'one above 0 for --loss scaled'
            raise ValueError(f'{where}: found the margins {record.margins}, expected {expected}')


def pictures(folder: Path, sides: dict[str, np.ndarray]) -> None:
    """Learning curves and the score histogram."""
    report.curves(logs.read(folder / 'metrics.jsonl'), folder / 'curves.png')
    report.histogram(sides, folder / 'scores.png')


if __name__ == '__main__':
    common.launch(Config, main)
