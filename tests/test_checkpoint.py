"""Checkpoints against those of transformers and PEFT: names, bytes, scores, gradients, refusals."""

import dataclasses
import filecmp
import json
import socket

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import plain
import pytest
import tiny
from safetensors.numpy import load_file
from scipy.special import logsumexp
from torch_goldens import (
    GOLDENS,
    TOLERANCE,
    assert_close,
    golden,
    load,
    packed,
    parts,
    scores,
    states,
)

from jaxrm import bundle, checkpoint, heads, hf, tree
from jaxrm.backbones import llama
from jaxrm.backbones.layers import Kind, Rope
from jaxrm.reward import RewardModel

# Scores as in torch


@pytest.mark.parametrize('name', ['seqcls', 'seqcls_sharded', 'seqcls_old_config'])
def test_scores_equal_torch(name):
    p = load(name)
    assert_close(scores(p, parts(p), 'seqcls'), golden('seqcls')['score_B'])


def test_scores_of_bfloat16_weights_equal_torch():
    p = load('seqcls_bf16', dtype='float32')
    assert_close(scores(p, parts(p), 'seqcls_bf16'), golden('seqcls_bf16')['score_B'])


def test_states_equal_torch():
    p, case = load('seqcls'), golden('seqcls')
    found = states(p, case)
    for row in (1, 4):
        assert_close(found[row, : case['length_B'][row]], case[f'states_{row}'])


@pytest.mark.parametrize('name', ['causal', 'causal_tied'])
def test_logits_equal_torch(name):
    p, case = load(name, 'causal_lm'), golden(name)
    head = heads.LanguageModel(p.config.V, tied=p.config.tied)
    embedding = p.backbone['embed']['embedding']
    logits_BSV = np.asarray(head.apply({'params': p.head}, states(p, case), embedding))
    nll = []
    for i, length in enumerate(case['length_B']):
        logits, ids = logits_BSV[i, :length], case['ids_BS'][i, 1:length]
        if f'logits_{i}' in case:
            assert_close(logits, case[f'logits_{i}'], 1e-4)
        nll += list(logsumexp(logits[:-1], axis=1) - logits[np.arange(length - 1), ids])
    assert np.mean(nll) == pytest.approx(float(case['nll64']), abs=TOLERANCE)


def test_gradients_equal_torch():
    p, (pack, at) = load('seqcls'), packed('seqcls')
    model = RewardModel(llama.Backbone(p.config), heads.Scalar())

    def loss(params):
        score = model.score(params, pack)[:, 0]
        return -jax.nn.log_sigmoid(score[at[0]] - score[at[1]])

    value, grads = jax.jit(jax.value_and_grad(loss))(parts(p))
    expected, leaves = dict(golden('seqcls_grads')), tree.flatten(grads)
    assert value == pytest.approx(float(expected.pop('loss')), abs=1e-5)
    slots = hf.layout(llama, p.config, 'score')
    assert slots.keys() == expected.keys()
    for name, slot in slots.items():
        found = leaves[slot.leaf][... if slot.layer is None else slot.layer]
        found = found.T if slot.transposed else found
        size = np.abs(expected[name]).max()
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-4 * size, err_msg=name)


# In


def test_layouts_on_disk_give_one_tree():
    want = tree.flatten(parts(load('seqcls')))
    for name in ('seqcls_sharded', 'seqcls_old_config'):
        other = load(name)
        assert other.config == load('seqcls').config
        found = tree.flatten(parts(other))
        assert found.keys() == want.keys()
        assert all(np.array_equal(found[k], want[k]) for k in want)


def test_stacks_hold_transposed_kernels_in_layer_order():
    raw, p = load_file(GOLDENS / 'seqcls' / 'model.safetensors'), load('seqcls')
    for i, layer in enumerate((*range(p.config.L - 1), 'top')):
        q = (
            p.backbone['top']
            if layer == 'top'
            else jax.tree.map(lambda x: x[i], p.backbone['layers'])
        )
        assert np.array_equal(q['q']['kernel'].T, raw[f'model.layers.{i}.self_attn.q_proj.weight'])
        assert np.array_equal(
            q['mlp_norm']['scale'], raw[f'model.layers.{i}.post_attention_layernorm.weight']
        )
    assert np.array_equal(p.head['kernel'].T, raw['score.weight'])


def test_dtypes_are_kept_unless_given():
    assert load('seqcls_bf16').dtype == ml_dtypes.bfloat16
    wide = load('seqcls_bf16', dtype='float32')
    assert wide.dtype == np.float32
    same = jax.tree.map(
        lambda a, b: np.array_equal(a, b.astype(np.float32)),
        wide.backbone,
        load('seqcls_bf16').backbone,
    )
    assert all(jax.tree.leaves(same))


def test_kinds_of_head():
    assert load('seqcls').head_kind == 'score'
    causal = load('causal', 'causal_lm')
    assert causal.head_kind == 'lm_head'
    assert causal.head['kernel'].shape == (32, 307)
    assert load('causal_tied', 'causal_lm').head == {}
    for name in ('seqcls', 'causal', 'causal_tied'):
        p = load(name, 'backbone')
        assert p.head is None
        assert p.head_kind is None
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*'reward' expected.*ForSequenceClass"):
        load('causal')
    with pytest.raises(ValueError, match='causal_lm'):
        load('seqcls', 'causal_lm')
    with pytest.raises(ValueError, match="kind: 'rm'"):
        load('seqcls', 'rm')


def test_tokenizer_comes_along_and_nothing_asks_the_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError('the network was asked')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    tokenizer = checkpoint.load_pretrained(GOLDENS / 'seqcls').tokenizer
    with open(GOLDENS / 'tokens.json', encoding='utf-8') as file:
        cases = json.load(file)
    for case in cases['conversations']:
        found = tokenizer.apply_chat_template(case['messages'], return_dict=True)
        assert found['input_ids'] == case['ids']
    for case in cases['plain']:
        assert tokenizer(case['text'])['input_ids'] == case['ids']
    assert load('seqcls_sharded').tokenizer is None


def test_hub_ids_are_downloaded_without_pickles(monkeypatch):
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(GOLDENS / 'seqcls')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    p = checkpoint.load_pretrained('someone/model', revision='abc')
    assert (asked['repo'], asked['revision']) == ('someone/model', 'abc')
    assert not any(pattern.endswith(('bin', 'pt', 'py')) for pattern in asked['allow_patterns'])
    assert p.config == load('seqcls').config
    for path in ('/nowhere/at/all', 'nowhere', './someone/model'):
        with pytest.raises(ValueError, match='no such folder'):
            checkpoint.load_pretrained(path)


@pytest.mark.parametrize(
    'error', [ConnectionError('no\nnetwork'), huggingface_hub.errors.HFValidationError('no\nid')]
)
def test_what_the_hub_says_is_one_line(monkeypatch, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    with pytest.raises(ValueError, match=r'^someone/model: .* not from the hub: no (network|id)$'):
        checkpoint.load_pretrained('someone/model')


# Out


def same_files(a, b):
    """Names of files in `a` whose bytes equal those in `b`."""
    return {f.name for f in a.iterdir() if filecmp.cmp(f, b / f.name, shallow=False)}


@pytest.mark.parametrize(
    ('name', 'kind', 'limit'),
    [
        ('seqcls', 'reward', 5 * 10**9),
        ('seqcls_bf16', 'reward', 5 * 10**9),
        ('seqcls_sharded', 'reward', 50_000),
        ('causal', 'causal_lm', 5 * 10**9),
        ('causal_tied', 'causal_lm', 5 * 10**9),
    ],
)
def test_export_writes_the_files_of_transformers_byte_for_byte(tmp_path, name, kind, limit):
    p, out = load(name, kind), tmp_path / 'a' / 'b'
    checkpoint.export(out, parts(p), p, head_kind=p.head_kind, max_shard_bytes=limit)
    files = {f.name for f in (GOLDENS / name).iterdir()}
    assert {f.name for f in out.iterdir()} == files | {bundle.FILE}
    assert same_files(GOLDENS / name, out) == files
    again = checkpoint.load_pretrained(out, kind=kind)
    assert again.bundle['head'] == p.head_kind
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, parts(again), parts(p))))
    assert (out / 'config.json').stat().st_mode == next(out.glob('*.safetensors')).stat().st_mode


def test_an_old_config_is_written_in_the_new_layout(tmp_path):
    p = load('seqcls_old_config')
    checkpoint.export(tmp_path / 'out', parts(p), p)
    want = {'config.json', 'model.safetensors'}
    assert same_files(GOLDENS / 'seqcls', GOLDENS / 'seqcls') >= want
    assert {
        n for n in want if filecmp.cmp(tmp_path / 'out' / n, GOLDENS / 'seqcls' / n, shallow=False)
    } == want


@pytest.mark.parametrize('source', ['causal', 'causal_tied'])
def test_a_language_model_becomes_a_reward_model(tmp_path, source):
    base = load(source, 'backbone')
    params = {'backbone': base.backbone, 'head': {'kernel': jnp.ones((32, 1))}}
    checkpoint.export(tmp_path / 'rm', params, base, provenance={'data': 'made up'})
    p = checkpoint.load_pretrained(tmp_path / 'rm')
    assert p.bundle['provenance'] == {'data': 'made up'}
    assert p.bundle['pooling'] == 'last'
    config = p.hf_config
    assert config['architectures'] == ['LlamaForSequenceClassification']
    assert config['id2label'] == {'0': 'LABEL_0'}
    assert config['problem_type'] == 'regression'
    assert config['pad_token_id'] == p.tokenizer.pad_token_id != config['eos_token_id']
    assert p.tokenizer.chat_template == base.tokenizer.chat_template
    assert not (tmp_path / 'rm' / 'generation_config.json').exists()


def test_export_of_a_model_that_was_never_loaded(tmp_path):
    config = dataclasses.replace(plain.TINY, V=384, kinds=(Kind(rope=Rope(500.0)),))
    like = checkpoint.Pretrained('llama', config, tiny.tokenizer())
    shapes = hf._backbone_shapes(llama, config)
    backbone = plain.random_tree(
        tree.unflatten({k: jax.ShapeDtypeStruct(s, 'float32') for k, s in shapes.items()})
    )
    checkpoint.export(
        tmp_path / 'a',
        {'backbone': backbone, 'head': {'kernel': jnp.ones((16, 1))}},
        like,
        dtype=jnp.bfloat16,
    )
    p = checkpoint.load_pretrained(tmp_path / 'a')
    assert p.config == config
    assert p.dtype == jnp.bfloat16
    assert p.hf_config['dtype'] == 'bfloat16'
    assert p.hf_config['bos_token_id'] == like.tokenizer.bos_token_id
    assert p.hf_config['eos_token_id'] == like.tokenizer.eos_token_id


def test_exports_that_do_not_fit_are_refused_and_leave_nothing(tmp_path):
    p, out = load('seqcls'), tmp_path / 'out'
    nan = p.head['kernel'] * np.nan
    with pytest.raises(ValueError, match="head_kind: 'linear'"):
        checkpoint.export(out, parts(p), p, head_kind='linear')
    bad = {
        'head/kernel: found float64': parts(p) | {'head': {'kernel': np.ones((32, 1))}},
        'head/kernel: found nothing': {'backbone': p.backbone},
        r'head/kernel: found \(32, 2\), expected \(32, 1\)': parts(p)
        | {'head': {'kernel': np.ones((32, 2))}},
        'gate/kernel: found .* no such leaf': parts(p) | {'gate': {'kernel': np.ones(3)}},
        'score.weight: found 32 values': parts(p) | {'head': {'kernel': nan}},
        'lora/top/q/b: found nothing': parts(p) | {'lora': {'top': {'q': {'a': np.ones((32, 2))}}}},
        'lora/top/x/a: .* no such leaf': parts(p)
        | {'lora': {'top': {'x': {'a': np.ones((32, 2))}}}},
    }
    for words, params in bad.items():
        with pytest.raises(ValueError, match=words):
            checkpoint.export(out, params, p)
        assert list(tmp_path.iterdir()) == []


def test_a_pad_id_that_ends_texts_is_refused(tmp_path):
    p = load('seqcls')
    for pad in ('<|eot_id|>', None):
        like = dataclasses.replace(
            p, tokenizer=tiny.tokenizer(vocab=300, pad=pad, eos='<|eot_id|>')
        )
        with pytest.raises(ValueError, match='pad_token_id: found'):
            checkpoint.export(tmp_path / 'out', parts(p), like)
    hf_config = {**p.hf_config, 'eos_token_id': [1, 4]}
    with pytest.raises(ValueError, match='pad_token_id: found 4'):
        checkpoint.export(tmp_path / 'out', parts(p), dataclasses.replace(p, hf_config=hf_config))
    like = dataclasses.replace(p, tokenizer=tiny.tokenizer(vocab=320))
    with pytest.raises(ValueError, match='expected less than 307'):
        checkpoint.export(tmp_path / 'out', parts(p), like)


def test_overwriting_is_asked_for_and_whole(tmp_path, monkeypatch):
    p, out = load('seqcls'), tmp_path / 'out'
    out.mkdir()
    checkpoint.export(out, parts(p), p)  # an empty folder is no obstacle
    (out / 'left over').touch()
    with pytest.raises(ValueError, match='overwrite'):
        checkpoint.export(out, parts(p), p)
    before = sorted(f.name for f in out.iterdir())

    def fail(*_, **__):
        raise OSError('disk full')

    with monkeypatch.context() as m:
        m.setattr(hf.shards, 'write', fail)
        with pytest.raises(OSError, match='disk full'):
            checkpoint.export(out, parts(p), p, overwrite=True)
    assert sorted(f.name for f in out.iterdir()) == before
    assert [f.name for f in tmp_path.iterdir()] == ['out']
    checkpoint.export(out, parts(p), p, overwrite=True)
    assert not (out / 'left over').exists()
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'letter.txt').touch()
    with pytest.raises(ValueError, match=r'what holds config\.json'):
        checkpoint.export(other, parts(p), p, overwrite=True)


def test_a_bundle_that_does_not_fit_is_refused(tmp_path):
    p, out = load('seqcls'), tmp_path / 'out'
    checkpoint.export(out, parts(p), p)
    (out / 'chat_template.jinja').write_text('{{ messages }}')
    with pytest.raises(ValueError, match=r'jaxrm\.json: template is'):
        checkpoint.load_pretrained(out)
