"""The package's rules that a reader of the source can check: layers, imports, sizes, names."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE, MAX_FUNCTION = 400, 60
# What experiments share.
SHARED = {
    'common', 'stored', 'devices', 'limits', 'scratch', 'armorm', 'gating', 'scales',
    'variants', 'separation', 'shifted', 'labelling', 'dogerm', 'generations',
    'dmoerm', 'dmoerm_phases', 'dmoerm_arms', 'dmoerm_samples', 'dmoerm_tables',
    'bench', 'bench_cells', 'bench_turns', 'bench_gpu_cells', 'bench_gpu_torch',
}  # fmt: skip
BAD_NAMES = {'utils', 'util', 'common', 'base', 'helpers', 'misc'}

# A module imports from its own layer (without cycles) and from lower ones. '.*' is a subpackage.
LAYERS = {
    'tree': 0,
    'files': 0,
    'records': 0,
    'annotations': 0,
    'places': 0,
    'shards': 0,
    'layouts': 0,
    'data': 0,
    'chat': 0,
    'chat_templates': 0,
    'tokens': 0,
    'marker': 0,
    'cache': 0,
    'pooling': 0,
    'losses': 0,
    'contrastive': 0,
    'heads': 0,
    'regress': 0,
    'explain': 0,
    'answers': 0,
    'version': 0,
    'usage': 0,
    'machines': 0,
    'plan_asked': 0,
    'intervals': 0,
    'statistics': 0,
    'shapes': 1,
    'packing': 1,
    'sharding': 1,
    'fused': 1,
    'processes': 1,
    'programs': 1,
    'lora': 1,
    'merge': 1,
    'merge_methods': 1,
    'merge_dense': 1,
    'merge_sparse': 1,
    'vocabulary': 1,
    'strength': 1,
    'rounds': 1,
    'baselines': 1,
    'datasets.*': 1,
    'backbones.*': 2,
    'reward': 2,
    'mixture': 2,
    'train': 3,
    'views': 3,
    'checkpoint': 3,
    'mixture_files': 3,
    'bundle': 3,
    'peft': 3,
    'hf': 3,
    'hf_heads': 3,
    'hf_config': 3,
    'resume': 3,
    'flops': 3,
    'costs': 3,
    'plan_hlo': 3,
    'logs': 3,
    'trackers': 3,
    'hub': 3,
    'merge_config': 3,
    'merge_steps': 3,
    'merge_plan': 4,
    'merge_files': 4,
    'meta': 4,
    'members': 4,
    'evaluate': 4,
    'features': 4,
    'rewardbench': 4,
    'rewardbench_rules': 4,
    'bestofn': 4,
    'autoj': 4,
    'judge': 4,
    'judge_cache': 4,
    'judge_client': 4,
    'judge_endpoint': 4,
    'sandbox': 4,
    'sandbox_child': 4,
    'sweep': 4,
    'report': 4,
    'strength_report': 4,
    'comparison': 4,
    'results': 4,
    'plan': 4,
    'plan_models': 4,
    'plan_report': 4,
    'plan_wanted': 4,
    'plan_confirm': 4,
    'plan_compile': 4,
    'remat': 4,
    'scorer': 4,
    'routed': 4,
    'loading': 4,
    'cli': 5,
    '__init__': 6,
    '__main__': 6,
}

JAX = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'chex'}
MODELS = {'jaxrm.backbones', 'jaxrm.heads', 'jaxrm.reward'}

# What a module never imports though its layer would allow it; prefixes of dotted names.
NEVER = {
    'tree': {'jaxrm'},
    'losses': MODELS,
    'contrastive': MODELS | {'jaxrm.train'},
    'heads': {'jaxrm.backbones'},
    'regress': {'jaxrm.backbones', 'jaxrm.train'},
    'sharding': MODELS,
    'lora': {'jaxrm.backbones'},
    'merge': {'jaxrm.train', 'jaxrm.reward'},
    'strength': {'jaxrm.train'},
    'backbones.*': {'jaxrm.heads', 'jaxrm.train'},
    'reward': {'jaxrm.train', 'jaxrm.losses'},
    'train': {'jaxrm.datasets'},
    'checkpoint': {'jaxrm.train'},
    'evaluate': {'jaxrm.train'},
    'rewardbench': {'jaxrm.train'},
    'rewardbench_rules': {'jaxrm'},
    'bestofn': {'jaxrm.train'},
    'judge': {'jaxrm.train'},
    'sandbox': {'jaxrm.train'},
    'report': {'jaxrm.train'},
}
NEVER_ANYWHERE = {'torch', 'torchvision', 'accelerate', 'experiments', 'tests'}
# Not even by way of another module.
NUMPY_ONLY = (
    'files', 'records', 'annotations', 'strength', 'layouts', 'data', 'chat', 'tokens', 'cache',
    'pooling', 'packing', 'marker', 'explain', 'shapes', 'rewardbench', 'rewardbench_rules',
    'intervals', 'statistics', 'datasets.*', 'bestofn', 'autoj', 'judge', 'judge_cache',
    'judge_client', 'judge_endpoint', 'rounds', 'machines', 'plan_asked', 'plan_hlo',
)  # fmt: skip


def module_name(path: Path, root: Path = ROOT / 'jaxrm') -> str:
    """The dotted name below the package, `__init__` for the package itself."""
    parts = path.relative_to(root).with_suffix('').parts
    if len(parts) > 1 and parts[-1] == '__init__':
        parts = parts[:-1]
    return '.'.join(parts)


def row(name: str, table: dict[str, int]) -> str | None:
    """The table's entry for a module: its own, or that of the subpackage it is (in)."""
    entries = (name, f'{name.partition(".")[0]}.*')
    return next((e for e in entries if e in table), None)


def imports(source: str, name: str, modules: set[str]) -> set[str]:
    """Dotted names of all modules imported anywhere in the source, relative ones resolved.

    `from jaxrm import tree` is `jaxrm.tree` when that is a module, else `jaxrm`.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ''
            if node.level:
                above = ['jaxrm', *name.split('.')][: -node.level]
                origin = '.'.join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f'{origin}.{alias.name}'
                found.add(inner if below(inner) in modules else origin)
    return found


def below(target: str) -> str | None:
    """A dotted name as it is called inside the package, None outside."""
    if target == 'jaxrm':
        return '__init__'
    return target.removeprefix('jaxrm.') if target.startswith('jaxrm.') else None


def within(target: str, prefixes: set[str]) -> bool:
    return any(target == p or target.startswith(f'{p}.') for p in prefixes)


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """What each module imports, as full dotted names."""
    return {name: imports(source, name, set(sources)) for name, source in sources.items()}


def inside(targets: set[str], sources: dict[str, str]) -> set[str]:
    """Those of the targets that are modules of the package, by their names below it."""
    return {n for t in targets if (n := below(t)) in sources}


def layer_faults(sources: dict[str, str]) -> Iterator[str]:
    for name, targets in graph(sources).items():
        entry = row(name, LAYERS)
        if entry is None:
            yield f'{name}: not in the table LAYERS'
            continue
        for target in sorted(inside(targets, sources)):
            other = row(target, LAYERS)
            if other is not None and LAYERS[other] > LAYERS[entry]:
                yield f'{name} (layer {LAYERS[entry]}) imports {target} (layer {LAYERS[other]})'
        for target in sorted(targets):
            if within(target, NEVER.get(entry, set()) | NEVER_ANYWHERE):
                yield f'{name} imports {target}, which it must never import'


def cycle_faults(sources: dict[str, str]) -> Iterator[str]:
    within_package = {n: inside(t, sources) - {n} for n, t in graph(sources).items()}
    try:
        TopologicalSorter(within_package).prepare()
    except CycleError as error:
        yield f'modules import one another: {" -> ".join(error.args[1])}'


def numpy_faults(sources: dict[str, str]) -> Iterator[str]:
    """JAX reached from a numpy-only module, directly or through what it imports."""
    edges = graph(sources)
    for start in sources:
        if row(start, LAYERS) not in NUMPY_ONLY:
            continue
        seen, stack = set(), [start]
        while stack:
            name = stack.pop()
            seen.add(name)
            stack += inside(edges[name], sources) - seen
        for name in sorted(seen):
            if any(within(target, JAX) for target in edges[name]):
                yield f'{start} must not need JAX, but {name} imports it'


def size_faults(sources: dict[str, str]) -> Iterator[str]:
    for name, source in sources.items():
        lines = source.count('\n')
        if lines > MAX_FILE:
            yield f'{name}: {lines} lines, expected at most {MAX_FILE}'
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > MAX_FUNCTION:
                    yield f'{name}.{node.name}: {size} lines, expected at most {MAX_FUNCTION}'


def name_faults(sources: dict[str, str]) -> Iterator[str]:
    for name, source in sources.items():
        bad = BAD_NAMES & {part.strip('_') for part in name.split('.')}
        if bad:
            yield f'{name}: {bad.pop()!r} says nothing; name the module after what it holds'
        if source.strip() and not ast.get_docstring(ast.parse(source)):
            yield f'{name}: no module docstring'


def side_faults(sources: dict[str, str]) -> Iterator[str]:
    """Printing and reading the environment, the command line tool excepted."""
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Call(func=ast.Name(id='print')) if name != 'cli':
                    yield f'{name}:{node.lineno} prints'
                case ast.Attribute(
                    value=ast.Name(id='os'), attr='environ' | 'environb' | 'getenv'
                ) if name != 'cli':
                    yield f'{name}:{node.lineno} reads the environment'
                case ast.ImportFrom(module='os', names=names):
                    if {n.name for n in names} & {'environ', 'environb', 'getenv'}:
                        yield f'{name}:{node.lineno} reads the environment'


CHECKS = [layer_faults, cycle_faults, numpy_faults, size_faults, name_faults, side_faults]


@pytest.fixture(scope='module')
def package() -> dict[str, str]:
    paths = sorted((ROOT / 'jaxrm').rglob('*.py'))
    return {module_name(p): p.read_text(encoding='utf-8') for p in paths}


@pytest.mark.parametrize('check', CHECKS, ids=lambda check: check.__name__)
def test_package(check, package):
    assert list(check(package)) == []


def test_package_was_found(package):
    assert {'__init__', 'data', 'datasets'} <= set(package)


def test_experiments_stay_small_and_apart():
    """An experiment may import jaxrm and what all of them share, never another experiment."""
    paths = sorted((ROOT / 'experiments').rglob('*.py'))
    sources = {p.stem: p.read_text(encoding='utf-8') for p in paths}
    faults = list(size_faults(sources))
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.ImportFrom(module='experiments', names=names):
                    targets = {n.name for n in names}
                case ast.ImportFrom(module=str(module)) if module.startswith('experiments.'):
                    targets = {module.split('.')[1]}
                case ast.Import(names=names):
                    parts = [n.name.split('.') for n in names]
                    targets = {p[1] for p in parts if p[0] == 'experiments' and len(p) > 1}
                case _:
                    continue
            faults += [f'{name} imports experiments.{t}' for t in sorted(targets - SHARED)]
    assert faults == []


@pytest.mark.parametrize(
    ('check', 'sources', 'fault'),
    [
        (layer_faults, {'novel': ''}, 'novel: not in the table'),
        (layer_faults, {'tree': 'import jaxrm', '__init__': ''}, 'tree imports jaxrm,'),
        (
            layer_faults,
            {'packing': 'def f():\n  from jaxrm import train', 'train': ''},
            'packing (layer 1) imports train (layer 3)',
        ),
        (
            layer_faults,
            {'backbones.llama': 'from .. import train', 'train': ''},
            'backbones.llama (layer 2) imports train (layer 3)',
        ),
        (
            layer_faults,
            {'reward': 'from jaxrm.losses import bradley_terry', 'losses': ''},
            'reward imports jaxrm.losses,',
        ),
        (layer_faults, {'hf': 'import torch.nn as nn'}, 'hf imports torch.nn,'),
        (layer_faults, {'cli': 'from experiments import quickstart'}, 'cli imports experiments,'),
        (
            cycle_faults,
            {'data': 'import jaxrm.tokens', 'tokens': 'from jaxrm import data'},
            'modules import one another',
        ),
        (numpy_faults, {'datasets.hh': 'import flax.linen'}, 'datasets.hh must not need JAX'),
        (
            numpy_faults,
            {'packing': 'from jaxrm import tree', 'tree': 'import jax.numpy as jnp'},
            'packing must not need JAX, but tree imports it',
        ),
        (size_faults, {'data': '\n' * 401}, 'data: 401 lines'),
        (size_faults, {'data': 'def f():' + '\n  pass' * 60}, 'data.f: 61 lines'),
        (name_faults, {'backbones._base': '"""Doc."""'}, "backbones._base: 'base'"),
        (name_faults, {'data': 'x = 1'}, 'data: no module docstring'),
        (side_faults, {'data': 'print(1)'}, 'data:1 prints'),
        (side_faults, {'data': 'import os\nx = os.environ["A"]'}, 'data:2 reads'),
        (side_faults, {'data': 'from os import getenv'}, 'data:1 reads'),
    ],
)
def test_checks_find(check, sources, fault):
    faults = list(check(sources))
    assert any(f.startswith(fault) for f in faults), faults


def test_checks_allow():
    sources = {
        'tree': '"""Doc."""\nimport jax',
        'tokens': '"""Doc."""\nimport numpy as np',
        'data': '"""Doc."""\nimport datasets\nfrom jaxrm.tokens import Tokens',
        'datasets': '"""Doc."""',
        'backbones': '"""Doc."""\nfrom jaxrm.backbones import llama',
        'backbones.llama': '"""Doc."""\nfrom jaxrm import tree\nfrom . import layers',
        'backbones.layers': '"""Doc."""\nimport flax.linen as nn',
        'cli': '"""Doc."""\nprint(1)',
    }
    assert [fault for check in CHECKS for fault in check(sources)] == []
