"""What the pass through the decoder costs, once, and what an epoch of the gate costs after it.

Run:     python -m experiments.pretrain; python -m experiments.armorm_cost
Cost:    a minute on two CPU cores, after the first line
Expect:  the line on time in BENCHMARKS.md's section on the gate

The pairs of the synthetic world go into a fresh folder of features; the gate then learns from them,
over objectives drawn at random, which take as long as others. The first epoch compiles. Seconds are
of the clock and, where others use the machine, too, of all threads' work.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import armorm, common, devices, gating
from jaxrm import features, train
from jaxrm.datasets import synthetic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gating.Gating, devices.Devices):
    model_name_or_path: str = 'runs/pretrain/model'
    pairs: int = 12_000
    train_batch_size: int = 500
    gating_hidden_dim: int = 128
    epochs: int = 6


def now() -> tuple[float, float]:
    """Seconds of the clock, and of work."""
    return time.perf_counter(), time.process_time()


def learned(c: Config, of: features.Cached, pairs: Any, mesh: Any) -> np.ndarray:
    """[epochs, 2] seconds of each; the first has the ratings of all answers, too."""
    rng, times = np.random.default_rng(0), [now()]
    D, J = of.answer_cD.shape[1], len(synthetic.QUALITIES)
    head = gating.plain(J) | {'regression': {'kernel': rng.normal(size=(D, J)).astype(np.float32)}}
    rm, of = gating.model(c, J), gating.rated(head, of)
    gate = gating.start(rm, D, seed=0, scale=c.initial_scale)
    state = train.start({'gate': gate}, gating.optimiser(c)[1], mesh)
    batches = gating.stream(c, of, pairs, mesh, 0)

    def clock(step: int, state: train.State, metrics: train.Metrics) -> None:
        jax.block_until_ready(state.trainable)
        times.append(now())

    every = -(-len(batches.records) // c.train_batch_size)
    c = dataclasses.replace(c, max_steps=every * c.epochs)
    gating.fit(c, rm, state, batches, jax.random.key(0), mesh=mesh, hooks=[(every, clock)])
    return np.diff(times, axis=0)


def main(c: Config) -> None:
    """One pass, some epochs, and how they compare."""
    mesh = devices.mesh(c)
    with tempfile.TemporaryDirectory() as folder:
        flags = armorm.Data(
            model_name_or_path=c.model_name_or_path, features=Path(folder), pairs=c.pairs
        )
        armorm.sets(flags, armorm.tokenizer(flags), ('pairs',))  # tokens, which are kept
        start = now()
        found = armorm.compute(flags, mesh, ('pairs',))['pairs']
        of, passed = features.gather(flags.features, found.tokens), np.subtract(now(), start)
    first, *later = learned(c, of, found.tokens, mesh)
    unique, epoch = len(set(features.names(found.tokens))), np.median(later, axis=0)
    rows = {
        'features': passed, 'first gate epoch': first, 'later ones, median': epoch,
        'least': np.min(later, axis=0), 'most': np.max(later, axis=0),
    }  # fmt: skip
    share = epoch / (passed + first)
    cells = {name: [f'{x:.3f}' for x in seconds] for name, seconds in rows.items()}
    cells['later / first with features'] = [f'{x:.2%}' for x in share]
    title = f'{len(found.records)} records, {unique} unique, gate {c.gating_hidden_dim} wide'
    common.table(title, cells, ['seconds', 'of work'], paste=True)


if __name__ == '__main__':
    common.launch(Config, main)
