"""DMoERM, phase 1: a reward model of each category, the base of its experts.

Run:     python -m experiments.dmoerm_base               # after dmoerm_router, on the same data
Cost:    two minutes on two CPU cores for tiny models on the world's pairs
Expect:  CATEGORY/base in the folder; accuracies are told by dmoerm_mixture

Learns from 60 % of the human labels of a category, by prompt; the whole decoder and a head of its
own. Categories that are finished are not trained again, and a stopped one goes on.
"""

import dataclasses

import jax

from experiments import common, devices, dmoerm, dmoerm_phases
from experiments.dmoerm_phases import Found, Starting
from jaxrm import members, mixture_files, sharding, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Starting):
    learning_rate: float = 1e-3


def main(c: Config) -> None:
    """Train what is missing."""
    found = dmoerm_phases.begin(c)
    for category in found.plan.categories:
        path = c.output_dir / category / mixture_files.BASE
        if not dmoerm_phases.finished(path, c):
            texts = common.texts(found.data.train)
            start = common.start(c, texts, mesh=found.mesh, seed=c.seed)
            base(c, found, category, start)


def base(c: Config, found: Found, category: str, start: common.Start) -> None:
    """One category's, written to the folder."""
    records = dmoerm_phases.human(found, category, 'base')
    some = dmoerm_phases.encoded(c, records, start.like.tokenizer, category)
    parts = sharding.data_parallel(found.mesh)
    shape = dmoerm.shape_of(some, start.like.config.D, c.train_batch_size, parts)
    start = devices.kept(c, start, shape, found.mesh)
    pace = dmoerm.Pace(c.learning_rate, c.num_train_epochs, c.train_batch_size, c.warmup_steps)
    learned = dmoerm.learned(
        pace, members.stack([start.trainable]), [dmoerm.Lesson(some, c.seed)], shape,
        train.preference(start.rm.score), mesh=found.mesh, frozen=start.frozen,
        saver=dmoerm_phases.saver(c, f'{category}/base', some),
    )  # fmt: skip
    params = members.select(jax.device_get(learned), 0)
    mixture_files.export_base(c.output_dir, category, params, start.like,
                              provenance=dmoerm_phases.provenance(c))  # fmt: skip


if __name__ == '__main__':
    common.launch(Config, main)
