"""What the phases of DMoERM share: flags, the data and its parts, and what a phase must find.

The phases are dmoerm_router, dmoerm_base, dmoerm_experts and dmoerm_mixture. Each adds a part to
one folder (jaxrm.mixture_files), and leaves alone what the phases before it wrote.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments import common, devices
from jaxrm import (
    bundle,
    data,
    hf,
    judge,
    mixture,
    mixture_files,
    resume,
    routed,
    sharding,
    tokens,
    train,
)
from jaxrm.data import Preference
from jaxrm.datasets import synthetic
from jaxrm.mixture_files import Plan

WORLD = {
    'facts': ('confidence', 'politeness', 'verbosity'),
    'persona': ('persona', 'politeness', 'verbosity'),
    'arithmetic': ('completeness', 'format', 'politeness'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase(devices.Devices):
    """Flags of every phase; those of the data have to be the same in all of them."""

    output_dir: Path = Path('runs/dmoerm')  # the DMoERM
    dataset_train: str | None = None  # pairs with a group; by default of the synthetic world
    dataset_test: str | None = None
    layout: str | None = None
    chat: bool = False  # plain strings become a user and an assistant turn
    pairs: int = 6000  # of the world
    test_pairs: int = 900
    flips: float = 0.15  # share of the world's human labels that are turned round
    learning_rate: float
    num_train_epochs: int = 2
    train_batch_size: int = 16  # mean number of records in a step
    warmup_steps: int = 20
    save_steps: int = 500
    max_length: int = 512  # longer training records are left out
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Starting(Phase, common.Model):
    """Flags of a phase that trains whole models."""

    model_name_or_path: str | None = 'runs/pretrain/model'


class Data(NamedTuple):
    """Records to learn from, with their categories as groups, and to test on."""

    train: list[Preference]
    test: list[Preference]

    def of(self, category: str) -> list[Preference]:
        return [record for record in self.train if record.group == category]


def load(c: Phase, categories: Sequence[str]) -> Data:
    """The pairs of the flags; ValueError for a prompt of the test set among those to learn from."""
    if c.dataset_train is None:
        made = functools.partial(synthetic.preferences, seed=c.seed, categories=tuple(categories))
        found = made(c.pairs, split='train', flips=c.flips), made(c.test_pairs, split='test')
    else:
        names = filter(None, (c.dataset_train, c.dataset_test))
        sets = [data.load(name, layout=c.layout, chat=c.chat) for name in names]
        common.console.print('\n'.join(one.mapping for one in sets))
        found = sets[0].records, sets[1].records if len(sets) > 1 else []
    check_apart(found[0], found[1], 'dataset_train')
    return Data(*found)


def check_apart(records: Sequence[Preference], test: Sequence[Preference], what: str) -> None:
    """Raises ValueError for a prompt on both sides, whatever its spaces and its form."""

    def key(record: Preference) -> str:
        ids = isinstance(record.messages, data.Ids)
        return repr(record.messages) if ids else judge.words(record.messages)

    held = set(map(key, test))
    for n, record in enumerate(records):
        if key(record) in held:
            raise ValueError(f'{what}: record {n}: found a prompt of the test set')


def capabilities(path: Path | None, categories: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """By category, in the order of the file; without one those of the world."""
    given = WORLD if path is None else judge.read_points(path)
    names = categories or tuple(given)
    if missing := [name for name in names if not given.get(name)]:
        raise ValueError(f'capabilities: found none of {missing[0]!r}, expected at least one')
    return {name: tuple(given[name]) for name in names}


# What is there


def plan(c: Phase) -> Plan:
    """That of the folder, for the same data; ValueError where the router was not trained."""
    check_there(c.output_dir / mixture_files.FILE, 'dmoerm_router')
    check_there(c.output_dir / mixture_files.ROUTER, 'dmoerm_router')
    return mixture_files.read_plan(c.output_dir)


def check_there(path: Path, phase: str) -> None:
    """Raises ValueError naming the phase that makes it."""
    if not path.exists():
        raise ValueError(f'{path}: found nothing, expected what experiments.{phase} writes')


def check_data(c: Phase, found: Plan, of: Data) -> None:
    """Raises ValueError for other data than the router's: its parts would be others."""
    name, want = data.fingerprint(of.train), found.provenance.get('data')
    if name != want:
        raise ValueError(f'{c.output_dir}: is of data {str(want)[:12]}, found {name[:12]}')


def categorised(c: Phase, found: Plan, of: Data, mesh: Any) -> Data:
    """Every record with a category of the plan: its own group, or else the router's choice."""
    odd = [i for i, record in enumerate(of.train) if record.group not in found.categories]
    if not odd:
        return of
    router = mixture_files.load_router(c.output_dir)
    model = mixture_files.reward_model(router, mesh)
    params = sharding.place({'backbone': router.backbone, 'head': router.head}, mesh)
    logits_nC = routed.logits(
        jax.jit(model.score), params, [mixture.asked(of.train[i]) for i in odd], router.tokenizer,
        mesh=mesh, width=router.config.D,
    )  # fmt: skip
    out = list(of.train)
    for i, k in zip(odd, logits_nC.argmax(1).tolist(), strict=True):
        out[i] = out[i]._replace(group=found.categories[k])
    common.console.print(f'{len(odd)} records of no known category, by the router')
    return of._replace(train=out)


class Found(NamedTuple):
    """What a phase after the router starts from."""

    plan: Plan
    data: Data
    mesh: Any


def begin(c: Phase) -> Found:
    """The plan, the data it is of, and the mesh."""
    there, mesh = plan(c), devices.mesh(c)
    of = load(c, there.categories)
    check_data(c, there, of)
    return Found(there, categorised(c, there, of, mesh), mesh)


Side = Literal['base', 'mixture']


def human(found: Found, category: str, side: Side) -> list[Preference]:
    """A category's human labels: of 60 % of its prompts for the base, of the rest for the MLP."""
    mine = [mixture.shown(r, found.plan.turns) for r in found.data.of(category)]
    sides = dict(zip(('base', 'mixture'), data.split_by_prompt(mine, 0.4, seed=0), strict=True))
    if not sides[side]:
        raise ValueError(f'{category}: found no record for the {side}, expected some of its group')
    return [mine[i] for i in sides[side]]


def encoded(c: Phase, records: Sequence[Preference], tokenizer: Any, what: str) -> tokens.Tokens:
    """Token trees of those that are short enough."""
    out = tokens.encode(records, tokenizer, max_length=c.max_length)
    common.console.print(f'{what}: {out.report}')
    return out.tokens


def held(some: tokens.Tokens, records: Sequence[Preference], share: float) -> np.ndarray:
    """[n] bool: which records' prompts are held out inside a phase."""
    _, out = data.split_by_prompt(records, share, seed=1)
    return np.isin(some.record, out)


# Going on


def finished(path: Path, c: Phase, **more: Any) -> bool:
    """Whether a part is there, by these flags and `more`; ValueError for one of others."""
    if not path.exists():
        return False
    check_same(path, hf.read_json(path / bundle.FILE)['provenance'], {**provenance(c), **more})
    return True


def check_same(path: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says that a part is there; ValueError for one whose provenance is not the present one."""
    now = json.loads(json.dumps(now))
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise ValueError(
                f'{path}: is of a run with {name} {was.get(name)!r}, not {now.get(name)!r}'
            )
    common.console.print(f'{path} is there already')


def provenance(c: Phase) -> dict[str, Any]:
    """The flags that a part depends on, as JSON values; no part depends on the test set."""
    flags = {k: v for k, v in common.identity(c).items() if k not in ('dataset_test', 'test_pairs')}
    given = {k: v.name if isinstance(v, Path) else v for k, v in flags.items()}
    return {'experiment': type(c).__module__.rpartition('.')[2], **given}


def saver(c: Phase, name: str, of: tokens.Tokens) -> Callable[..., Any]:
    """For dmoerm.learned: a run that is stopped goes on where it was."""

    def begin(state: train.State, steps: int) -> tuple[train.State, Any]:
        folder = f'{devices.checkpoints(c)}/{name}'
        run = {**provenance(c), 'steps': steps, 'data': resume.digest(of)}
        run['start'] = resume.digest(state.trainable)
        state = resume.restore(folder, state, run=run)
        return state, resume.Saver(folder, steps=steps, every=c.save_steps, run=run)

    return begin
