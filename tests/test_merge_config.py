"""Merge recipes: what YAML says, in values computed by hand, and a line for all that is wrong."""

from pathlib import Path

import pytest

from jaxrm import merge_config, merge_steps

RECIPES = Path(__file__).parent / 'goldens' / 'recipes'
LAYERS = {'a': 5, 'b': 5, 'base': 5}
EMBED, NORM = 'model.embed_tokens.weight', 'model.norm.weight'


def recipe(tmp_path, text):
    file = tmp_path / 'recipe.yml'
    file.write_text(text)
    return merge_config.read(file)


def steps(tmp_path, text, *names):
    """The steps of an output's tensors, by name."""
    made = merge_steps.steps(recipe(tmp_path, text), LAYERS, names)
    return {step.name: step for step in made}


def q(layer):
    return f'model.layers.{layer}.self_attn.q_proj.weight'


def down(layer):
    return f'model.layers.{layer}.mlp.down_proj.weight'


# What it says


WEIGHTS = """
merge_method: linear
models:
  - {{model: a, parameters: {{weight: {}}}}}
  - {{model: b, parameters: {{weight: 1}}}}
"""


@pytest.mark.parametrize(
    ('weight', 'want'),
    [
        ('3', [3, 3, 3, 3, 3]),
        ('[0, 1]', [0, 0.25, 0.5, 0.75, 1]),
        ('[0, 1, 0, 3]', [0, 0.75, 0.5, 0.75, 3]),
        ('[7]', [7, 7, 7, 7, 7]),
        ('{filter: q_proj, value: [1, 2e0]}', [1, 1.25, 1.5, 1.75, 2]),
        ('[{filter: mlp, value: 9}, {value: 2}]', [2, 2, 2, 2, 2]),
        ("[{filter: '*', value: 4}, {filter: q_proj, value: 2}]", [4, 4, 4, 4, 4]),
        ('[{filter: layers.1., value: 9}, {value: [0, 4]}]', [0, 9, 2, 3, 4]),
    ],
)
def test_values_along_the_layers(tmp_path, weight, want):
    found = steps(tmp_path, WEIGHTS.format(weight), *map(q, range(5)))
    weights = [found[q(i)].parameters['weight'] for i in range(5)]
    assert weights == [(pytest.approx(w), 1) for w in want]


def test_what_belongs_to_no_layer_is_at_the_beginning(tmp_path):
    found = steps(tmp_path, WEIGHTS.format('[2, 3]'), EMBED, NORM, 'lm_head.weight')
    assert {step.parameters['weight'] for step in found.values()} == {(2, 1)}


def test_switches_stand_until_the_next(tmp_path):
    text = WEIGHTS.format(1) + 'parameters: {normalize: [false, true, false]}\n'
    found = steps(tmp_path, text, *map(q, range(5)))
    want = [False, False, True, True, False]
    assert [found[q(i)].parameters['normalize'] for i in range(5)] == want
    text = WEIGHTS.format(1) + 'parameters: {normalize: 0, int8_mask: true}\n'
    assert steps(tmp_path, text, NORM)[NORM].parameters == {'weight': (1, 1), 'normalize': False}


SLICES = """
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 1], parameters: {weight: [1, 2]}}
      - {model: b, layer_range: [3, 4]}
    parameters: {weight: 10}
  - sources:
      - {model: b, layer_range: [1, 4], parameters: {weight: [{filter: layers.2., value: 5}]}}
      - {model: a, layer_range: [0, 3]}
    parameters: {weight: [{filter: mlp, value: 20}]}
parameters:
  weight: [30, 34]
  normalize: [{filter: layers.3., value: false}, {value: true}]
"""


def test_slices_take_from_layers_and_say_what_goes_first(tmp_path):
    names = [EMBED, NORM, *map(q, range(4)), *map(down, range(4))]
    found = steps(tmp_path, SLICES, *names)
    inputs = {name: [tuple(x) for x in found[name].inputs] for name in names}
    assert inputs[EMBED] == [(0, EMBED), (1, EMBED)]
    assert inputs[NORM] == [(1, NORM), (0, NORM)]
    assert inputs[q(0)] == [(0, q(0)), (1, q(3))]
    assert inputs[q(3)] == [(1, q(3)), (0, q(2))]
    weights = {name: found[name].parameters['weight'] for name in names}
    assert weights[EMBED] == (1, 10)
    assert weights[NORM] == (30, 30)
    assert weights[q(0)] == weights[down(0)] == (2, 10)  # the only layer of its slice
    assert weights[q(1)] == (30, 30)
    assert weights[q(2)] == (5, 32)  # b's layer 2, a's layer 1
    assert weights[down(2)] == (5, 20)
    assert weights[q(3)] == (34, 34)
    switches = {name: found[name].parameters['normalize'] for name in names}
    assert [n for n, switch in switches.items() if not switch] == [q(3), down(3)]


def test_the_base_is_a_model_and_apart(tmp_path):
    text = 'merge_method: {}\nbase_model: base\nmodels: [{{model: a}}]\nparameters: {}\n'
    found = steps(tmp_path, text.format('ties', '{weight: 2, density: [1, 0]}'), q(1))[q(1)]
    assert (found.base, found.inputs) == ((1, q(1)), ((0, q(1)),))
    assert found.parameters['weight'] == (2,)
    assert found.parameters['density'] == (0.75,)
    assert found.parameters['lambda'] == 1
    found = steps(tmp_path, text.format('linear', '{weight: 2}'), q(1))[q(1)]
    assert (found.base, found.inputs) == (None, ((0, q(1)), (1, q(1))))


def test_modules(tmp_path):
    text = WEIGHTS.format(1).replace('models:', 'modules:\n default:\n  models:')
    text = text.replace('\n  - ', '\n    - ') + '  parameters: {normalize: false}\n'
    found = steps(tmp_path, text + 'parameters: {normalize: true}\n', NORM)
    assert found[NORM].parameters == {'weight': (1, 1), 'normalize': False}


def test_tokens(tmp_path):
    text = (RECIPES / 'tokens.yml').read_text()
    found = recipe(tmp_path, text).tokenizer
    assert (found.source, found.pad_to_multiple_of) == ('union', 8)
    assert found.tokens == {
        '<|im_start|>': {'source': 'tags', 'force': False},
        '<pad>': {'source': 'tags', 'force': True},
        '<|none|>': {'source': {'kind': 'zero'}, 'force': False},
        '<|end|>': {
            'source': {'kind': 'model_token', 'model': 'tags', 'token': '<|im_end|>'},
            'force': False,
        },
        '<|first|>': {
            'source': {'kind': 'model_token', 'model': 'math', 'token_id': 2},
            'force': True,
        },
    }
    for said, want in (('base', 'base'), ('a', 'a'), ('model:a', 'a')):
        found = recipe(tmp_path, f'{WEIGHTS.format(1)}tokenizer_source: {said}\n')
        assert found.tokenizer == (want, {}, None)


def test_own_keys(tmp_path):
    found = recipe(tmp_path, WEIGHTS.format(1) + 'reward_head: {source: b}\nlm_head: drop\n')
    assert (found.head, found.on_mismatch, found.dtype) == ('b', 'error', None)
    more = 'reward_head: {average: true}\non_mismatch: keep_first\ndtype: float16\n'
    found = recipe(tmp_path, WEIGHTS.format(1) + more)
    assert (found.head, found.on_mismatch, found.dtype) == ('', 'keep_first', 'float16')


# What is wrong: the text, and what the line says behind the file's name

LINEAR = WEIGHTS.format(1)
TASK = 'merge_method: task_arithmetic\n'
WRONG = {
    'no YAML': ('a: [1\n', ":2: not YAML: expected ',' or ']'"),
    'a tab': ('a:\n\tb: 1\n', ':2: not YAML: found character'),
    'two documents': (LINEAR + '---\n' + LINEAR, ': found 2 YAML documents, expected 1'),
    'nothing': ('', ': found 0 YAML documents'),
    'a list': ('- a\n', ':1: found a list, expected a mapping'),
    'a key again': (LINEAR + 'merge_method: ties\n', ':6: merge_method: found again'),
    'a key of a list': ('[a]: 1\n', ':1: recipe: found a key that is not plain text'),
    'itself': ('a: &x\n  b: *x\n', ':1: a.b.b'),
    'no method': ('models: [{model: a}]\n', ":1: found no 'merge_method'"),
    'unknown method': ('merge_method: lineer\n', ":1: merge_method: found 'lineer', expected one"),
    'unknown key': (LINEAR + 'modells: []\n', ':6: modells: no such key, expected one of'),
    'unknown key of a model': (
        LINEAR + '  - {model: c,\n     paramters: {weight: 1}}\n',
        ":7: models[2].paramters: no such key, expected one of ['model', 'parameters']",
    ),
    'unknown parameter': (
        WEIGHTS.format('1, wieght: 2'),
        ':4: models[0].parameters.wieght: no such key',
    ),
    "another method's parameter": (
        LINEAR + 'parameters: {density: 1}\n',
        ":6: parameters.density: no such key, expected one of ['int8_mask', 'normalize', 'weight']",
    ),
    'unknown key of a value': (
        WEIGHTS.format('[{pattern: mlp, value: 1}]'),
        ":4: models[0].parameters.weight[0].pattern: no such key, expected one of ['filter', 'val",
    ),
    "the whole merge's number in a model": (
        WEIGHTS.format('1, normalize: true'),
        ':4: models[0].parameters.normalize: is of the whole merge',
    ),
    'a weight of text': (WEIGHTS.format('much'), ":4: models[0].parameters.weight: found 'much'"),
    'a weight of quotes': (WEIGHTS.format('"1"'), ".weight: found '1', expected a number"),
    'a weight of true': (WEIGHTS.format('true'), '.weight: found True, expected a number'),
    'an infinite weight': (WEIGHTS.format('.inf'), '.weight: found inf, expected a number'),
    'a density of two': (
        'merge_method: ties\nbase_model: a\nmodels: [{model: b}]\nparameters: {density: [1, 2]}\n',
        ':4: parameters.density[1]: found 2, expected a number from 0 to 1',
    ),
    'no values': (WEIGHTS.format('[]'), '.weight: found a list, expected a list of at least one'),
    'lists in lists': (WEIGHTS.format('[1, [2]]'), '.weight[1]: found a list, expected a number'),
    'numbers and filters': (
        WEIGHTS.format('[1, {value: 2}]'),
        '.weight[0]: found 1, expected a mapping',
    ),
    'a filter without a value': (
        WEIGHTS.format('[{filter: mlp}]'),
        ".weight[0]: found no 'value', expected one",
    ),
    'a switch of text': (
        LINEAR + 'parameters: {normalize: on purpose}\n',
        ":6: parameters.normalize: found 'on purpose', expected true or false",
    ),
    'a date': (WEIGHTS.format('2024-13-45'), ".weight: found '2024-13-45'"),
    'no models': ('merge_method: linear\nmodels: []\n', ':2: models: found a list, expected a li'),
    'nothing to merge': ('merge_method: linear\n', ':1: found none, expected one of models'),
    'models and slices': (LINEAR + 'slices: []\n', ":2: found ['models', 'slices'], expected one"),
    'a model twice': (LINEAR.replace('b,', 'a,'), ":3: models: found 'a' more than once"),
    'a model of a number': (LINEAR.replace('b,', '3,'), ':5: models[1].model: found 3, expected t'),
    'no model': (
        'merge_method: linear\nmodels:\n  - parameters: {weight: 1}\n',
        ":3: models[0]: found no 'model', expected one",
    ),
    'no base': (TASK + 'models: [{model: a}]\n', ':2: models: found no base_model, which task_ari'),
    'too many models': (
        'merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n',
        ':2: models: found 2 models, expected 1 for passthrough',
    ),
    'too few models': (
        'merge_method: model_stock\nbase_model: base\nmodels: [{model: a}]\n',
        ':3: models: found 1 models, expected 2 or more beside the base for model_stock',
    ),
    'no base in a slice': (
        TASK + 'base_model: base\nslices: [{sources: [{model: a, layer_range: [0, 1]}]}]\n',
        ":3: slices[0]: found no base_model 'base', expected it as a source",
    ),
    'no layers': (
        'merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]\n',
        ':2: slices[0].sources[0].layer_range[1]: found 2, expected a whole number from 3',
    ),
    'a range of one': (
        'merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2]}]}]\n',
        ':2: slices[0].sources[0].layer_range: found a list, expected a list of the first',
    ),
    'unequal ranges': (
        SLICES.replace('[3, 4]', '[3, 5]'),
        ':4: slices[0]: found [1, 2] layers, expected as many of each model',
    ),
    'unknown dtype': (LINEAR + 'dtype: float64\n', ":6: dtype: found 'float64', expected one of"),
    'unknown module': (
        'merge_method: linear\nmodules: {encoder: {models: [{model: a}]}}\n',
        ":2: modules.encoder: no such key, expected one of ['default']",
    ),
    'a module of nothing': (
        'merge_method: linear\nmodules: {default: {parameters: {weight: 1}}}\n',
        ':2: modules.default: found none, expected models or slices',
    ),
    'head of another model': (
        LINEAR + 'reward_head: {source: c}\n',
        ":6: reward_head.source: found 'c', expected one of ['a', 'b']",
    ),
    'two heads': (
        LINEAR + 'reward_head: {source: a, average: true}\n',
        ":6: reward_head: found ['average', 'source'], expected source or average",
    ),
    'no average': (LINEAR + 'reward_head: {average: false}\n', '.average: found False, expected t'),
    'no head at all': (LINEAR + 'lm_head: drop\n', ':6: lm_head: found no reward_head to take its'),
    'lm_head kept': (LINEAR + 'lm_head: keep\n', ":6: lm_head: found 'keep', expected one of"),
    'two tokenizers': (
        LINEAR + 'tokenizer: {source: base}\ntokenizer_source: base\n',
        ':7: tokenizer_source: found tokenizer, too',
    ),
    "nobody's tokenizer": (
        LINEAR + 'tokenizer: {source: c}\n',
        ":6: tokenizer.source: found 'c', expected union, base or one of ['a', 'b']",
    ),
    'a token of no kind': (
        LINEAR + 'tokenizer: {tokens: {x: {source: {kind: one}}}}\n',
        ":6: tokenizer.tokens.x.source.kind: found 'one', expected one of",
    ),
    'a token of two tokens': (
        LINEAR + 'tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}\n',
        ":6: tokenizer.tokens.x.source: found ['kind', 'model'], expected token or token_id",
    ),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_recipes(tmp_path, name):
    text, message = WRONG[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are looked for below)
        recipe(tmp_path, text)
    said = str(error.value)
    assert said.startswith(str(tmp_path / 'recipe.yml'))
    assert message in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (
            WEIGHTS.format('[{filter: mlp, value: 1}]'),
            ':4: models[0] (a): model.norm.weight: found no',
        ),
        (LINEAR.replace(', parameters: {weight: 1}', ''), 'found no weight, which has no default'),
        ('merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n', 'parameters: model.norm.we'),
        (SLICES.replace('[1, 4]', '[3, 6]'), ':9: slices[1].sources[0]: found layers up to 6, b'),
        (LINEAR.replace('model: a', 'model: small'), ":3: models: found {'small': 2, 'b': 5} lay"),
    ],
)
def test_what_only_the_models_tell(tmp_path, text, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are looked for below)
        merge_steps.steps(recipe(tmp_path, text), LAYERS | {'small': 2}, [NORM])
    assert message in str(error.value)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / 'recipe.yml').write_bytes(b'merge_method: \xff\n')
    with pytest.raises(ValueError, match='byte 15: not UTF-8 text'):
        merge_config.read(tmp_path / 'recipe.yml')
    with pytest.raises(ValueError, match='cannot be read: No such file'):
        merge_config.read(tmp_path / 'none.yml')
