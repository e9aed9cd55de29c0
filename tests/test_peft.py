"""Adapters in and out, against PEFT's own files and scores."""

import filecmp
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_goldens import (
    GOLDENS,
    assert_close,
    copy,
    edit_json,
    edit_tensors,
    golden,
    load,
    parts,
    scores,
)

from jaxrm import checkpoint, lora


def test_adapter_scores_equal_peft():
    p = load('seqcls')
    adapter = checkpoint.load_adapter(GOLDENS / 'peft', p)
    assert adapter.scale == 2.0
    params = {'backbone': p.backbone, 'lora': adapter.lora, 'head': adapter.head}
    assert_close(scores(p, params, 'peft', adapter.scale), golden('peft')['score_B'])


def test_folded_adapters_score_as_adapters_do(tmp_path):
    p = load('seqcls')
    adapter = checkpoint.load_adapter(GOLDENS / 'peft', p)
    params = {'backbone': p.backbone, 'lora': adapter.lora, 'head': adapter.head}
    checkpoint.export(tmp_path / 'folded', params, p, lora_scale=adapter.scale)
    folded = checkpoint.load_pretrained(tmp_path / 'folded')
    want = lora.fold(jax.tree.map(jnp.asarray, p.backbone), adapter.lora, adapter.scale)
    assert_close(folded.backbone['layers']['q']['kernel'], want['layers']['q']['kernel'], 1e-6)
    assert np.array_equal(folded.backbone['top']['o']['kernel'], p.backbone['top']['o']['kernel'])
    assert_close(scores(folded, parts(folded), 'peft'), golden('peft')['score_B'])


def test_exported_adapters_are_those_of_peft(tmp_path):
    p = load('seqcls')
    adapter = checkpoint.load_adapter(GOLDENS / 'peft', p)
    params = {'backbone': p.backbone, 'lora': adapter.lora, 'head': adapter.head}
    out = tmp_path / 'adapter'
    checkpoint.export_adapter(out, params, p, lora_scale=adapter.scale, base='seqcls')
    file = 'adapter_model.safetensors'
    assert filecmp.cmp(out / file, GOLDENS / 'peft' / file, shallow=False)
    found = json.loads((out / 'adapter_config.json').read_text())
    want = json.loads((GOLDENS / 'peft' / 'adapter_config.json').read_text())
    assert set(found.pop('modules_to_save')) <= set(want['modules_to_save'])
    assert found.items() <= want.items()
    again = checkpoint.load_adapter(out, p)
    assert again.scale == adapter.scale
    assert again.tokenizer.chat_template == p.tokenizer.chat_template
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.lora, adapter.lora)))


def test_an_adapter_of_some_layers_names_them(tmp_path):
    p = load('causal', 'backbone')
    made = lora.init(
        jax.tree.map(jnp.asarray, p.backbone), jax.random.key(0), rank=2, targets='top/(q|down)'
    )
    checkpoint.export_adapter(tmp_path / 'a', {'lora': made}, p, lora_scale=0.75, base='base')
    found = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
    assert found['target_modules'] == [
        'model.layers.2.mlp.down_proj',
        'model.layers.2.self_attn.q_proj',
    ]
    assert (found['lora_alpha'], found['task_type'], found['modules_to_save']) == (
        1.5,
        'CAUSAL_LM',
        None,
    )
    again = checkpoint.load_adapter(tmp_path / 'a', p)
    assert again.head is None
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.lora, made)))


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'use_rslora': True}, 'use_rslora'),
        ({'use_dora': True}, 'use_dora'),
        ({'peft_type': 'LOHA'}, 'LOHA'),
        ({'bias': 'all'}, 'bias'),
        ({'rank_pattern': {'q_proj': 8}}, 'rank_pattern'),
        ({'init_lora_weights': 'pissa'}, 'pissa'),
        ({'modules_to_save': ['score', 'embed_tokens']}, 'embed_tokens'),
        ({'something_new': 1}, 'something_new'),
        ({'r': 8}, r'found shape \[4, 32\], expected \[8, 32\]'),
        ({'r': None}, 'r=None'),
    ],
)
def test_adapters_that_are_not_plain_are_refused(tmp_path, change, words):
    folder = copy(tmp_path, 'peft')
    edit_json(folder / 'adapter_config.json', **change)
    with pytest.raises(ValueError, match=words):
        checkpoint.load_adapter(folder, load('seqcls'))


def test_exports_without_an_adapter_are_refused(tmp_path):
    p = load('seqcls')
    with pytest.raises(ValueError, match="expected 'lora'"):
        checkpoint.export_adapter(tmp_path / 'a', parts(p), p, lora_scale=1.0, base='base')
    stacked = {'top': {'q': {'a': np.ones((2, 32, 4)), 'b': np.ones((2, 4, 32))}}}
    with pytest.raises(ValueError, match=r'lora/top/q/a: found \(2, 32, 4\), expected \(32, 4\)'):
        checkpoint.export_adapter(tmp_path / 'a', {'lora': stacked}, p, lora_scale=1.0, base='base')
    assert list(tmp_path.iterdir()) == []


def test_adapters_without_a_head_or_a_layer_are_refused(tmp_path):
    folder, prefix = copy(tmp_path, 'peft'), 'base_model__model__'
    edit_tensors(folder, **{prefix + 'score__weight': None})
    with pytest.raises(ValueError, match=r'score.weight: found nothing'):
        checkpoint.load_adapter(folder, load('seqcls'))
    edit_tensors(folder, **{prefix + 'score__weight': np.ones((1, 32), np.float32)})
    edit_tensors(folder, **{prefix + 'model__layers__1__self_attn__q_proj__lora_A__weight': None})
    with pytest.raises(ValueError, match=r'layers.1.self_attn.q_proj.lora_A.weight: found nothing'):
        checkpoint.load_adapter(folder, load('seqcls'))
