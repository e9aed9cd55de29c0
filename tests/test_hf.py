"""Folders that are not what they should be, and the names of tensors."""

import dataclasses
import json

import numpy as np
import plain
import pytest
from safetensors.numpy import load_file, save_file
from torch_goldens import GOLDENS, copy, edit_json, edit_tensors, load

from jaxrm import checkpoint, hf
from jaxrm.backbones import FAMILIES, llama


def test_every_family_names_every_leaf():
    for family in FAMILIES.values():
        slots = hf.layout(family, plain.TINY, None)
        leaves = {'backbone/' + k for k in hf._backbone_shapes(family, plain.TINY)}
        assert {slot.leaf for slot in slots.values()} == leaves
    for layers in (1, 2):
        config = dataclasses.replace(plain.TINY, L=layers)
        assert len(hf.layout(llama, config, 'score')) == 2 + 9 * layers + 1


def refused(folder, *words, kind='reward', **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are looked for below)
        checkpoint.load_pretrained(folder, kind=kind, **options)
    for word in words:
        assert word in str(error.value)


def test_tensors_that_do_not_fit_are_refused_in_one_message(tmp_path):
    folder = copy(tmp_path)
    zeros = np.zeros((2, 32), np.float32)
    edit_tensors(folder, model__norm__weight=None, score__weight=None, model__extra=zeros)
    refused(
        folder, 'score.weight: found nothing, expected [1, 32]', 'model.norm.weight', 'model.extra'
    )


@pytest.mark.parametrize(
    ('value', 'words'),
    [
        (np.zeros((2, 32), np.float32), ('found shape [2, 32], expected [1, 32]',)),
        (np.zeros((1, 32), np.int8), ('found dtype I8',)),
        (np.full((1, 32), np.nan, np.float32), ('32 values that are not finite',)),
        (None, ('score.weight: found nothing',)),
    ],
)
def test_heads_that_do_not_fit_are_refused(tmp_path, value, words):
    folder = copy(tmp_path)
    edit_tensors(folder, score__weight=value)
    refused(folder, 'score.weight', *words)


def test_layers_of_two_dtypes_need_a_dtype(tmp_path):
    folder = copy(tmp_path)
    edit_tensors(folder, model__layers__1__self_attn__q_proj__weight=np.ones((32, 32), np.float16))
    refused(folder, 'layers.1.self_attn.q_proj', 'float16')
    assert checkpoint.load_pretrained(folder, dtype='float32').dtype == np.float32


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path):
    folder = copy(tmp_path)
    edit_tensors(folder, model__norm__weight=np.full(32, 1e6, np.float32))
    refused(folder, 'model.norm.weight', 'float16', dtype='float16')


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'architectures': ['LlamaForRewardModelWithGating']}, ('WithGating', 'ForSequence')),
        ({'architectures': None}, ('architectures',)),
        ({'model_type': 'mamba'}, ("'mamba'",)),
        ({'id2label': {'0': 'no', '1': 'yes'}}, ('2 labels',)),
        ({'quantization_config': {'bits': 4}}, ('quantization_config',)),
        ({'hidden_size': None}, ('hidden_size',)),
        ({'num_hidden_layers': 2}, ('layers.2', 'no such tensor')),
        ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1.0}}, ('yarn',)),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, change, words):
    folder = copy(tmp_path)
    edit_json(folder / 'config.json', **change)
    refused(folder, *words)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    refused(tmp_path, 'no config.json')
    refused(GOLDENS / 'peft', 'load_adapter')
    folder = copy(tmp_path)
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    refused(folder, 'pytorch_model.bin', 'pickles')
    (folder / 'pytorch_model.bin').unlink()
    refused(folder, 'neither', 'model.safetensors')
    (folder / 'model.safetensors').write_bytes(b'\x08\0\0\0\0\0\0\0{}')
    refused(folder, 'model.safetensors: not a readable')
    (folder / 'config.json').write_text('[]')
    refused(folder, 'config.json', 'list')


def test_shards_that_are_missing_or_not_as_indexed_are_refused(tmp_path):
    folder = copy(tmp_path, 'seqcls_sharded')
    shard = folder / 'model-00002-of-00004.safetensors'
    edit_tensors_of = load_file(shard)
    name, value = edit_tensors_of.popitem()
    save_file(edit_tensors_of, shard)
    refused(folder, shard.name, name)
    shard.unlink()
    refused(folder, 'index.json', shard.name)
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    outside = dict.fromkeys(index['weight_map'], '../seqcls/model.safetensors')
    edit_json(folder / 'model.safetensors.index.json', weight_map=outside)
    refused(folder, '../seqcls')


def test_tensors_that_follow_from_others_may_be_there(tmp_path):
    folder = copy(tmp_path, 'causal_tied')
    table = load_file(folder / 'model.safetensors')['model.embed_tokens.weight']
    buffer = {'model__layers__0__self_attn__rotary_emb__inv_freq': np.ones(4, np.float32)}
    edit_tensors(folder, lm_head__weight=table, **buffer)
    assert checkpoint.load_pretrained(folder, kind='causal_lm').head == {}
    edit_tensors(folder, lm_head__weight=2 * table)
    refused(folder, 'lm_head.weight differs', kind='causal_lm')


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    folder = copy(tmp_path)
    tokenizer = load('seqcls').tokenizer
    bigger = type(tokenizer).from_pretrained(folder)
    bigger.add_tokens(['<|one more|>'])
    bigger.save_pretrained(folder)
    refused(folder, "'<|one more|>' has id 307, expected less than 307")
