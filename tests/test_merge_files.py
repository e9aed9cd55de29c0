"""Merges on disk: against mergekit's own by the same recipes, and of reward and language models.

Goldens are of tests/reference/make_recipe_goldens.py.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from merge_tiny import DOGERM, LINEAR, TABLES, pair, read, recipe, save, variant
from safetensors.numpy import load_file
from torch_goldens import GOLDENS
from transformers import AutoTokenizer

import jaxrm
from jaxrm import chat_templates, checkpoint, merge, merge_files, merge_plan, shards, tree

RECIPES = Path(__file__).parent / 'goldens' / 'recipes'
RESULTS = json.loads((RECIPES / 'results.json').read_text())
TALKS = [
    [{'role': 'user', 'content': 'Which river?'}, {'role': 'assistant', 'content': said}]
    for said in ('The Nile.', 'No idea, and a lake?', 'Three rivers in the valley.')
]


def merged(folder, text, **options):
    """The output of a recipe in a folder, and its tensors."""
    merge_files.write(merge_plan.prepare(recipe(folder, text)), folder / 'out', **options)
    return folder / 'out', read(folder / 'out')


def config(folder):
    return json.loads((folder / 'config.json').read_text())


# mergekit's recipes


@pytest.mark.parametrize('name', sorted(RESULTS))
def test_recipes_give_what_mergekit_gives(tmp_path, name):
    merge_files.write(merge_plan.prepare(RECIPES / f'{name}.yml'), tmp_path / 'out')
    found, want = read(tmp_path / 'out'), load_file(RECIPES / f'{name}.safetensors')
    assert found.keys() == want.keys()
    bits, differs = {'linear': 10, 'rounded': 7}.get(name), []  # of the mantissa, where rounded
    for key, x in want.items():
        y = found[key]
        assert (y.dtype, y.shape) == (x.dtype, x.shape), key
        if bits is None:
            np.testing.assert_allclose(y, x, rtol=1e-6, atol=1e-6, err_msg=key)
            continue
        gap = np.abs(y.astype(np.float64) - x)
        assert (gap <= np.abs(x) * 2.0**-bits).all(), key  # the next number at most
        differs += [*(gap > 0).ravel()]
    assert np.mean(differs or 0) < 0.01
    said, written = RESULTS[name], config(tmp_path / 'out')
    for key in ('vocab_size', 'num_hidden_layers', 'architectures'):
        assert written[key] == said[key]
    assert written['dtype'] == said['dtypes'][0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert tokenizer.get_vocab() == said['vocabulary']
    if said['template']:
        assert tokenizer.chat_template == said['template']


@pytest.mark.parametrize('name', chat_templates.NAMED)
def test_templates_by_name(name):
    """mergekit's, without white space that the models they are called after do not have."""
    golden = json.loads((RECIPES / 'templates.json').read_text())
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / 'base')
    tokenizer.chat_template = chat_templates.NAMED[name]
    talk = golden['talk']
    cases = ((talk, False), (talk[1:], False), (talk[:4], True), (talk[1:2], True))
    for (turns, opened), want in zip(cases, golden['texts'][name], strict=True):
        found = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened)
        if name in ('chatml', 'mistral'):
            assert found == want
        assert ''.join(found.split()) == ''.join(want.split())


# A reward model and a language model


@pytest.fixture
def rm_and_lm(tmp_path):
    """A folder with `rm` and `domain_lm`; each has a token of its own, the latter rows for more."""
    variant('seqcls', tmp_path / 'rm', tokens=['<|rate|>'])
    lm = tmp_path / 'domain_lm'
    variant('causal', lm, noise=0.05, tokens=['<|math|>', '<|step|>'], pad=3, pad_token_id=1)
    (lm / 'chat_template.jinja').write_text('{{ messages }}')
    return tmp_path


def test_dogerm(rm_and_lm):
    out, found = merged(rm_and_lm, DOGERM)
    rm, lm = read(rm_and_lm / 'rm'), read(rm_and_lm / 'domain_lm')
    assert found.keys() == rm.keys()
    assert found['score.weight'].tobytes() == rm['score.weight'].tobytes()
    table, (ours, theirs) = found['model.embed_tokens.weight'], (x[TABLES[0]] for x in (rm, lm))
    for name in rm.keys() - {'score.weight', TABLES[0]}:
        want = 0.7 * rm[name].astype(np.float64) + 0.3 * lm[name]
        np.testing.assert_allclose(found[name], want, rtol=0, atol=1e-6, err_msg=name)
    want = 0.7 * ours[:307].astype(np.float64) + 0.3 * theirs[:307]
    np.testing.assert_allclose(table[:307], want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(table[307], ours[307])
    np.testing.assert_array_equal(table[308:], theirs[307:309])
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens([307, 308, 309]) == ['<|rate|>', '<|math|>', '<|step|>']
    assert tokenizer.pad_token_id == 4
    assert tokenizer.chat_template == (rm_and_lm / 'rm' / 'chat_template.jinja').read_text()
    said, before = config(out), config(rm_and_lm / 'rm')
    assert said.pop('vocab_size') == 310
    for key in said.keys() - {'transformers_version', 'dtype'}:
        assert said[key] == before[key], key
    beside = json.loads((out / 'jaxrm.json').read_text())
    assert (beside['head'], beside['provenance']) == ('score', {'merge': DOGERM})
    assert np.isfinite(jaxrm.load(out).score(TALKS)).all()


@pytest.mark.parametrize('method', ['linear', 'task_arithmetic', 'slerp', 'ties'])
def test_nothing_of_the_language_model_is_the_reward_model(tmp_path, method):
    """Bit for bit: every tensor, and the scores."""
    tensors = read(variant('seqcls', tmp_path / 'rm'))
    tensors['model.layers.1.mlp.up_proj.weight'][0] = -0.0
    save(tmp_path / 'rm', tensors)
    variant('causal', tmp_path / 'domain_lm', noise=0.05)
    text = DOGERM.replace('0.7', '1').replace('0.3', '0')
    if method != 'linear':
        text = text.replace('linear', f'{method}\nbase_model: rm')
    if method == 'slerp':
        text = text.replace(', parameters: {weight: 1}', '').replace('weight: 0', '')
        text += 'parameters: {t: 0}\n'
    out, found = merged(tmp_path, text)
    for key, x in tensors.items():
        assert found[key].tobytes() == x.tobytes(), key
    if method == 'linear':
        before, after = (jaxrm.load(folder).score(TALKS) for folder in (tmp_path / 'rm', out))
        assert before.tobytes() == after.tobytes()


def test_ids_do_not_matter(tmp_path):
    """A language model whose tokens have other ids, with its rows where they are."""
    _, want = merged(pair(tmp_path), DOGERM)
    lm, file = tmp_path / 'domain_lm', tmp_path / 'domain_lm' / 'tokenizer.json'
    tensors, said = read(lm), json.loads(file.read_text())
    new = np.random.default_rng(0).permutation(len(said['model']['vocab']))
    said['model']['vocab'] = {w: int(new[i]) for w, i in said['model']['vocab'].items()}
    for token in said['added_tokens']:
        token['id'] = int(new[token['id']])
    file.write_text(json.dumps(said))
    save(lm, tensors | {name: tensors[name][np.argsort(new)] for name in TABLES})
    merge_files.write(merge_plan.prepare(tmp_path / 'recipe.yml'), tmp_path / 'permuted')
    found = read(tmp_path / 'permuted')
    assert all(found[name].tobytes() == x.tobytes() for name, x in want.items())
    with pytest.raises(ValueError, match='expected the same, or a tokenizer section'):
        merge_plan.prepare(recipe(tmp_path, LINEAR))


def test_all_of_the_language_model_under_the_head(rm_and_lm):
    _, found = merged(rm_and_lm, DOGERM.replace('0.7', '0').replace('0.3', '1'))
    lm = read(rm_and_lm / 'domain_lm')
    for name in found.keys() - {'score.weight', TABLES[0]}:
        np.testing.assert_array_equal(found[name], lm[name])


def test_a_tied_language_model_and_narrow_files(tmp_path):
    variant('seqcls_bf16', tmp_path / 'rm')
    variant('causal_tied', tmp_path / 'domain_lm', dtype=np.float16)
    text = DOGERM.replace('dtype: float32\n', '').replace('tokenizer: {source: union}\n', '')
    _, found = merged(tmp_path, text)
    rm, lm = read(tmp_path / 'rm'), read(tmp_path / 'domain_lm')
    assert found['score.weight'].tobytes() == rm['score.weight'].tobytes()
    assert found['score.weight'].dtype.name == 'bfloat16'
    for name in rm.keys() - {'score.weight'}:
        want = 0.7 * rm[name].astype(np.float64) + 0.3 * lm[name].astype(np.float64)
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], want, rtol=0, atol=1e-6, err_msg=name)


def test_narrow_inputs_are_rounded_once(tmp_path):
    """A sum of bfloat16 tensors is written as float32 without a stop at bfloat16."""
    for seed, name in enumerate(('rm', 'domain_lm')):
        source = 'seqcls_sharded' if name == 'rm' else 'causal'
        variant(source, tmp_path / name, noise=0.1, seed=seed, dtype=ml_dtypes.bfloat16)
    text = LINEAR.replace('dtype: float32', 'out_dtype: float32')
    name = 'model.layers.0.mlp.up_proj.weight'
    x, y = (read(tmp_path / model)[name].astype(np.float64) for model in ('rm', 'domain_lm'))
    found = merged(tmp_path, text)[1][name]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 0.7 * x + 0.3 * y, rtol=0, atol=1e-6)


def test_averaged_heads(tmp_path):
    models = [variant('seqcls', tmp_path / f'rm{i}', noise=0.1, seed=i) for i in range(3)]
    variant('causal', tmp_path / 'base', noise=0.1)
    listed = ', '.join(f'{{model: rm{i}, parameters: {{weight: 0.5}}}}' for i in range(3))
    _, found = merged(
        tmp_path,
        f'merge_method: task_arithmetic\nbase_model: base\nmodels: [{listed}]\n'
        'reward_head: {average: true}\n',
    )
    heads = [read(model)['score.weight'].astype(np.float64) for model in models]
    np.testing.assert_allclose(found['score.weight'], np.mean(heads, 0), rtol=0, atol=1e-7)
    assert 'lm_head.weight' not in found


RNG = np.random.default_rng(0)
HEADS = {
    'v_head': {'v_head.weight': (1, 32)},
    'summary_mlp': {
        'v_head.summary.0.weight': (6, 32),
        'v_head.summary.0.bias': (6,),
        'v_head.summary.2.weight': (1, 6),
        'v_head.summary.2.bias': (1,),
    },
}


@pytest.mark.parametrize('kind', HEADS)
def test_heads_of_other_classes_are_carried(tmp_path, kind):
    rm = variant('seqcls', tmp_path / 'rm', architectures=['LlamaForRewardModel'])
    head = {n: RNG.normal(size=shape).astype(np.float32) for n, shape in HEADS[kind].items()}
    tensors = read(rm) | head | {'lm_head.weight': np.zeros((307, 32), np.float32)}
    del tensors['score.weight']
    save(rm, tensors)  # some are released with the head of the language model
    variant('causal', tmp_path / 'domain_lm')
    assert_carried(tmp_path, head)


def test_gates_are_carried(tmp_path):
    source = GOLDENS.parent / 'gated' / 'k5'
    variant(source, tmp_path / 'rm', dtype=np.float32)
    tensors = read(tmp_path / 'rm')
    head = {n: x for n, x in tensors.items() if not n.startswith('model.')}
    assert len(head) > 4
    lm = variant(source, tmp_path / 'domain_lm', noise=0.1, architectures=['LlamaForCausalLM'])
    language = {n: x for n, x in read(lm).items() if n not in head}
    save(lm, language | {'lm_head.weight': language[TABLES[0]]})
    (lm / 'jaxrm.json').unlink(missing_ok=True)
    assert_carried(tmp_path, head, DOGERM.replace('tokenizer: {source: union}\n', ''))


def assert_carried(folder, head, text=DOGERM):
    out, found = merged(folder, text)
    for name, x in head.items():
        assert found[name].tobytes() == x.tobytes(), name
    assert 'lm_head.weight' not in found
    p = checkpoint.load_pretrained(out)
    assert p.head_kind == checkpoint.load_pretrained(folder / 'rm').head_kind


# Slices


def test_stacked_reward_models_score(tmp_path):
    for i in range(2):
        variant('seqcls', tmp_path / f'rm{i}', noise=0.1, seed=i)
    out, found = merged(
        tmp_path,
        'merge_method: passthrough\nslices:\n'
        '- sources: [{model: rm0, layer_range: [0, 2]}]\n'
        '- sources: [{model: rm1, layer_range: [1, 3]}]\n'
        'reward_head: {source: rm0}\n',
    )
    rm0, rm1 = (read(tmp_path / f'rm{i}') for i in range(2))
    want = {'model.layers.1.mlp.up_proj.weight': rm0['model.layers.1.mlp.up_proj.weight']}
    want |= {'model.layers.2.mlp.up_proj.weight': rm1['model.layers.1.mlp.up_proj.weight']}
    want |= {'model.norm.weight': rm1['model.norm.weight'], 'score.weight': rm0['score.weight']}
    want |= {TABLES[0]: rm0[TABLES[0]]}
    for name, x in want.items():
        assert found[name].tobytes() == x.tobytes(), name
    assert config(out)['num_hidden_layers'] == 4
    assert np.isfinite(jaxrm.load(out).score(TALKS)).all()


def test_layers_keep_their_kinds(tmp_path):
    """Layers of a model whose layers take turns see what they saw."""
    source = GOLDENS.parent / 'families' / 'gemma2'
    variant(source, tmp_path / 'rm')
    kinds = [checkpoint.load_pretrained(source).config.kinds[i] for i in (0, 1, 1, 0)]
    ranges = ([0, 2], [1, 2], [0, 1])
    slices = ', '.join(f'{{sources: [{{model: rm, layer_range: {r}}}]}}' for r in ranges)
    out, _ = merged(tmp_path, f'merge_method: passthrough\nslices: [{slices}]\n')
    found = checkpoint.load_pretrained(out).config
    assert [found.kinds[i] for i in found.of_layer] == kinds
    text = (
        'merge_method: linear\nparameters: {weight: 1}\nslices:\n'
        '- sources: [{model: rm, layer_range: [0, 2]}, {model: rm2, layer_range: [1, 3]}]\n'
    )
    variant(source, tmp_path / 'rm2')
    with pytest.raises(ValueError, match='layer 0 would be merged of'):
        merge_plan.prepare(recipe(tmp_path, text))
    merge_plan.prepare(recipe(tmp_path, text + 'on_mismatch: keep_first\n'))


# On disk


def test_the_same_as_in_memory_and_in_any_number_of_files(rm_and_lm):
    text = (
        'merge_method: dare_ties\nbase_model: base\nmodels:\n'
        '- {model: one, parameters: {weight: 0.6, density: 0.5}}\n'
        '- {model: two, parameters: {weight: [0.3, 0.9], density: 0.7}}\n'
    )
    models = {'base': variant('seqcls', rm_and_lm / 'base')}
    models |= {
        name: variant('seqcls', rm_and_lm / name, noise=0.1, seed=seed)
        for seed, name in enumerate(('one', 'two'), 1)
    }
    _, found = merged(rm_and_lm, text, seed=3, max_shard_bytes=20_000)
    assert len(list((rm_and_lm / 'out').glob('*.safetensors'))) > 3
    p = {name: checkpoint.load_pretrained(folder) for name, folder in models.items()}
    backbones = {name: {'backbone': x.backbone} for name, x in p.items()}
    want = merge.trees(
        'dare_ties',
        [backbones['one'], backbones['two']],
        base=backbones['base'],
        seed=3,
        weight=[0.6, [0.3, 0.9]],
        density=[0.5, 0.7],
    )
    got = checkpoint.load_pretrained(rm_and_lm / 'out').backbone
    for name, x in tree.flatten(want['backbone']).items():
        np.testing.assert_array_equal(tree.flatten(got)[name], x, err_msg=name)


def test_what_is_said_before_reads_no_weights(rm_and_lm, monkeypatch):
    monkeypatch.setattr(shards, 'read', None)
    monkeypatch.setattr(np, 'fromfile', None)
    said = merge_files.describe(merge_plan.prepare(recipe(rm_and_lm, DOGERM)), 100_000)
    assert said[:5] == [
        'rm: LlamaForSequenceClassification, 3 layers, 308 rows of the vocabulary, float32',
        'domain_lm: LlamaForCausalLM, 3 layers, 312 rows of the vocabulary, float32',
        'merged by linear: 29 tensors',
        'copied from rm: score.weight',
        'left out of domain_lm: lm_head.weight',
    ]
    assert any('310 rows' in line for line in said[5:-1])
    assert said[-1].startswith(
        'written: 3 layers, 310 rows of the vocabulary, float32, 151 KB in 2'
    )
