"""DMoERM, phase 2: an expert of each capability, an adapter of its category's base with a head.

Run:     python -m experiments.dmoerm_experts --labels labels.jsonl  # of label_capabilities
         (on the synthetic world without it: a stand-in judge labels the pairs)
Cost:    three minutes on two CPU cores for tiny models on the world's pairs
Expect:  CATEGORY/experts/CAPABILITY in the folder; accuracies are told by dmoerm_mixture

All experts of a category learn in one program, with as many packs a step for each; one whose
labels are used up stays as it is. The base is frozen. Heads start as copies of the base's and
learn, unless --freeze_head. Labels of a prompt of the test set, or of no expert, are refused.
"""

import dataclasses
from pathlib import Path

import jax

from experiments import common, devices, dmoerm, dmoerm_phases
from experiments.dmoerm_phases import Found, Phase
from jaxrm import data, judge, lora, mixture, mixture_files, sharding, train
from jaxrm.data import Preference
from jaxrm.datasets import stand_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Phase):
    learning_rate: float = 2e-3
    num_train_epochs: int = 1
    labels: Path | None = None  # pairs whose group is CATEGORY/CAPABILITY
    freeze_head: bool = False  # as the paper's released code does
    lora_r: int = 32
    lora_alpha: float = 32.0
    lora_target_modules: str = lora.QV
    judge_noise: float = 0.1  # of the world's stand-in judge, as its waver
    judge_position: float = 0.1


def main(c: Config) -> None:
    """Train what is missing."""
    found = dmoerm_phases.begin(c)
    labels = judge.by_group(labelled(c, found))
    for category in found.plan.categories:
        folder = c.output_dir / category
        dmoerm_phases.check_there(folder / mixture_files.BASE, 'dmoerm_base')
        names = found.plan.capabilities[category]
        base = mixture_files.digest(folder / mixture_files.BASE)
        done = [
            dmoerm_phases.finished(folder / mixture_files.EXPERTS / name, c, base_digest=base)
            for name in names
        ]
        if not all(done):
            experts(c, found, category, labels)


def labelled(c: Config, found: Found) -> list[Preference]:
    """Capability labels; no prompt of the test set is among them, nor was shown to the judge."""
    if c.labels:
        loaded = data.load(c.labels, layout=c.layout, chat=c.chat).records
        dmoerm_phases.check_apart(loaded, found.data.test, 'labels')
        check_known(loaded, found)
        return loaded
    if c.dataset_train:
        raise ValueError('labels: found none, expected those of experiments.label_capabilities')
    answer = stand_in.judge(noise=c.judge_noise, waver=c.judge_noise, position=c.judge_position)
    points = {k: dict.fromkeys(names, '') for k, names in found.plan.capabilities.items()}
    asked = judge.comparisons(
        found.data.train, points, excluded=[r.messages for r in found.data.test]
    )
    return list(judge.labels(judge.verdicts(asked, answer), found.data.train))


def check_known(labels: list[Preference], found: Found) -> None:
    """Raises ValueError for labels of no expert; says how many are of prompts of their own."""
    plan = found.plan
    known = {judge.expert(k, name) for k in plan.categories for name in plan.capabilities[k]}
    if odd := [label.group for label in labels if label.group not in known]:
        expected = f'expected one of {sorted(known)}'
        raise ValueError(
            f'labels: found {len(odd)} of {len(labels)} of groups as {odd[0]!r}, {expected}'
        )
    human = {repr(record.messages) for record in found.data.train}
    if own := sum(repr(label.messages) not in human for label in labels):
        common.console.print(f'{own} of {len(labels)} labels are of prompts without a human label')


def experts(c: Config, found: Found, category: str, labels: dict[str, list[Preference]]) -> None:
    """Those of one category, written to the folder."""
    base, lessons = mixture_files.load_base(c.output_dir, category), []
    for i, name in enumerate(found.plan.capabilities[category]):
        group = judge.expert(category, name)
        if not (pairs := labels.get(group)):
            raise ValueError(f'{c.labels or "judge"}: found no label of {group!r}')
        shown = [mixture.shown(pair, found.plan.turns) for pair in pairs]
        some = dmoerm_phases.encoded(c, shown, base.tokenizer, group)
        lessons.append(dmoerm.Lesson(some, c.seed + i))
    start_E = dmoerm.experts([base.params], len(lessons), seeds=[c.seed], rank=c.lora_r,
                             targets=c.lora_target_modules)  # fmt: skip
    head_E = {'head': start_E.pop('head')} if c.freeze_head else {}
    frozen = {'backbone': base.backbone, **({'head': base.head} if c.freeze_head else {})}
    scale = c.lora_alpha / c.lora_r
    rm = mixture_files.reward_model(base, found.mesh, scale)
    all_of = dmoerm.joined([lesson.tokens for lesson in lessons])
    shape = dmoerm.shape_of(all_of, base.config.D, c.train_batch_size,
                            sharding.data_parallel(found.mesh))  # fmt: skip
    pace = dmoerm.Pace(c.learning_rate, c.num_train_epochs, c.train_batch_size, c.warmup_steps)
    learned = dmoerm.learned(
        pace, start_E, lessons, shape, train.preference(rm.score), mesh=found.mesh, frozen=frozen,
        saver=dmoerm_phases.saver(c, f'{category}/experts', all_of),
        how=devices.how(c, rm, shape, found.mesh, len(lessons)),
    )  # fmt: skip
    mixture_files.export_experts(
        c.output_dir, category, {**jax.device_get(learned), **head_E}, base, lora_scale=scale,
        provenance=dmoerm_phases.provenance(c), overwrite=True,
    )  # fmt: skip


if __name__ == '__main__':
    common.launch(Config, main)
