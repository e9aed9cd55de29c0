"""Broken checkpoints: each fault is one error that names what is wrong, and nothing is written.

`FAULTS` is the table; a fault is made in an empty folder and must raise a ValueError.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from broken import (
    ADAPTERS,
    INDEX,
    WEIGHTS,
    Q,
    adapted,
    bundled,
    causal,
    config,
    content,
    exported,
    full,
    in_the_way,
    length,
    made_gate,
    one_more_token,
    other,
    removed,
    reward,
    scored,
    shard,
    spoiled,
    tensors,
    twice,
    with_head,
)
from torch_goldens import GOLDENS


class Fault(NamedTuple):
    """What makes it, in a folder, and words its message must have."""

    name: str
    make: Callable[[Path], Any]
    words: tuple[str, ...]


HEAD, WRONG = 'score.weight: found', 'found shape [2, 32], expected [1, 32]'
LAYER = 'model__layers__1__self_attn__q_proj__weight'
LORA = 'base_model__model__model__layers__0__self_attn__q_proj__lora_'
EOT = '<|eot_id|>'
TWO = {'0': 'no', '1': 'yes'}
CAUSAL = functools.partial(spoiled, source='causal')
SHARDED = functools.partial(spoiled, source='seqcls_sharded')
ABSURD = ('config.json', 'expected a whole number from 1')

FAULTS = [
    # The head
    Fault('no head', spoiled(tensors(score__weight=None)), (HEAD + ' nothing',)),
    Fault('two labels', spoiled(config(id2label=TWO)), ('found 2 labels, expected 1',)),
    Fault('labels as a number', spoiled(config(id2label=2)), ('id2label is 2, expected a map',)),
    Fault('half a label', spoiled(config(num_labels=0.5)), ('num_labels is 0.5', 'whole number')),
    Fault('two rows', spoiled(tensors(score__weight=full(2, 32))), ('score.weight', WRONG)),
    Fault('narrow head', spoiled(tensors(score__weight=full(1, 16))), (HEAD, '[1, 16]', '[1, 32]')),
    Fault(
        'NaN in the head',
        spoiled(tensors(score__weight=full(1, 32, value=np.nan))),
        ('score.weight: found 32 values', 'not finite'),
    ),
    Fault(
        'infinity in the head',
        spoiled(tensors(score__weight=full(1, 32, value=np.inf))),
        ('score.weight', 'not finite'),
    ),
    Fault(
        'head of integers',
        spoiled(tensors(score__weight=full(1, 32, dtype=np.int8))),
        (HEAD + ' dtype I8',),
    ),
    Fault(
        'two heads',
        spoiled(tensors(v_head__weight=full(1, 32))),
        ('heads', 'score.weight', 'v_head.weight', 'exactly one'),
    ),
    Fault(
        'custom class, no head',
        spoiled(config(architectures=['LlamaForRewardModel']), tensors(score__weight=None)),
        ('heads: found none', 'exactly one of'),
    ),
    # Other tensors
    Fault(
        'missing tensor',
        spoiled(tensors(model__norm__weight=None)),
        ('model.norm.weight: found nothing, expected [32]',),
    ),
    Fault(
        'NaN in the backbone',
        spoiled(tensors(**{LAYER: full(32, 32, value=np.nan)})),
        (Q, '1024 values', 'not finite'),
    ),
    Fault(
        'unexpected tensor',
        spoiled(tensors(model__extra__weight=full(2))),
        ('model.extra.weight', 'expected no such tensor'),
    ),
    Fault(
        'wrong shape',
        spoiled(tensors(**{LAYER: full(32, 8)})),
        (Q, 'found shape [32, 8], expected [32, 32]'),
    ),
    Fault(
        'transposed',
        spoiled(tensors(model__layers__1__mlp__up_proj__weight=full(32, 64))),
        ('found shape [32, 64], expected [64, 32]',),
    ),
    Fault(
        'integers',
        spoiled(tensors(**{LAYER: full(32, 32, dtype=np.int8)})),
        (Q, 'dtype I8', 'BF16'),
    ),
    Fault(
        'double precision',
        spoiled(tensors(**{LAYER: full(32, 32, dtype=np.float64)})),
        (Q, 'dtype F64'),
    ),
    Fault(
        'layers of two dtypes',
        spoiled(tensors(**{LAYER: full(32, 32, dtype=np.float16)})),
        (Q, 'float16', 'give a dtype'),
    ),
    Fault(
        'gated, as a classifier',
        spoiled(made_gate),
        ('heads: found those of a gate', 'RewardModelWithGating in architectures'),
    ),
    Fault(
        'gated, by its class',
        spoiled(made_gate, config(architectures=['LlamaForRewardModelWithGating'])),
        ('found no', 'num_objectives', 'gating_temperature'),
    ),
    # Files of tensors
    Fault(
        'truncated weights',
        spoiled(content(WEIGHTS, lambda x: x[:-100])),
        (WEIGHTS, 'not a readable safetensors'),
    ),
    Fault(
        'truncated header',
        spoiled(content(WEIGHTS, lambda x: x[:100])),
        (WEIGHTS, 'not a readable safetensors'),
    ),
    Fault(
        'empty weights',
        spoiled(content(WEIGHTS, lambda x: b'')),
        (WEIGHTS, 'not a readable safetensors'),
    ),
    Fault(
        'header past the end',
        spoiled(content(WEIGHTS, length(1 << 24))),
        (WEIGHTS, 'not a readable'),
    ),
    Fault(
        'header of 2^63 bytes',
        spoiled(content(WEIGHTS, length((1 << 63) - 1))),
        (WEIGHTS, 'not a readable'),
    ),
    Fault(
        'header is not JSON',
        spoiled(content(WEIGHTS, lambda x: x[:8] + b'x' + x[9:])),
        (WEIGHTS, 'not a readable'),
    ),
    Fault(
        'a folder as weights',
        spoiled(removed(WEIGHTS), lambda f: (f / WEIGHTS).mkdir()),
        (WEIGHTS,),
    ),
    Fault('no weights', spoiled(removed(WEIGHTS)), ('no weights', WEIGHTS, INDEX)),
    Fault(
        'pickles',
        spoiled(lambda f: (f / WEIGHTS).rename(f / 'pytorch_model.bin')),
        ('pytorch_model.bin', 'pickles'),
    ),
    Fault(
        'missing shard',
        SHARDED(removed('model-00002-of-00004.safetensors')),
        (INDEX, 'model-00002-of-00004.safetensors'),
    ),
    Fault(
        'index of an absent tensor',
        SHARDED(shard(lambda f, w: w.update({'model.extra': w[Q]}))),
        ('model.extra', 'only in the index'),
    ),
    Fault('index without a tensor', SHARDED(shard(lambda f, w: w.pop(Q))), (Q, 'only here')),
    Fault('tensor in two shards', SHARDED(shard(twice)), (Q, 'only here or only in the index')),
    Fault(
        'index into another folder',
        SHARDED(shard(lambda f, w: w.update({Q: '../a.safetensors'}))),
        (INDEX, '../a.safetensors'),
    ),
    Fault(
        'index without weight_map', SHARDED(other(INDEX, weight_map=None)), (INDEX, 'weight_map')
    ),
    Fault('index of a list', SHARDED(other(INDEX, weight_map=[Q])), (INDEX, 'weight_map')),
    Fault('index is not JSON', SHARDED(content(INDEX, lambda x: x[:40])), (INDEX, 'not JSON')),
    # config.json
    Fault('no config', spoiled(removed('config.json')), ('no config.json',)),
    Fault(
        'config is not JSON',
        spoiled(content('config.json', lambda x: x[:40])),
        ('config.json: not JSON',),
    ),
    Fault(
        'config is not text',
        spoiled(content('config.json', lambda x: b'\xff\xfe' + x)),
        ('config.json: not JSON',),
    ),
    Fault(
        'config is a list',
        spoiled(content('config.json', lambda x: b'[]')),
        ('config.json: found list',),
    ),
    Fault('no hidden_size', spoiled(config(hidden_size=None)), ('hidden_size', 'no default')),
    *(
        Fault(f'hidden_size {x!r}', spoiled(config(hidden_size=x)), ('hidden_size', *ABSURD))
        for x in (-32, 0, '32', 32.5, True, 1 << 40)
    ),
    Fault('vocabulary of -1', spoiled(config(vocab_size=-1)), ('vocab_size', *ABSURD)),
    Fault('no layers', spoiled(config(num_hidden_layers=0)), ('num_hidden_layers', *ABSURD)),
    Fault(
        'a billion layers',
        spoiled(config(num_hidden_layers=10**9)),
        ('1000000000 layers', '30 tensors'),
    ),
    Fault('a layer more', spoiled(config(num_hidden_layers=4)), ('layers.3', 'found nothing')),
    Fault('a layer less', spoiled(config(num_hidden_layers=2)), ('layers.2', 'no such tensor')),
    Fault(
        'heads that do not divide',
        spoiled(config(num_attention_heads=5, num_key_value_heads=5, head_dim=None)),
        ('config.json', 'width 32, 5 heads', 'divide'),
    ),
    Fault(
        'key heads that do not divide',
        spoiled(config(num_key_value_heads=3)),
        ('4 heads, 3 of keys',),
    ),
    Fault('odd heads', spoiled(config(head_dim=7)), ('head width 7', 'even')),
    Fault(
        'more heads',
        spoiled(config(num_attention_heads=8)),
        ('q_proj.weight', 'found shape [32, 32], expected [64, 32]'),
    ),
    Fault(
        'norm_eps of a word', spoiled(config(rms_norm_eps='small')), ('config.json', 'rms_norm_eps')
    ),
    Fault('norm_eps below 0', spoiled(config(rms_norm_eps=-1e-5)), ('config.json', 'rms_norm_eps')),
    Fault(
        'rope of a word',
        spoiled(config(rope_parameters={'rope_theta': 'x', 'rope_type': 'default'})),
        ('config.json',),
    ),
    Fault('rope is a number', spoiled(config(rope_parameters=3)), ('config.json',)),
    Fault(
        'unknown rope',
        spoiled(config(rope_parameters={'rope_type': 'yarn', 'rope_theta': 1.0})),
        ('yarn',),
    ),
    Fault('unknown activation', spoiled(config(hidden_act='relu')), ('hidden_act', "'relu'")),
    Fault('unknown model type', spoiled(config(model_type='mamba')), ('model_type', "'mamba'")),
    Fault('no model type', spoiled(config(model_type=None)), ('model_type', 'None')),
    Fault(
        'no architectures',
        spoiled(config(architectures=None)),
        ('architectures is [], expected one of',),
    ),
    Fault('architectures is a number', spoiled(config(architectures=3)), ('architectures is 3',)),
    Fault(
        'quantised',
        spoiled(config(quantization_config={'bits': 4})),
        ('quantization_config', 'plain weights'),
    ),
    Fault(
        'compressed', spoiled(config(compression_config={'format': 'int'})), ('compression_config',)
    ),
    Fault('language model as a reward model', CAUSAL(), ('LlamaForCausalLM', "'reward' expected")),
    Fault(
        'reward model as a language model',
        spoiled(use=causal),
        ('ForSequenceClassification', "'causal_lm' expected"),
    ),
    *(
        Fault(f'pad id {x!r}', spoiled(config(pad_token_id=x)), ('pad_token_id', 'below 307'))
        for x in (307, -1, '4', [4])
    ),
    # Beside the weights
    Fault(
        'a token past the embedding',
        spoiled(one_more_token),
        ("'<|one more|>' has id 307", 'less than 307'),
    ),
    Fault(
        'truncated tokenizer',
        spoiled(content('tokenizer.json', lambda x: x[:-100])),
        ('the tokenizer cannot be read',),
    ),
    Fault(
        'tokenizer without its file',
        spoiled(removed('tokenizer.json')),
        ('the tokenizer cannot be read',),
    ),
    Fault(
        'truncated tokenizer_config',
        spoiled(content('tokenizer_config.json', lambda x: x[:40])),
        ('the tokenizer cannot be read',),
    ),
    Fault(
        'no tokenizer',
        spoiled(removed('tokenizer.json', 'tokenizer_config.json'), use=scored),
        ('found no tokenizer', 'tokenizer.json'),
    ),
    Fault(
        'no chat template',
        spoiled(removed('chat_template.jinja'), use=scored),
        ('found no chat template',),
    ),
    Fault(
        'broken chat template',
        spoiled(content('chat_template.jinja', lambda x: b'{% for %}'), use=scored),
        ('template',),
    ),
    Fault(
        'broken generation config',
        CAUSAL(content('generation_config.json', lambda x: x[:20]), use=causal),
        ('generation_config.json: not JSON',),
    ),
    Fault('another version', bundled(version=2), ('jaxrm.json: version is 2, expected 1',)),
    Fault('no version', bundled(version=None), ('jaxrm.json: version is None, expected 1',)),
    Fault('another template', bundled(template='0' * 16), ('jaxrm.json: template is',)),
    Fault(
        'another kind of head',
        bundled(head='lm_head'),
        ("jaxrm.json: head is 'lm_head', expected 'score'",),
    ),
    Fault(
        'another pooling',
        bundled(pooling='mean'),
        ("jaxrm.json: pooling is 'mean', expected 'last'",),
    ),
    # Adapters
    Fault('adapter without a base', adapted(base=None), ('holds an adapter', 'base')),
    Fault('adapter on nothing', adapted(base='nowhere'), ('nowhere: no such folder',)),
    Fault('a model as an adapter', adapted(source=GOLDENS / 'seqcls'), ('no adapter_config.json',)),
    Fault(
        'adapter of another width',
        adapted(tensors(**{LORA + 'A__weight': full(4, 16)})),
        ('lora_A.weight: found shape [4, 16], expected [4, 32]',),
    ),
    Fault(
        'adapter without its head',
        adapted(tensors(base_model__model__score__weight=None)),
        ('base_model.model.score.weight: found nothing',),
    ),
    Fault(
        'adapter without a layer',
        adapted(tensors(**{LORA + x + '__weight': None for x in 'AB'})),
        ('layers.0.self_attn.q_proj.lora_A.weight: found nothing',),
    ),
    Fault(
        'no head anywhere',
        adapted(source=ADAPTERS / 'headless', base=GOLDENS / 'causal'),
        ('LlamaForCausalLM', "'reward' expected"),
    ),
    Fault(
        'adapter with NaN',
        adapted(tensors(**{LORA + 'A__weight': full(4, 32, value=np.nan)})),
        ('lora_A.weight', 'not finite'),
    ),
    Fault('DoRA', adapted(other('adapter_config.json', use_dora=True)), ('use_dora', 'plain LoRA')),
    Fault(
        'pickled adapter',
        adapted(lambda f: (f / 'adapter_model.safetensors').rename(f / 'adapter_model.bin')),
        ('adapter_model.bin', 'pickles'),
    ),
    # Out
    Fault('a folder in the way', in_the_way, ('out: exists', 'overwrite=True')),
    Fault(
        'export of NaN',
        exported(with_head(full(32, 1, value=np.nan))),
        ('score.weight: found 32 values', 'not finite'),
    ),
    Fault('export of integers', exported(dtype='int8'), ('found int8', 'float32')),
    Fault(
        'export of a wide head',
        exported(with_head(full(32, 2))),
        ('head/kernel: found (32, 2), expected (32, 1)',),
    ),
    Fault(
        'export without a head',
        exported(lambda w: {'backbone': w['backbone']}),
        ('head/kernel: found nothing',),
    ),
    Fault(
        'export without a pad id',
        exported(like={'tokenizer': tiny.tokenizer(vocab=300, pad=None)}),
        ('pad_token_id: found None',),
    ),
    Fault(
        'export with pad = end',
        exported(like={'tokenizer': tiny.tokenizer(vocab=300, pad=EOT)}),
        ('pad_token_id: found', 'end of text'),
    ),
    Fault(
        'export of a large tokenizer',
        exported(like={'tokenizer': tiny.tokenizer(vocab=320)}),
        ('expected less than 307',),
    ),
    # Nowhere
    Fault('a path that is not there', lambda f: reward(f / 'model'), ('no such folder',)),
    Fault('a file', spoiled(use=lambda f: reward(f / WEIGHTS)), ('no such folder',)),
    Fault(
        'the hub without a network',
        lambda f: reward('someone/model'),
        ('someone/model: no such folder, and not from the hub',),
    ),
]


@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f.name)
def test_faults_are_named(fault, tmp_path):
    """One error of a readable size, and nothing half-written."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are looked for below)
        fault.make(tmp_path)
    message = str(error.value)
    for word in fault.words:
        assert word in message
    assert len(message) < 2000
    assert {p.name for p in tmp_path.iterdir()} <= {'model', 'adapter', 'out'}
    assert not (tmp_path / 'out' / 'config.json').exists()
