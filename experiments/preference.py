"""A Bradley-Terry reward model on preference pairs, beside what needs no model.

Run:     python -m experiments.preference --dataset_train pairs.jsonl --dataset_test test.jsonl
         (add --model_name_or_path DIR --use_peft for a LoRA adapter on a pretrained decoder)
Cost:    a minute or two on two CPU cores for a tiny model from scratch on 1,500 pairs
Expect:  see the table of real data in BENCHMARKS.md

Writes an HF checkpoint, learning curves, a score histogram and result.json into output_dir; a
stopped run goes on, a finished one is not run again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import common
from jaxrm import baselines, checkpoint, data, evaluate, logs, report, sharding, tokens, train


@dataclasses.dataclass(frozen=True)
class Config(common.Model, common.Training):
    dataset_train: str = tyro.MISSING  # .jsonl(.gz), .json, .parquet or hub name
    dataset_test: str = tyro.MISSING
    output_dir: Path = Path('runs/preference')
    learning_rate: float = 1e-3
    num_train_epochs: int = 3
    weight_decay: float = 0.1
    center_rewards_coefficient: float = 0.0
    chat: bool = False  # plain strings become a user and an assistant turn
    layout: str | None = None  # which columns to read, where there are those of several
    eval_steps: int = 100
    cache: Path | None = Path('runs/cache')  # of tokens
    result: Path | None = None  # a second copy of result.json


def main(c: Config) -> None:
    """Train, evaluate, export."""
    if common.finished(c):
        return
    mesh = sharding.make_mesh()
    train_set, test_set = (
        data.load(n, layout=c.layout, chat=c.chat) for n in (c.dataset_train, c.dataset_test)
    )
    common.console.print(f'{train_set.mapping}\n{test_set.mapping}')
    start = common.start(c, common.texts(train_set.records), seed=c.seed)
    encoded, test = (
        tokens.encode(x.records, start.like.tokenizer, max_length=limit, cache=c.cache)
        for x, limit in ((train_set, c.max_length), (test_set, None))
    )
    common.console.print(f'train: {encoded.report}\ntest: {test.report}')
    records = [test_set.records[i] for i in test.tokens.record]
    objective = train.preference(
        start.rm.score, center_rewards_coefficient=c.center_rewards_coefficient
    )
    log: list[logs.Log] = []

    def held_out(done: int, state: train.State, metrics: Any) -> None:
        log[0].flush()
        params = {**start.frozen, **state.trainable}
        found = evaluate.pairs(
            evaluate.ranks(records), common.scores(start.rm, params, test.tokens, mesh)
        )
        log[0].write(done, {f'eval_{k}': np.nanmean(v) for k, v in found._asdict().items()})

    learned = common.run(
        c, start.trainable, start.frozen, encoded.tokens, objective,
        mesh=mesh, width=start.like.config.D, what={'experiment': 'preference'},
        hooks=[(c.eval_steps, held_out)], log_to=log.append,
    )  # fmt: skip
    params = {**start.frozen, **learned}
    found = {
        'reward model': common.scores(start.rm, params, test.tokens, mesh),
        'longer wins': baselines.longer_wins(records),
        'bag of words': baselines.bag_of_words(train_set.records)(records),
    }
    right = {k: evaluate.pairs(evaluate.ranks(records), v).accuracy for k, v in found.items()}
    intervals = {name: evaluate.interval(x) for name, x in right.items()}
    common.table(f'{c.dataset_test}: accuracy', {k: [v] for k, v in intervals.items()}, ['95 %'])
    report.curves(logs.read(c.output_dir / 'metrics.jsonl'), c.output_dir / 'curves.png')
    sides = common.sides(evaluate.ranks(records), found['reward model'])
    report.histogram(sides, c.output_dir / 'scores.png')
    provenance = {'experiment': 'preference', **common.identity(c)}
    checkpoint.export(
        c.output_dir / 'model', params, start.like, lora_scale=start.rm.lora_scale,
        provenance=provenance, overwrite=True,
    )  # fmt: skip
    result = {
        'accuracy': intervals,
        'right': [round(float(x), 4) for x in right['reward model']],
        'train': encoded.report._asdict(),
        'test': test.report._asdict(),
        'flags': common.identity(c),
    }
    for path in filter(None, (c.result, c.output_dir / 'result.json')):
        common.write_json(path, result)


if __name__ == '__main__':
    common.launch(Config, main)
