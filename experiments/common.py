"""What several experiments share: flags in TRL's names, a tiny start, and a run from end to end."""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import devices, limits
from experiments.scratch import tiny, train_tokenizer
from jaxrm import (
    backbones,
    checkpoint,
    evaluate,
    fused,
    heads,
    hub,
    lora,
    packing,
    processes,
    programs,
    resume,
    reward,
    shapes,
    sharding,
    tokens,
    trackers,
    train,
    tree,
    usage,
)
from jaxrm.backbones import attention
from jaxrm.data import Preference
from jaxrm.logs import Log

# What is printed may be anybody's text: brackets and colons mean nothing in it.
console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(devices.Devices):
    """Flags of a run, by TRL's names where it has one."""

    output_dir: Path
    learning_rate: float
    num_train_epochs: int = 1
    max_steps: int = -1  # over num_train_epochs when positive
    train_batch_size: int = 32  # mean number of prompts in an optimiser step, over all devices
    gradient_accumulation_steps: int = 1
    packs: int | None = None  # in a step; by default one a device and accumulation step
    lr_scheduler_type: Literal['cosine', 'linear', 'constant'] = 'cosine'
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 512  # longer training records are dropped and counted; text is cut
    logging_steps: int = 50
    save_steps: int = 500
    report_to: tuple[Literal['none', 'tensorboard', 'wandb', 'trackio'], ...] = ('none',)
    project: str = 'jaxrm'  # of wandb and trackio
    run_name: str | None = None
    seed: int = 0


PATHS = {
    *('dataset_name', 'dataset_train', 'dataset_test', 'model_name_or_path'),
    *('dataset_ratings', 'dataset_pairs', 'dataset_reference', 'features', 'objectives'),
}


def parse(config: type) -> Any:
    """The experiment's Config from the command line; ValueError for a number out of its limits."""
    with usage.one_line():
        found = tyro.cli(config, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
    limits.check(found)
    return found


def launch(config: type, main: Callable[[Any], None]) -> None:
    """Runs an experiment; wrong input ends with status 2 and one line."""
    try:
        c = parse(config)
        trackers.choose(getattr(c, 'report_to', ()))  # what is missing, now rather than later
        several = programs.begin(os.environ)
        console.quiet = several and not processes.first()
        main(c)
        if several:
            processes.alone(lambda: None)  # to end together
    except (ValueError, OSError) as error:
        if os.environ.get('JAXRM_TRACEBACK'):
            raise
        console.quiet = False
        console.print(f'error: {" ".join(str(error).split())}')
        sys.exit(2)


def finished(c: Training) -> bool:
    """Whether the output folder has the result of these flags; ValueError if it is of others."""
    return processes.alone(lambda: _finished(c))


def _finished(c: Training) -> bool:
    path = c.output_dir / 'result.json'
    if not path.exists():
        return False
    found, flags = json.loads(path.read_text())['flags'], json.loads(json.dumps(identity(c)))
    for name in sorted(found.keys() | flags.keys()):
        if found.get(name) != flags.get(name):
            was, now = found.get(name), flags.get(name)
            raise ValueError(f'{path}: is of a run with {name} {was!r}, not {now!r}')
    console.print(f'{path} is there already')
    return True


def batches(c: Training, encoded: tokens.Tokens, mesh: Any, width: int) -> packing.Batches:
    """Packs of about `train_batch_size` prompts a step; says what came of it."""
    shape, packs = devices.packs(c, encoded, mesh, width)
    epochs = None if c.max_steps > 0 else c.num_train_epochs
    out = packing.Batches(encoded, shape, packs, seed=c.seed, epochs=epochs)
    steps = c.max_steps if c.max_steps > 0 else len(out)
    seen = out.counts(steps)
    prompts = np.diff(seen[:, 0])
    fill = seen[-1, 1] / (steps * packs * shape.tokens)
    console.print(
        f'{steps} steps of {packs} packs of {shape.tokens} tokens, filled {fill:.3f}: '
        f'{prompts.min()} to {prompts.max()}, in the mean {prompts.mean():.1f} prompts a step'
    )
    return out


def run(
    c: Training,
    trainable: tree.Tree,
    frozen: tree.Tree,
    encoded: tokens.Tokens,
    objective: train.Objective,
    *,
    mesh: Any,
    width: int,
    what: dict[str, Any],
    hooks: Sequence[train.Hook] = (),
    evaluations: Callable[[Log], Sequence[train.Hook]] = lambda log: (),
) -> tree.Tree:
    """What `trainable` became; goes on from the last checkpoint in the output folder, if any.

    `what` says what is run, and may have the digest of its `start`, all parameters, where those on
    the host are at hand. `evaluations` makes the hooks that write into the run's log.
    """
    stream = batches(c, encoded, mesh, width)
    steps = c.max_steps if c.max_steps > 0 else len(stream)
    counts = stream.counts(steps)
    rate = train.schedule(c.learning_rate, steps, warmup=c.warmup_steps, kind=c.lr_scheduler_type)
    tx = train.adamw(rate, weight_decay=c.weight_decay, max_grad_norm=c.max_grad_norm)
    if 'start' not in what:
        what = {**what, 'start': resume.digest([trainable, frozen])}
    what = {**what, **identity(c), 'steps': steps, 'data': resume.digest(encoded)}
    what |= {'packs': stream.packs, 'shape': str(stream.shape)}
    processes.check_same(what)
    saved = devices.checkpoints(c)
    state = resume.restore(saved, train.start(trainable, tx, mesh), run=what)
    log = Log(
        c.output_dir,
        steps=steps,
        start=int(state.step),
        logging_steps=c.logging_steps,
        progress=lambda step: {
            'epoch': counts[step, 0] / len(encoded.prompt), 'num_tokens': counts[step, 1]
        },
        schedule=rate,
        console=console,
        trackers=trackers.choose(
            c.report_to, project=c.project, run_name=c.run_name, config=what
        ),
    )  # fmt: skip
    saver = resume.Saver(saved, steps=steps, every=c.save_steps, run=what, before=log.flush)
    with log, saver:
        state = train.fit(
            state,
            frozen,
            stream,
            jax.random.key(c.seed),
            objective=objective,
            tx=tx,
            mesh=mesh,
            steps=steps,
            microbatches=c.gradient_accumulation_steps,
            hooks=[(1, log), *hooks, *evaluations(log), (1, saver)],
        )
    return state.trainable


def identity(c: Any) -> dict[str, Any]:
    """The flags that change what comes out, as JSON values; of paths the last part."""
    aside = (
        'output_dir',
        'logging_steps',
        'save_steps',
        'eval_steps',
        'report_to',
        'project',
        'run_name',
        'push_to_hub',
        'hub_model_id',
        'hub_private_repo',
        'cache',
        'result',
        *devices.ASIDE,
    )
    flags = {k: v for k, v in dataclasses.asdict(c).items() if k not in aside}
    for name in PATHS & flags.keys():
        given = flags[name] if isinstance(flags[name], tuple) else (flags[name],)
        flags[name] = [Path(path).name for path in given if path]
    return flags


@dataclasses.dataclass(frozen=True)
class Model:
    """Where a reward model starts, and which parts of it learn."""

    model_name_or_path: str | None = None  # HF folder or hub id; by default a tiny one from scratch
    use_peft: bool = False  # a LoRA adapter and the head, instead of everything
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_target_modules: str = lora.ALL_LINEAR  # searched in names like layers/q/kernel
    gradient_checkpointing: Literal['none', 'dots', 'mlp', 'full', 'auto'] = 'auto'
    dtype: Literal['float32', 'bfloat16', 'float16'] | None = None  # of compute; else the stored
    export_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None  # else as it was learned
    vocabulary: int = 1024  # from here on: of a start from scratch
    hidden_size: int = 64
    num_hidden_layers: int = 2


@dataclasses.dataclass(frozen=True)
class Hub:
    """Whether and where the exported model goes on the hub."""

    push_to_hub: bool = False
    hub_model_id: str | None = None  # as org/name
    hub_private_repo: bool = False


def repository(c: Hub) -> str | None:
    """The model's repository, made if it is asked for: a run is not to be lost at its end."""
    if not c.push_to_hub:
        return None
    return processes.alone(lambda: hub.create(c.hub_model_id, private=c.hub_private_repo))


def publish(c: Any, repo: str | None, tokenizer: Any, metrics: dict[str, Any]) -> None:
    """Puts a card into the exported model's folder, and the folder on the hub."""
    folder = c.output_dir / 'model'
    template = tokens.template_hash(tokenizer) if tokenizer.chat_template else None

    def send() -> str | None:
        about = {'base_model': c.model_name_or_path, 'datasets': [str(c.dataset_train)]}
        about |= {'metrics': metrics, 'template': template, 'flags': identity(c)}
        hub.write_card(folder, hub.card(repo or c.output_dir.name, **about))
        return hub.push(folder, repo) if repo else None

    if url := processes.alone(send):
        console.print(f'pushed: {url}')


class Start(NamedTuple):
    """A reward model before its first step."""

    rm: reward.RewardModel
    trainable: tree.Tree
    frozen: tree.Tree  # on the mesh, fused
    like: checkpoint.Pretrained
    digest: str  # of all parameters


def start(
    c: Model,
    texts: Iterable[str],
    *,
    mesh: Any,
    seed: int,
    head: Any = heads.Scalar(),  # noqa: B008 (frozen)
    language: bool = False,
) -> Start:
    """The model of `model_name_or_path` with a fresh head, or a tiny one made for these texts.

    With --gradient_checkpointing auto nothing is computed again, until `devices` sees the batch.
    With `language` the head of the language model stays beside it, frozen, as 'lm_head'.
    """
    if c.model_name_or_path is None:
        tokenizer = train_tokenizer(texts, c.vocabulary)
        config = tiny(len(tokenizer), width=c.hidden_size, layers=c.num_hidden_layers)
        like = checkpoint.Pretrained('llama', config, tokenizer)
    else:
        kind = 'causal_lm' if language else 'backbone'
        like = checkpoint.load_pretrained(c.model_name_or_path, kind=kind)
    heads_of = {'num_attention_heads': like.config.Q, 'num_key_value_heads': like.config.K}
    sharding.check_heads(mesh, **heads_of)
    dtype = jnp.dtype(c.dtype or (like.dtype if like.backbone else 'float32'))
    remat = 'none' if c.gradient_checkpointing == 'auto' else c.gradient_checkpointing
    backbone = backbones.family(like.model_type).Backbone(
        like.config, dtype, attention.default(dtype, like.config, mesh), remat
    )
    scale = c.lora_alpha / c.lora_r if c.use_peft else 1.0
    rm = reward.RewardModel(backbone, head, scale)
    keys = jax.random.split(jax.random.key(seed), 3)
    weights = like.backbone or rm.init_backbone(keys[0])
    learns = {'head': rm.init_head(keys[1], like.config.D)}
    if c.use_peft:
        targets = c.lora_target_modules
        learns['lora'] = lora.init(weights, keys[2], rank=c.lora_r, targets=targets)
        frozen = {'backbone': weights}
    else:
        learns['backbone'], frozen = weights, {}
    if language:
        frozen['lm_head'] = like.head or {}
    digest = resume.digest([learns, frozen])
    return Start(rm, learns, fused.place(frozen, mesh), like, digest)


def export(c: Any, params: tree.Tree, like: checkpoint.Pretrained, scale: float, what: str) -> None:
    """The reward model as a folder `model`; of a base from elsewhere its `adapter`, too."""
    said: dict[str, Any] = {'lora_scale': scale, 'overwrite': True}
    said['provenance'] = {'experiment': what, **identity(c)}
    parts = {part: params[part] for part in ('backbone', 'lora', 'head') if part in params}
    checkpoint.export(c.output_dir / 'model', parts, like, dtype=c.export_dtype, **said)
    if c.use_peft and c.model_name_or_path and what == 'preference':  # PEFT's have one label
        small, base = {k: parts[k] for k in ('lora', 'head')}, c.model_name_or_path
        checkpoint.export_adapter(c.output_dir / 'adapter', small, like, base=base, **said)


@functools.cache
def compiled(rm: reward.RewardModel) -> Callable[..., jax.Array]:
    """The model's score; made once, since every jax.jit of a method compiles anew."""
    return jax.jit(rm.score)


def scores(
    rm: reward.RewardModel, params: tree.Tree, encoded: tokens.Tokens, mesh: Any
) -> list[np.ndarray]:
    """Scores [M], or [M, J], of every record that was encoded."""
    width = rm.backbone.config.D
    shape = shapes.fit(encoded, size=4096, width=width, multiple=attention.row_multiple())
    packs = sharding.data_parallel(mesh)
    found = evaluate.candidate_scores(compiled(rm), params, encoded, shape, mesh=mesh, packs=packs)
    return evaluate.by_record(found, encoded)


def sides(ranks: Sequence[Sequence[int]], scores: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The scores of all best answers and of all others, by name."""
    rank, score = (np.concatenate([np.asarray(x) for x in each]) for each in (ranks, scores))
    return {'chosen': score[rank == 0], 'rejected': score[rank > 0]}


def texts(records: Sequence[Preference]) -> Iterator[str]:
    """What is said in the records, each prompt and answer apart."""
    for record in records:
        yield from (m['content'] for m in _turns(record.messages))
        for response in record.responses:
            yield from (m['content'] for m in _turns(response))


def _turns(said: Any) -> Iterable[dict[str, Any]]:
    return ({'content': said},) if isinstance(said, str) else said


def table(
    title: str, rows: dict[str, Sequence[Any]], columns: Sequence[str], *, paste: bool = False
) -> None:
    """Prints a table; with `paste` its rows in Markdown, too."""
    out = Table(title=title)
    for name in ('', *columns):
        out.add_column(name, justify='left' if not name else 'right')
    for name, values in rows.items():
        out.add_row(name, *map(str, values))
    console.print(out)
    for name, values in rows.items() if paste else ():
        console.print(f'| {name} | ' + ' | '.join(map(str, values)) + ' |')


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A result, whole or not at all."""
    processes.alone(lambda: _write_json(path, value))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    part.write_text(json.dumps(value) + '\n')
    part.replace(path)
