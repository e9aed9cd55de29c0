"""Llama 3 8B on TPU slices, compiled by the TPU's own compiler: does it fit, what is sent.

Run:     pip install -e '.[plan]' && python -m experiments.bench_tpu_compile
Cost:    two to thirteen minutes a cell on two CPU cores; a cell that is there is not compiled again
Expect:  the table on TPU programs of 8B in BENCHMARKS.md

A cell is a step (LoRA on all linears at rank 16, or everything, AdamW, full rematerialisation) or
the scores of a pack a chip. Tokens and row lengths divide no size of the model, so that what is
sent of the stream is told from weights by its shape. Bytes are those of one chip; what it sends is
counted in rings: (n - 1) / n of what n chips gather, scatter or exchange, twice that of what they
add up, all of what they pass on.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments import common
from jaxrm import costs, machines, plan, plan_confirm, plan_models, plan_report

MODEL, LONGEST = 'llama-3-8b', 1152
# The compiler makes loops of matmuls that pass weights around, and in each of a ring's directions
# passes one on in vain: (n + 1) / (n - 1) of what is needed. These make it gather instead.
GATHER = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}
LORA = costs.Method('adapter', remat='full')
FULL = costs.Method('everything', rank=0, remat='full')


class Cell(NamedTuple):
    machine: str
    method: costs.Method
    tokens: int  # a chip
    options: Mapping[str, str] = {}


CELLS = {
    'lora-v5e-16': Cell('v5e:4x4', LORA, 4352),
    'lora-v6e-8': Cell('v6e:2x4', LORA, 8704),
    'lora-v5p-8': Cell('v5p:2x2x1', LORA, 17408),
    'score-v5e-16': Cell('v5e:4x4', costs.SCORING, 4352),
    'score-v6e-8': Cell('v6e:2x4', costs.SCORING, 8704),
    'score-v5p-8': Cell('v5p:2x2x1', costs.SCORING, 17408),
    'full-v5p-16': Cell('v5p:2x2x2', FULL, 8704),
    'score-v6e-8-gather': Cell('v6e:2x4', costs.SCORING, 8704, GATHER),
    'full-v5p-16-gather': Cell('v5p:2x2x2', FULL, 8704, GATHER),
    'lora-v5e-16-dots': Cell('v5e:4x4', dataclasses.replace(LORA, remat='dots'), 4352),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    results: Path = Path('experiments/results/bench_tpu')
    cells: tuple[str, ...] = tuple(CELLS)
    cache: Path = Path('~/.cache/jaxrm/plan')
    only_table: bool = False


def planned(cell: Cell) -> tuple[plan.Estimate, dict[str, Any]]:
    hf = plan_models.config_json(MODEL)
    machine = machines.parse(cell.machine)
    mesh = plan.Mesh(1, machine.chips, 1)
    shape = plan.shape_of(cell.tokens, LONGEST)
    run = plan.Run(plan_models.config(MODEL, hf), cell.method, machine, mesh, shape)
    return plan.estimate(run), hf


def checks(found: dict[str, Any], c: Any) -> dict[str, Any]:
    """What a step of sharded weights must be, from what the compiler made."""
    made = found['compiled']
    if not made['fits']:
        return {'fits': False}
    gradients = sum(one['bytes'] for one in found['sent'] if one['what'] == 'gradients')
    smallest = min(a * b for a, b in costs.linears(c).values())
    return {
        'fits': True,
        'sent_over_theory': made['measured_over_planned']['sent'],
        'sent_of_the_stream': made['sent_stream'],  # beyond embeddings to their tokens
        'sums_over_gradients': made['sums'] / gradients if gradients else made['sums'],
        'no_sum_of_frozen_weights': made['largest_sum'] < smallest,
    }


def compile_cell(name: str, config: Config) -> None:
    cell = CELLS[name]
    best, hf = planned(cell)
    found = plan_report.of(MODEL, best, None)
    made = plan_confirm.confirm(best.run, hf, config.cache, os.environ, options=cell.options)
    found = plan_report.compiled(found, made)
    found['checks'] = checks(found, best.run.config)
    config.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + '\n'
    (config.results / f'{name}.json').write_text(text, encoding='utf-8')


def row(name: str, found: dict[str, Any]) -> str:
    made, seen = found['compiled'], found['checks']
    if not seen['fits']:
        return f'| {name} | {found["tokens"]:,} | does not fit: {made["why"]} |'
    ratio = made['measured_over_planned']
    giga = lambda n: f'{n / 1e9:.2f}'  # noqa: E731
    frozen = 'none' if seen['no_sum_of_frozen_weights'] else 'learning ones'
    cells = [
        name, f'{found["tokens"]:,}', f'{made["seconds"]:.0f} s',
        f'{giga(made["arguments"])} + {giga(made["temporary"])} of {giga(found["memory"])}',
        f'{ratio["arguments"]:.3f}, {ratio["temporary"]:.2f}',
        f'{giga(made["sent_total"])} / {giga(found["sent_total"])} = {ratio["sent"]:.2f}',
        giga(made['sums']), frozen, f'{made["sent_stream"] / 1e6:.1f}',
    ]  # fmt: skip
    return f'| {" | ".join(cells)} |'


HEAD = (
    '| program | tokens a step | compiled in | GB a chip: arguments + temporary of usable | '
    'measured / planned: arguments, temporary | GB sent: found / theory | GB added up | '
    'sums of the size of a kernel | MB sent of the stream |'
)


def main(config: Config) -> None:
    for name in config.cells:
        if not config.only_table and not (config.results / f'{name}.json').exists():
            plan_confirm.check(machines.parse(CELLS[name].machine))
            compile_cell(name, config)
    paths = {name: config.results / f'{name}.json' for name in CELLS}
    print(HEAD)
    print('|' + '---|' * HEAD.count(' | ') + '---|')
    for name, path in paths.items():
        if path.exists():
            print(row(name, json.loads(path.read_text(encoding='utf-8'))))


if __name__ == '__main__':
    common.launch(Config, main)
