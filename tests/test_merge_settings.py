"""What recipes say beside the weights: special tokens, and what `--check` says of parameters."""

import json
import re
import shutil

import pytest
from merge_tiny import DOGERM, LINEAR, SMALL, TABLES, command, pair, read, recipe
from torch_goldens import edit_json
from transformers import AutoTokenizer

import jaxrm
from jaxrm import checkpoint, merge, merge_files, merge_plan, places


@pytest.fixture
def run(monkeypatch, capfd):
    return command(monkeypatch, capfd)


@pytest.fixture
def folder(tmp_path):
    return pair(tmp_path)


def config(folder):
    return json.loads((folder / 'config.json').read_text())


# Special tokens


def test_a_pad_token_that_ends_texts(folder, run):
    """As DogeRM's own reward model has it: it stays, and --check says what it does."""
    edit_json(folder / 'rm' / 'tokenizer_config.json', pad_token='</s>')
    edit_json(folder / 'rm' / 'config.json', pad_token_id=3)
    status, out, _ = run(folder / 'recipe.yml', '--check')
    assert status == 0
    assert 'pad token: 3, an end of text, as in rm: of texts that end in it' in out
    assert run(folder / 'recipe.yml', folder / 'out')[0] == 0
    assert config(folder / 'out')['pad_token_id'] == 3
    assert AutoTokenizer.from_pretrained(folder / 'out').pad_token == '</s>'
    found = checkpoint.load_pretrained(folder / 'out')
    with pytest.raises(ValueError, match=r'not an end of text \(\[3\]\); set'):
        checkpoint.export(folder / 'again', found.params, found)


@pytest.mark.slow
def test_scores_do_not_hang_on_the_pad_token(folder):
    """It stands in the texts' template, too."""
    talk = [{'role': 'user', 'content': 'a river'}, {'role': 'assistant', 'content': 'a lake'}]
    before = jaxrm.load(folder / 'rm').score([talk])
    edit_json(folder / 'rm' / 'tokenizer_config.json', pad_token='</s>')
    edit_json(folder / 'rm' / 'config.json', pad_token_id=3)
    assert jaxrm.load(folder / 'rm').score([talk]) == before


def test_other_pad_tokens_are_not_mentioned(folder, run):
    assert 'pad token' not in run(folder / 'recipe.yml', '--check')[1]


@pytest.mark.parametrize('head', ['reward', 'language model'])
def test_ids_are_those_of_the_vocabulary_that_leads(folder, head):
    """Its tokens stand elsewhere than in the model whose settings the output has."""
    shutil.rmtree(folder / 'domain_lm')
    shutil.copytree(SMALL / 'shuffled', folder / 'domain_lm')
    edit_json(folder / 'domain_lm' / 'config.json', eos_token_id=[6, 5])
    text = DOGERM.replace('union', 'domain_lm')
    if head == 'language model':
        shutil.rmtree(folder / 'rm')
        shutil.copytree(SMALL / 'math', folder / 'rm')
        ids = {
            'bos_token_id': 2,
            'eos_token_id': 3,
            'pad_token_id': 1,
            'top_k': 7,
            'do_sample': True,
        }
        (folder / 'rm' / 'generation_config.json').write_text(json.dumps(ids | {'do_sample': True}))
        text = text.replace('reward_head: {source: rm}\n', '')
    merge_files.write(merge_plan.prepare(recipe(folder, text)), folder / 'out')
    tokenizer = AutoTokenizer.from_pretrained(folder / 'out')
    assert tokenizer.convert_ids_to_tokens([16, 6, 1]) == ['<s>', '</s>', '<pad>']
    said = config(folder / 'out')
    assert [said[f'{x}_token_id'] for x in ('bos', 'eos', 'pad')] == [16, [6, 5], 1]
    if head == 'language model':
        said = json.loads((folder / 'out' / 'generation_config.json').read_text())
        assert [said[f'{x}_token_id'] for x in ('bos', 'eos', 'pad')] == [16, [6, 5], 1]
        assert said['top_k'] == 7
    row = read(folder / 'domain_lm')[TABLES[0]][6]
    mixed = 0.7 * read(folder / 'rm')[TABLES[0]][3] + 0.3 * row
    assert read(folder / 'out')[TABLES[0]][6] == pytest.approx(mixed, abs=1e-6)


# Parameters


def no_weights_read(*_, **__):
    raise AssertionError('read a tensor')


BASED = LINEAR.replace('linear', 'della').replace('models:', 'base_model: rm\nmodels:')
BAD = {
    'weights of no sum': (
        LINEAR.replace('0.7', '-0.3'),
        'weight: found [-0.3, 0.3], which add up to 0',
    ),
    'weights of no sum somewhere': (
        LINEAR.replace('0.7', '[1, -0.3]'),
        'model.layers.3.input_layernorm.weight: weight: found [-0.3, 0.3]',
    ),
    'weights of spheres': (
        LINEAR.replace('linear', 'multislerp').replace('0.7', '-0.3'),
        'which add up to 0',
    ),
    'density and epsilon': (
        BASED.replace('weight: 0.3', 'weight: 0.3, density: 0.9, epsilon: 0.2'),
        'density: found 0.9 and epsilon 0.2',
    ),
}


@pytest.mark.parametrize('name', BAD)
def test_parameters_are_checked_before_weights_are_read(folder, monkeypatch, name):
    text, message = BAD[name]
    monkeypatch.setattr(merge_files.shards, 'read', no_weights_read)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        merge_plan.prepare(recipe(folder, text))
    assert str(error.value).startswith(f'{folder / "recipe.yml"}: model.')


def test_filters_of_nothing_are_named(folder, run):
    """mergekit passes over them; of a tensor that is not merged is one, too."""
    given = '[{filter: mlp, value: 1}, {filter: self_atn, value: 0.5}, {filter: lm_head, value: 2}'
    recipe(folder, DOGERM.replace('weight: 0.7', f'weight: {given}, {{value: 0.7}}]'))
    status, out, _ = run(folder / 'recipe.yml', '--check')
    assert status == 0
    said = "filter '{}' of weight: is part of the name of no tensor that is merged\n"
    assert said.format('self_atn') in out
    assert said.format('lm_head') in out
    assert 'mlp' not in out
    status, _, err = run(folder / 'recipe.yml', folder / 'out')
    assert (status, said.format('self_atn') in err) == (0, True)


def test_what_a_killed_merge_has_left_is_named_and_goes(folder, run):
    left = folder / f'.out.{merge_files.hf._host()}{"0" * 32}'
    left.mkdir()
    (left / 'model.safetensors').write_text('half')
    status, out, err = run(folder / 'recipe.yml', folder / 'out')
    assert (status, out) == (0, '')
    assert err.startswith(f'{left}: removed, as a killed run had left it\n')
    assert {path.name for path in folder.iterdir()} == {'rm', 'domain_lm', 'recipe.yml', 'out'}


# YAML


def plain(node):
    """A Node's value without places."""
    if isinstance(node.value, dict):
        return {key: plain(x) for key, x in node.value.items()}
    return [plain(x) for x in node.value] if isinstance(node.value, list) else node.value


def test_keys_that_are_merged(folder):
    """As YAML 1.1 has it: what stands there goes before, and of several the first."""
    text = """
common: &common {weight: 0.5, density: 0.3}
other: &other {weight: 0.9, t: 1}
one: {<<: *common, density: 0.1}
two:
  <<: [*common, *other]
  t: 2
"""
    found = plain(places.read(recipe(folder, text)))
    assert found['one'] == {'weight': 0.5, 'density': 0.1}
    assert found['two'] == {'weight': 0.5, 'density': 0.3, 't': 2}
    with pytest.raises(ValueError, match=r'recipe.yml:1: .*expected a mapping behind <<'):
        places.read(recipe(folder, 'a: {<<: 3}'))


def test_a_recipe_of_stages(folder):
    file = recipe(folder, f'name: first\n{LINEAR}---\n{LINEAR}')
    with pytest.raises(ValueError, match=r'found 2 YAML documents, expected 1, a file for each st'):
        merge_plan.prepare(file)


def test_help_says_what_comes_where(run):
    _, out, _ = run('--help')
    assert 'RECIPE [OUTPUT]' in ' '.join(out.split())
    assert '{None}|STR' not in out.partition('options')[0]


def test_methods_check_what_they_are_given():
    assert merge.complete('linear', {'weight': 1}, 2, 'w') == {'weight': [1, 1], 'normalize': True}
    assert merge.complete('linear', {'weight': [1, -1], 'normalize': False}, 2, 'w')
