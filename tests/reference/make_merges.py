"""Merge checkpoints with jaxrm for check_exports.py, and beside each what jaxrm computes with it.

Run (from the repository root, in jaxrm's environment):
    python tests/reference/make_merges.py DIR

DIR gets one folder and one .json a merge, as of make_exports.py. The inputs are the tiny models of
tests/goldens and variants of them, with noise, tokens of their own, and rows without tokens; they
are made in a folder that is removed.
"""

import sys
import tempfile
from pathlib import Path

import jax
from make_exports import nll, record

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from merge_tiny import DOGERM, recipe, variant
from torch_goldens import FAMILIES, parts, scores

from jaxrm import checkpoint, merge_files, merge_plan

STACK = """
merge_method: passthrough
slices:
  - sources: [{model: rm, layer_range: [0, 2]}]
  - sources: [{model: other_rm, layer_range: [1, 3]}]
reward_head: {source: rm}
"""
TIES = """
merge_method: ties
base_model: base
models:
  - {model: rm, parameters: {weight: 0.6, density: [1, 0.5]}}
  - {model: domain_lm, parameters: {weight: 0.4, density: 0.4}}
tokenizer: {source: union}
reward_head: {source: rm}
"""
AVERAGE = """
merge_method: warm
models: [{model: rm}, {model: other_rm}]
"""
LANGUAGE = """
merge_method: slerp
base_model: base
models: [{model: domain_lm}]
parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}
tokenizer: {source: union}
"""
FAMILY = """
merge_method: linear
models:
  - {model: rm, parameters: {weight: 0.7}}
  - {model: other_rm, parameters: {weight: 0.3}}
dtype: float32
"""
CASES = {
    'dogerm': DOGERM,
    'dogerm_bf16': DOGERM.replace('float32', 'bfloat16'),
    'dogerm_tied': DOGERM.replace('domain_lm', 'tied'),
    'stacked': STACK,
    'ties': TIES,
    'warm': AVERAGE,
    'language': LANGUAGE,
}


def inputs(folder):
    variant('seqcls', folder / 'rm', tokens=['<|rate|>'])
    variant('seqcls', folder / 'other_rm', noise=0.1, seed=1, tokens=['<|rate|>'])
    variant('causal', folder / 'base')
    variant('causal', folder / 'domain_lm', noise=0.05, tokens=['<|math|>', '<|step|>'], pad=3)
    variant('causal_tied', folder / 'tied', tokens=['<|math|>'])


def merged(source, text, target, rows='seqcls'):
    """Merges, and records what jaxrm says of the result."""
    merge_files.write(merge_plan.prepare(recipe(source, text)), target, overwrite=True)
    kind = 'causal_lm' if target.name == 'language' else 'reward'
    p = checkpoint.load_pretrained(target, kind=kind, dtype='float32')
    found = nll(p, parts(p), rows) if kind == 'causal_lm' else scores(p, parts(p), rows)
    record(target.parent, target.name, kind, found, rows=rows)


def main():
    jax.config.update('jax_default_matmul_precision', 'highest')
    target = Path(sys.argv[1])
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs(Path(folder))
        for name, text in CASES.items():
            merged(Path(folder), text, target / name)
    for name, source in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            variant(source, Path(folder, 'rm'))
            variant(source, Path(folder, 'other_rm'), noise=0.1)
            merged(Path(folder), FAMILY, target / name, rows=source)


if __name__ == '__main__':
    main()
