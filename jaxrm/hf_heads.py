"""Heads in Hugging Face folders: the tensors of each kind, and which kind a folder has."""

import itertools
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxrm.backbones.layers import Config
from jaxrm.regress import Scale


def _linear(name: str) -> dict[str, str]:
    return {f'{name}.weight': 'kernel', f'{name}.bias': 'bias'}


def _perceptron(name: str) -> dict[str, str]:
    """torch's Sequential of a linear map, ReLU, and a linear map."""
    layers, parts = ((0, 'hidden'), (2, 'out')), (('weight', 'kernel'), ('bias', 'bias'))
    return {f'{name}.{i}.{p}': f'{layer}/{leaf}' for i, layer in layers for p, leaf in parts}


# {tensor: leaf below 'head/'} of each kind; a bias of a linear head may be absent.
HEADS: dict[str, dict[str, str]] = {
    'score': {'score.weight': 'kernel'},  # transformers' classifiers of one label
    'ratings': {'score.weight': 'kernel'},  # and of several, each a number
    'categories': {'score.weight': 'kernel'},  # or of several, of which one is right
    'v_head': _linear('v_head'),  # InternLM2-reward
    'regression_head': _linear('regression_head'),  # Eurus-RM, UltraRM
    'score_head': _linear('score_head'),  # beaver
    'summary': _linear('v_head.summary'),  # TRL's value head, GRM's linear variant
    'summary_mlp': _perceptron('v_head.summary'),  # GRM
    'score_mlp': _perceptron('score'),  # INF-ORM, Qwen2ForRewardModel
    'gated': {  # ArmoRM, beside its gate
        'regression_layer.weight': 'regression/kernel',
        'reward_transform_matrix': 'transform',
    },
    'lm_head': {'lm_head.weight': 'kernel'},
}
# What config.json says of a classifier with several labels.
PROBLEMS = {'ratings': 'regression', 'categories': 'single_label_classification'}
REWARDS = tuple(kind for kind in HEADS if kind not in (*PROBLEMS, 'lm_head'))
WANTED = {'reward': REWARDS, 'causal_lm': ('lm_head',), **{kind: (kind,) for kind in PROBLEMS}}
CLASSIFIER, CAUSAL, GATED = 'ForSequenceClassification', 'ForCausalLM', 'RewardModelWithGating'
CLASSES = (CLASSIFIER, 'RewardModel', 'ForScore', GATED)  # endings of what has one of REWARDS

# A gated model's keys of config.json: objectives, temperature, hidden units, hidden layers.
GATING = ('num_objectives', 'gating_temperature', 'gating_hidden_dim', 'gating_n_hidden')
# The objectives of ArmoRM-Llama3-8B-v0.1 in their order, which its files do not tell.
OBJECTIVES = (
    *(f'helpsteer-{x}' for x in 'helpfulness correctness coherence complexity verbosity'.split()),
    'ultrafeedback-overall_score', 'ultrafeedback-instruction_following',
    'ultrafeedback-truthfulness', 'ultrafeedback-honesty', 'ultrafeedback-helpfulness',
    'beavertails-is_safe', 'prometheus-score', 'argilla-overall_quality', 'argilla-judge_lm',
    'code-complexity', 'code-style', 'code-explanation', 'code-instruction-following',
    'code-readability',
)  # fmt: skip
SCALES = (Scale(0, 4),) * 5 + (None,) * 14  # of those; only HelpSteer's are published


class Sizes(NamedTuple):
    """What a head's shapes depend on besides the decoder's Config."""

    rewards: int = 1  # objectives of a gated head
    hidden: int = 0
    bias: bool = False
    layers: int = 0  # hidden ones of a gate


SCALAR = Sizes()


def layout(kind: str | None, config: Config, sizes: Sizes) -> dict[str, tuple[str, tuple]]:
    """{tensor: (leaf, its shape)}: none without a head or when it is the embedding."""
    if kind is None or (kind == 'lm_head' and config.tied):
        return {}
    if kind == 'gated':
        return _gated_layout(config.D, sizes)
    out = config.V if kind == 'lm_head' else sizes.rewards
    shape = {
        'kernel': (config.D, out),
        'bias': (out,),
        'hidden/kernel': (config.D, sizes.hidden),
        'hidden/bias': (sizes.hidden,),
        'out/kernel': (sizes.hidden, out),
        'out/bias': (out,),
    }
    tensors = {n: leaf for n, leaf in HEADS[kind].items() if leaf != 'bias' or sizes.bias}
    return {name: ('head/' + leaf, shape[leaf]) for name, leaf in tensors.items()}


def _gated_layout(D: int, sizes: Sizes) -> dict[str, tuple[str, tuple]]:
    """The gate is a part of its own; `transform` is no linear map and never transposed."""
    J, widths = sizes.rewards, [D, *[sizes.hidden] * sizes.layers, sizes.rewards]
    shapes: dict[str, tuple[int, ...]] = {'regression/kernel': (D, J), 'transform': (J, J)}
    out = {name: ('head/' + leaf, shapes[leaf]) for name, leaf in HEADS['gated'].items()}
    out['gating.logit_scale'] = 'gate/scale', (1,)
    for i, shape in enumerate(itertools.pairwise(widths)):
        out[f'gating.layers.{i}.weight'] = (f'gate/layer_{i}/kernel', shape)
        out[f'gating.layers.{i}.bias'] = (f'gate/layer_{i}/bias', shape[1:])
    return out


def sizes(params: Mapping[str, Any], rewards: int = 1) -> Sizes:
    """Of the head in a tree of parts, which is to give so many rewards."""
    head, gate = params.get('head', {}), params.get('gate', {})
    if layers := [name for name in gate if name.startswith('layer_')]:
        hidden = gate['layer_0']['kernel'].shape[-1]
        return Sizes(rewards, hidden, layers=len(layers) - 1)
    hidden = head['hidden']['kernel'].shape[-1] if 'hidden' in head else 0
    return Sizes(rewards, hidden, 'bias' in head)


def gating(where: Path, found: Mapping[str, Any]) -> tuple[Sizes, float]:
    """A gated head's sizes and temperature; raises ValueError unless config.json has them all."""
    if missing := [key for key in GATING if found.get(key) is None]:
        raise ValueError(f'{where}: found no {missing}, which a gated reward model needs')
    J, temperature, hidden, layers = (found[key] for key in GATING)
    for key, size in zip(GATING, (J, 1, hidden, layers), strict=True):
        if not (type(size) is int and 0 < size < 2**31):
            raise ValueError(f'{where}: {key} is {size!r}, expected a whole number from 1')
    if not (type(temperature) in (int, float) and 0 < temperature < math.inf):
        raise ValueError(f'{where}: {GATING[1]} is {temperature!r}, expected a number above 0')
    return Sizes(J, hidden, layers=layers), temperature


def gating_keys(sizes: Sizes, temperature: float | None) -> dict[str, Any]:
    """What config.json says of a gated head; the layers' sizes are those of `sizes`."""
    if temperature is None:
        raise ValueError('temperature: found None, expected that of the gate')
    values = (sizes.rewards, temperature, sizes.hidden, sizes.layers)
    return dict(zip(GATING, values, strict=True))


def of_head(kind: str | None, names: Collection[str]) -> list[str]:
    """Those of a folder's tensors that are this head's."""
    own = HEADS.get(kind or '', {})
    return [n for n in names if n in own or (kind == 'gated' and n.startswith('gating.'))]


def chosen(head: Mapping[str, Any], kind: str | None, objectives: Collection[str]) -> str:
    """The kind to write parameters as that were read as `kind`, or not read at all.

    A linear map is a classifier of transformers; any other head stays what it was.
    """
    if set(head) <= {'kernel'}:
        several = kind if kind in PROBLEMS else 'ratings'
        return several if objectives else 'score'
    if 'transform' in head:
        return 'gated'
    if kind is None:
        raise ValueError(f'head: found {sorted(head)}, which needs a head_kind of {sorted(HEADS)}')
    return kind


def find(where: Path, found: Mapping[str, Any], names: Collection[str], wanted: str) -> str | None:
    """The kind of head of a folder with this config.json and these tensors.

    `wanted` is a key of WANTED, or 'backbone', for which there may be no head that is known. Raises
    ValueError unless the model class and the tensors say the same, and it is what is wanted.
    """
    if wanted != 'backbone' and wanted not in WANTED:
        raise ValueError(f"kind: {wanted!r}, expected 'backbone' or one of {list(WANTED)}")
    known = {'lm_head': (CAUSAL,), 'reward': CLASSES}
    given = found.get('architectures') or []
    classes = [str(c) for c in given] if isinstance(given, list) else [str(given)]
    groups = [g for g, ends in known.items() if any(c.endswith(ends) for c in classes)]
    expected = [f'...{c}' for ends in known.values() for c in ends]
    if len(groups) != 1:
        raise ValueError(f'{where}: architectures is {given}, expected one of {expected}')
    causal = groups == ['lm_head']
    if wanted != 'backbone' and causal != (wanted == 'causal_lm'):
        want = [f'...{c}' for c in known['lm_head' if wanted == 'causal_lm' else 'reward']]
        raise ValueError(f'{where}: architectures is {given}, {wanted!r} expected one of {want}')
    if causal:
        return 'lm_head'
    _check_labels(where, found, wanted)
    if any(c.endswith(GATED) for c in classes):
        return _gated(where, found, names, wanted)
    if wanted != 'backbone' and HEADS['gated'].keys() & set(names):
        raise ValueError(
            f'{where.parent}: heads: found those of a gate, expected ...{GATED} in architectures'
        )
    plain = any(c.endswith(CLASSIFIER) for c in classes)
    return _by_tensors(where, names, wanted, plain)


def _gated(where: Path, found: Mapping[str, Any], names: Collection[str], wanted: str) -> str:
    """QRM declares the same class, but rates quantiles and normalises batches in its gate."""
    if wanted in PROBLEMS:
        raise ValueError(f'{where}: found a reward with a gate, expected a classifier of {wanted}')
    odd = [n for n in names if n.endswith('.running_mean')]
    odd = ['num_quantiles'] if 'num_quantiles' in found else sorted(odd)[:1]
    if odd and wanted == 'reward':
        raise ValueError(f'{where}: found {odd[0]}, a model of quantiles, which is not supported')
    return 'gated'


def _by_tensors(where: Path, names: Collection[str], wanted: str, plain: bool) -> str | None:
    """The kind whose first tensor is there; a classifier without any lacks score.weight."""
    first = {kind: next(iter(HEADS[kind])) for kind in REWARDS if kind != 'gated'}
    kinds: list[str | None] = [kind for kind, name in first.items() if name in names]
    if not kinds and (plain or wanted == 'backbone'):
        kinds = ['score'] if plain else [None]
    if len(kinds) != 1 or (wanted in PROBLEMS and kinds != ['score']):
        here = [name for name in first.values() if name in names] or 'none'
        want = [first['score']] if wanted in PROBLEMS else sorted(first.values())
        raise ValueError(f'{where.parent}: heads: found {here}, expected exactly one of {want}')
    return wanted if wanted in PROBLEMS else kinds[0]


def _check_labels(where: Path, found: Mapping[str, Any], wanted: str) -> None:
    labels = count_labels(where, found)
    if wanted == 'reward' and labels != 1:
        raise ValueError(f'{where}: found {labels} labels, expected 1 (several are ratings)')
    problem = found.get('problem_type')
    if wanted in PROBLEMS and problem not in (None, PROBLEMS[wanted]):
        raise ValueError(f'{where}: problem_type is {problem!r}, expected {PROBLEMS[wanted]!r}')


def count_labels(where: Path, found: Mapping[str, Any]) -> int:
    """How many numbers the head gives, by config.json: transformers' num_labels, 1 by default."""
    named = found.get('id2label') or {}
    if not isinstance(named, dict):
        raise ValueError(f'{where}: id2label is {named!r}, expected a map from 0, 1, ... to names')
    labels = found.get('num_labels', len(named) or 1)
    if not isinstance(labels, int):
        raise ValueError(f'{where}: num_labels is {labels!r}, expected a whole number')
    return labels


def objectives(where: Path, found: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the ratings, or of the categories, from id2label."""
    labels = found.get('id2label')
    names = list(labels.values()) if isinstance(labels, dict) else []
    keys = sorted(labels) if isinstance(labels, dict) else []
    if not names or keys != sorted(map(str, range(len(names)))) or len(set(names)) < len(names):
        raise ValueError(f'{where}: id2label is {labels}, expected names of ratings 0, 1, ...')
    return tuple(str(labels[str(j)]) for j in range(len(names)))  # type: ignore[index]


def labels(kind: str, names: Collection[str]) -> dict[str, Any]:
    """The keys of config.json that name what a head of this kind gives; without names, LABEL_0."""
    names = tuple(names) or ('LABEL_0',)
    if len(set(names)) < len(names):
        raise ValueError(f'objectives: found {names}, expected different names')
    return {
        'id2label': dict(enumerate(names)),
        'label2id': {name: j for j, name in enumerate(names)},
        'problem_type': PROBLEMS.get(kind, 'regression'),
    }
