"""What a gate is worth: ArmoRM's on the synthetic world, where what prompts call for is known.

Run:     python -m experiments.pretrain; python -m experiments.quickstart
         python -m experiments.armorm_world               # what is missing, then the tables
         python -m experiments.armorm_world --only_table  # from experiments/results/armorm_gate
Cost:    20 minutes of work of a CPU core, after the first line: 115 gates, and 200,000 records once
Expect:  the tables of the gate in BENCHMARKS.md

*Routing*: five categories of prompts whose preferences weigh the objectives differently; most
ratings are missing. *Length*: raters like length in every objective, and preferences do not know
it. Every seed has its own prompts, ratings and pairs; a cell is one seed, kept as JSON.
"""

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import armorm, common, devices, gating, variants
from jaxrm import evaluate, statistics

RESULTS = Path(__file__).parent / 'results' / 'armorm_gate'
Array = np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(gating.Gating, devices.Devices):
    language_model: str = 'runs/pretrain/model'  # the frozen decoder
    reward_model: str = 'runs/quickstart/model'  # another, which knows the preferences (seed 0)
    features: Path = Path('runs/armorm')
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    length_bias: float = 1.0
    train_batch_size: int = 512
    gating_hidden_dim: int = 128
    initial_scale: float = 10.0
    only_table: bool = False


DEBIASED = ('gate', 'gate with the transform', 'gate with a transform by Pearson')
PARTS = {
    'routing-language_model': tuple(variants.VARIANTS),
    'routing-reward_model': tuple(variants.VARIANTS),
    'length-language_model': DEBIASED,
}


def routed(w: variants.World) -> dict[str, Array]:
    """What the gate might be worth without reading prompts, and its ceilings."""
    return gating.alike(*w.rated('plain')) | variants.by_category(w)


def weighed(w: variants.World) -> dict[str, Array]:
    """The same without ceilings, with and without the transform."""
    with_it = gating.alike(*w.rated('transform'))
    named = {f'{name} with the transform': x_c for name, x_c in with_it.items()}
    return gating.alike(*w.rated('plain')) | named


def cells(c: Config, mesh: Any, part: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """For each seed which of the held-out pairs are right by what, as hexadecimal bits."""
    what, _, base = part.partition('-')
    bias, fixed = (c.length_bias, weighed) if what == 'length' else (0.0, routed)
    flags = {'model_name_or_path': getattr(c, base), 'features': c.features / f'{base}_features'}
    of = [armorm.Data(**flags, seed=seed, length_bias=bias) for seed in seeds]
    worlds, out = [variants.made(one, mesh) for one in of], []
    for w, gates in zip(worlds, variants.learned(c, mesh, worlds, PARTS[part]), strict=True):
        asked = evaluate.prompts([w.test.records[i] for i in w.test.tokens.record])
        rows = {}
        for name, (x_c, about) in (gates | {k: (x, {}) for k, x in fixed(w).items()}).items():
            bits = packed(gating.right(x_c, w.test.tokens))
            rows[name] = {'right': bits, **about, **(liking(x_c, w) if bias else {})}
        out.append({'rows': rows, 'prompt': ' '.join(f'{zlib.crc32(x.encode()):x}' for x in asked)})
    return out


def packed(right_n: Array) -> str:
    """Which of the pairs are right, as hexadecimal bits."""
    return np.packbits(right_n == 1).tobytes().hex()


def unpacked(bits: str, pairs: int) -> Array:
    """[n] 1 where a pair is right, else 0."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=pairs).astype(float)


def liking(score_c: Array, w: variants.World) -> dict[str, float]:
    """Correlation of score and length: over all answers, and of the differences in a pair."""
    length_c = evaluate.lengths(w.test.tokens).astype(float)
    gap, longer = (x_c[0::2] - x_c[1::2] for x_c in (score_c, length_c))
    within = statistics.pearson(np.concatenate([gap, -gap]), np.concatenate([longer, -longer]))
    return {'spearman': statistics.spearman(score_c, length_c), 'within': within}


def learn(c: Config) -> None:
    """Every cell that has no result yet."""
    mesh = devices.mesh(c)
    for part in PARTS:
        paths = {seed: RESULTS / f'{part}-{seed}.json' for seed in c.seeds}
        missing = [seed for seed, path in paths.items() if not path.exists()]
        made = cells(c, mesh, part, missing) if missing else []
        for seed, cell in zip(missing, made, strict=True):
            common.write_json(paths[seed], {'flags': flags(c), **cell})


def flags(c: Config) -> dict[str, Any]:
    """Those that a cell depends on."""
    names = [f.name for f in dataclasses.fields(gating.Gating)]
    return {name: getattr(c, name) for name in (*names, 'length_bias')}


def finished(c: Config, part: str) -> list[Mapping[str, Any]]:
    """The cells that there are; ValueError for one of other flags."""
    paths = [path for seed in c.seeds if (path := RESULTS / f'{part}-{seed}.json').exists()]
    found = [json.loads(path.read_text()) for path in paths]
    for path, one in zip(paths, found, strict=True):
        if one['flags'] != flags(c):
            raise ValueError(f'{path}: is of a run with {one["flags"]}, not {flags(c)}')
    return found


def table(c: Config, part: str) -> None:
    """Accuracy and what the gate adds to each row, each over prompts and over seeds."""
    if not (found := finished(c, part)):
        return
    prompts = [cell['prompt'].split() for cell in found]
    right = {name: [unpacked(cell['rows'][name]['right'], len(p))
                    for cell, p in zip(found, prompts, strict=True)]
             for name in found[0]['rows']}  # fmt: skip
    gap = {('gate', name): [g - x for g, x in zip(right['gate'], x_sn, strict=True)]
           for name, x_sn in right.items() if name != 'gate'}  # fmt: skip
    both = gating.both_intervals(right | gap, [name for some in prompts for name in some])
    rows = {}
    for name in right:
        notes = {k: np.mean([cell['rows'][name][k] for cell in found])
                 for k in found[0]['rows'][name] if k != 'right'}  # fmt: skip
        about = ', '.join(f'{k} {x:.2f}' for k, x in notes.items())
        rows[name] = [*both[name], *both.get(('gate', name), ('', '')), about]
    columns = ['accuracy, over prompts', 'seeds', 'gate - this, over prompts', 'seeds', 'means']
    common.table(f'{part}, {len(found)} seeds', rows, columns, paste=True)


def main(c: Config) -> None:
    """Learn, then print."""
    if not c.only_table:
        learn(c)
    for part in PARTS:
        table(c, part)


if __name__ == '__main__':
    common.launch(Config, main)
