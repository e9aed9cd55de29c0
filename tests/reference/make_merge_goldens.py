"""Write merges by mergekit under tests/goldens/merge.

Run (in the torch environment of README.md with mergekit, from the repository root):
    python tests/reference/make_merge_goldens.py

Made with mergekit 0.1.5 and torch 2.13.0 by merge_tensors and merge_state_dicts, in float32.

    merge/arrays.npz    base, x0, x1, x2 [12, 16]; `near` and `far`, near the base in angle and
                        opposite, and others; the result of each case; of random methods the
                        entries that each input kept; how often each entry of two rows of `base`,
                        as steps from 0, was kept in DRAWS runs of DELLA
    merge/trees.npz     three state dicts and a base, names as in a checkpoint, and their merges
    merge/cases.json    the cases: method, inputs, base, parameters
    merge/versions.json versions

mergekit draws from torch's generator: of the masks of one seed each is seen by giving all other
inputs a weight of 0.
"""

import json
from importlib.metadata import version
from pathlib import Path

import mergekit.merge_methods as mergekit
import numpy as np
import torch

SEED, DRAWS = 70, 4000
ROOT = Path(__file__).resolve().parents[1] / 'goldens' / 'merge'
WEIGHT = [0.3, 0.5, 0.4]
MIXED = [0.3, -0.5, 0.4]
XS = ['x0', 'x1', 'x2']


def case(method, inputs, base=None, rows=None, **parameters):
    """`rows` cuts the arrays: 1 leaves vectors."""
    return dict(method=method, inputs=inputs, base=base, rows=rows, parameters=parameters)


def cases():
    """{name: case}."""
    out = {
        'linear': case('linear', XS, weight=WEIGHT),
        'linear_sum': case('linear', XS, weight=WEIGHT, normalize=False),
        'linear_mixed': case('linear', XS, weight=MIXED),
        'passthrough': case('passthrough', ['x0'], scale=[0.3]),
        'karcher': case('karcher', XS),
        'karcher_one_step': case('karcher', XS, max_iter=1),
        'karcher_opposite': case('karcher', ['x0', 'x0_negative']),
        'slerp_antipodal': case('slerp', ['far'], 'base', t=0.3),
        'model_stock': case('model_stock', XS, 'base'),
        'model_stock_rows': case('model_stock', XS, 'base', filter_wise=True),
        'model_stock_vector': case('model_stock', XS, 'base', rows=1, filter_wise=True),
        'model_stock_negative': case('model_stock', ['x0', 'x0_mirrored'], 'base'),
        'task_arithmetic': case('task_arithmetic', XS, 'base', weight=WEIGHT, **{'lambda': 0.7}),
        'task_arithmetic_normalized': case(
            'task_arithmetic', XS, 'base', weight=MIXED, normalize=True
        ),
        'task_arithmetic_zero_sum': case(
            'task_arithmetic', XS, 'base', weight=[0.25, -0.75, 0.5], normalize=True
        ),
        'ties': case('ties', XS, 'base', weight=WEIGHT, density=[0.5, 0.3, 0.8]),
        'ties_sum': case(
            'ties', XS, 'base', weight=WEIGHT, density=0.5, normalize=False, **{'lambda': 1.3}
        ),
        'ties_mixed': case('ties', XS, 'base', weight=MIXED, density=0.7),
        'ties_rescaled': case('ties', XS, 'base', weight=WEIGHT, density=0.5, rescale=True),
        'ties_one_entry': case('ties', ['x0'], 'base', weight=[1.0], density=0.001),
        'ties_dense': case('ties', XS, 'base', weight=WEIGHT),
        'ties_empty': case('ties', XS, 'base', weight=WEIGHT, density=0.0),
        'ties_vector': case('ties', XS, 'base', rows=1, weight=WEIGHT, density=0.4),
        'breadcrumbs_rescaled': case(
            'breadcrumbs', XS, 'base', weight=WEIGHT, density=0.5, gamma=0.1, rescale=True
        ),
        'breadcrumbs_ties': case(
            'breadcrumbs_ties', XS, 'base', weight=WEIGHT, density=[0.5, 0.3, 0.7], gamma=0.2
        ),
    }
    for t in (0.0, 0.3, 1.0):
        out[f'slerp_{t}'] = case('slerp', ['x0'], 'base', t=t)
        out[f'slerp_near_{t}'] = case('slerp', ['near'], 'base', t=t)
    for density, gamma in ((0.5, 0.01), (0.5, 0.001), (0.9, 0.2), (0.2, 0.75), (0.001, 0.1)):
        more = dict(weight=[1.0], density=density, gamma=gamma)
        out[f'breadcrumbs_{density}_{gamma}'] = case('breadcrumbs', ['x0'], 'base', **more)
    for base in (None, 'base'):
        end = '_base' if base else ''
        out['multislerp' + end] = case('multislerp', XS, base, weight=WEIGHT)
        out['multislerp_sum' + end] = case(
            'multislerp', XS, base, weight=WEIGHT, normalize_weights=False
        )
        two = XS[:2]
        out['nuslerp' + end] = case('nuslerp', two, base, weight=[0.3, 0.5])
        out['nuslerp_beyond' + end] = case('nuslerp', two, base, weight=[-0.5, 1.5])
        out['nuslerp_zero_sum' + end] = case('nuslerp', two, base, weight=[-0.5, 0.5])
        for row_wise in (False, True):
            out[f'nuslerp_{row_wise}{end}'] = case(
                'nuslerp', two, base, weight=[0.3, 0.5],
                nuslerp_flatten=False, nuslerp_row_wise=row_wise,
            )  # fmt: skip
    return out


def random_cases():
    """{name: case} of methods that draw."""
    out = {}
    for method in ('dare_linear', 'dare_ties', 'della_linear', 'della'):
        for rescale in (True, False):
            more = dict(weight=WEIGHT, density=[0.5, 0.3, 0.7], rescale=rescale)
            out[f'{method}_{rescale}'] = case(method, XS, 'base', **more)
    return out


def arrays():
    """{name: float32 [12, 16]}; no two entries differ from the base by as much."""
    rng = np.random.default_rng(SEED)
    base = rng.normal(size=(12, 16))
    out = {'base': base} | {x: base + 0.3 * rng.normal(size=base.shape) for x in XS}
    out['near'] = base + 0.01 * rng.normal(size=base.shape)
    out['far'] = -2 * base + 0.01 * rng.normal(size=base.shape)
    out['x0_negative'] = -out['x0']
    out['x0_mirrored'] = base - 0.5 * (out['x0'] - base) + 0.8 * (out['x1'] - base)
    return {name: x.astype(np.float32) for name, x in out.items()}


def merged(case, tensors, **changed):
    """A case by mergekit."""
    names = [*([case['base']] if case['base'] else []), *case['inputs']]
    given = [tensors[name][: case['rows']] for name in names]
    given = [x[0] if case['rows'] == 1 else x for x in given]
    base = 0 if case['base'] else None
    parameters = case['parameters'] | changed
    return mergekit.merge_tensors(given, case['method'], parameters=parameters, base_index=base)


def with_masks(case, tensors):
    """The result and what each input kept, all from one state of the generator."""
    method = case['method'].replace('_ties', '_linear')
    linear = case | {'method': 'della_linear' if method == 'della' else method}
    masks = []
    for i in range(3):
        torch.manual_seed(SEED)
        alone = merged(linear, tensors, weight=[float(i == j) for j in range(3)], normalize=False)
        masks.append((alone != tensors['base']).numpy())
    torch.manual_seed(SEED)
    return merged(case, tensors).numpy(), np.stack(masks)


def frequencies(tensors):
    """How often DELLA keeps each entry of two rows."""
    x = tensors['base'][:2]
    kept = torch.zeros_like(x)
    for _ in range(DRAWS):
        y = mergekit.merge_tensors(
            [torch.zeros_like(x), x], 'della_linear', base_index=0,
            parameters={'weight': [1.0], 'density': 0.4, 'epsilon': 0.3, 'rescale': False},
        )  # fmt: skip
        kept += y != 0
    return (kept / DRAWS).numpy()


def state_dict(rng, base=None):
    """Of a decoder with three layers and two kinds of tensors."""
    names = {'model.embed_tokens.weight': (10, 6), 'model.norm.weight': (6,)}
    for i in range(3):
        names[f'model.layers.{i}.self_attn.q_proj.weight'] = (8, 6)
        names[f'model.layers.{i}.input_layernorm.weight'] = (6,)
    scale = 1.0 if base is None else 0.3
    noise = {n: (scale * rng.normal(size=shape)).astype(np.float32) for n, shape in names.items()}
    return noise if base is None else {n: base[n] + x for n, x in noise.items()}


def trees():
    """State dicts and their merges, as one flat dict."""
    rng = np.random.default_rng(SEED + 1)
    base = state_dict(rng)
    models = [base, *(state_dict(rng, base) for _ in range(3))]
    out = {f'{i}:{n}': x for i, model in enumerate(models) for n, x in model.items()}
    dicts = [{n: torch.from_numpy(x) for n, x in model.items()} for model in models]
    for name, start, parameters in (
        ('linear', 1, {'weight': WEIGHT}),
        ('model_stock', 0, {'filter_wise': True}),
        ('ties', 0, {'weight': WEIGHT, 'density': 0.5}),
    ):
        base_id = None if start else 0
        y = mergekit.merge_state_dicts(dicts[start:], name, parameters=parameters, base=base_id)
        out |= {f'{name}:{n}': x.numpy() for n, x in y.items()}
    return out


def main():
    """All files."""
    ROOT.mkdir(parents=True, exist_ok=True)
    made = arrays()
    tensors = {name: torch.from_numpy(x) for name, x in made.items()}
    for name, each in cases().items():
        made[f'{name}/result'] = merged(each, tensors).numpy()
    for name, each in random_cases().items():
        made[f'{name}/result'], made[f'{name}/masks'] = with_masks(each, tensors)
    torch.manual_seed(SEED)
    made['frequencies'] = frequencies(tensors)
    np.savez_compressed(ROOT / 'arrays.npz', **made)
    np.savez_compressed(ROOT / 'trees.npz', **trees())
    every = cases() | random_cases()
    (ROOT / 'cases.json').write_text(json.dumps(every, indent=1) + '\n')
    versions = {name: version(name) for name in ('mergekit', 'torch', 'numpy')}
    (ROOT / 'versions.json').write_text(json.dumps(versions, indent=2, sort_keys=True) + '\n')


if __name__ == '__main__':
    main()
