"""ArmoRM, third phase: a gate that weighs the objectives by the prompt, learned on pairs.

Run:     python -m experiments.armorm_gate           # with the flags of armorm_features, after both
         (--initial_scale 10 --gating_hidden_dim 128 suit the tiny decoder of the world)
Cost:    about a minute on two CPU cores for the synthetic world
Expect:  more pairs right than with the best weights that do not read the prompt (BENCHMARKS.md)

Only the gate learns. Writes the whole reward model in the released model's layout, result.json and
metrics.jsonl into output_dir; a stopped run goes on. Prompts of the test set that are in another
set, too, are counted and left out. With --script_softmax the gate is that of the public training
script, which weighs nothing: it is compared, and no model is written.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
from safetensors.numpy import load_file

from experiments import armorm, common, devices, gating
from jaxrm import checkpoint, evaluate, features, processes, regress, resume, train, tree
from jaxrm.logs import Log


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(armorm.Data, gating.Gating):
    objectives: Path = Path('runs/armorm/objectives')  # what the second phase wrote
    output_dir: Path = Path('runs/armorm/gate')
    logging_steps: int = 100
    save_steps: int = 500
    export_dtype: Literal['float32', 'bfloat16', 'float16'] | None = None  # of all; else as is


# Flags that may differ from the second phase's; that the model is the same its hash tells.
ASIDE = {'features', 'model_name_or_path', 'test_pairs'}


def main(c: Config) -> None:
    """Train, compare, export."""
    if common.finished(c):
        return
    mesh, about = devices.mesh(c), json.loads((c.objectives / 'result.json').read_text())
    check_same(c, about)
    head = tree.unflatten(load_file(c.objectives / 'head.safetensors'))
    sets = armorm.sets(c, armorm.tokenizer(c), ('pairs', 'test', 'ratings', 'reference'))
    sets['test'], left_out = armorm.apart(sets)
    common.console.print(f'test: {len(sets["test"].tokens.prompt)} records; left out: {left_out}')
    learnt, held = (
        (gating.rated(head, features.gather(c.features, some), script=c.script_softmax), some)
        for some in (sets['pairs'].tokens, sets['test'].tokens)
    )
    rm, gate = learn(c, head, learnt, mesh)
    score_c = {'gate': gating.scores(rm, gate, held, mesh), **gating.alike(learnt, held)}
    result = compare(score_c, sets['test'])
    if not c.script_softmax:
        export(c, {'head': head, 'gate': gate}, about)
    flags = common.identity(c)
    made = {'accuracy': result, 'left_out': left_out, 'flags': flags}
    common.write_json(c.output_dir / 'result.json', made)


def check_same(c: Config, about: dict[str, Any]) -> None:
    """Refuses a second phase on features of another model, or with other data."""
    if (found := about['model']) != (model := armorm.model(c)):
        raise ValueError(f'{c.objectives}: found a fit to features of {found}, expected of {model}')
    flags = json.loads(json.dumps(common.identity(c)))
    for name in sorted((flags.keys() & about['flags'].keys()) - ASIDE):
        if (was := about['flags'][name]) != (now := flags[name]):
            raise ValueError(f'{c.objectives}: is of a run with {name} {was!r}, not {now!r}')


def learn(c: Config, head: tree.Tree, pairs: gating.Pairs, mesh: Any) -> tuple[Any, tree.Tree]:
    """The model of ratings, and its gate; goes on from the last checkpoint, if any."""
    of, some = pairs
    rm = gating.model(c, of.answer_cD.shape[1])
    gate = gating.start(rm, of.prompt_nD.shape[1], seed=c.seed, scale=c.initial_scale)
    rate, tx = gating.optimiser(c)
    what = {'experiment': 'armorm_gate', **common.identity(c)}
    what |= {'head': resume.digest(head), 'data': resume.digest(some)}
    processes.check_same(what)
    saved, steps = devices.checkpoints(c), c.max_steps
    state = resume.restore(saved, train.start({'gate': gate}, tx, mesh), run=what)
    batches = gating.stream(c, of, some, mesh, c.seed)
    share = c.train_batch_size / len(batches.records)
    log = Log(
        c.output_dir, steps=steps, start=int(state.step), logging_steps=c.logging_steps,
        progress=lambda step: {'epoch': step * share}, schedule=rate, console=common.console,
    )  # fmt: skip
    saver = resume.Saver(saved, steps=steps, every=c.save_steps, run=what, before=log.flush)
    with log, saver:
        key, hooks = jax.random.key(c.seed), [(1, log), (1, saver)]
        return rm, gating.fit(c, rm, state, batches, key, mesh=mesh, hooks=hooks)


def compare(score_c: dict[str, Any], test: armorm.Set) -> dict[str, Any]:
    """Prints and returns the accuracies, and what the gate adds to each of the others."""
    prompts = evaluate.prompts([test.records[i] for i in test.tokens.record])
    right = {name: gating.right(x_c, test.tokens, ties=0.5) for name, x_c in score_c.items()}
    out = {name: [evaluate.interval(x, prompts=prompts)] for name, x in right.items()}
    for name in out.keys() - {'gate'}:
        out[name].append(evaluate.paired(right['gate'], right[name], prompts=prompts))
    columns = ['accuracy, 95 %', 'gate - this']
    common.table('held-out pairs', {k: [*v, ''][:2] for k, v in out.items()}, columns)
    return out


def export(c: Config, params: tree.Tree, about: dict[str, Any]) -> None:
    """A folder `model` of the output's, with the decoder; `about` is what phase two says.

    Raises ValueError for another decoder, and for a gate of the public script.
    """
    if c.script_softmax:
        raise ValueError('script_softmax: found a gate that weighs nothing, expected one to export')
    names, ends = tuple(about['names']), about['scales']
    like = dataclasses.replace(
        checkpoint.load_pretrained(c.sources.model, kind='backbone'),
        objectives=names,
        temperature=c.gating_temperature,
        scales=tuple(regress.Scale(*ends[n]) if n in ends else None for n in names),
    )
    if (found := resume.digest(like.backbone)) != about['model']:
        raise ValueError(f'{c.sources.model}: found {found}, expected the model {about["model"]}')
    checkpoint.export(
        c.output_dir / 'model', {'backbone': like.backbone, **params}, like,
        head_kind='gated', dtype=c.export_dtype, overwrite=True,
        provenance={'experiment': 'armorm_gate', **common.identity(c)},
    )  # fmt: skip


if __name__ == '__main__':
    common.launch(Config, main)
