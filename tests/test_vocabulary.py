"""Tables of models with different tokenizers: mergekit's results, and rows by their tokens."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tokenizers import AddedToken

from jaxrm import merge, vocabulary

GOLDENS = Path(__file__).parent / 'goldens' / 'vocabulary'
MADE = json.loads((GOLDENS / 'cases.json').read_text())
NAMES = ['base', 'a', 'b']
TEXT = 'the quick brown fox: what is the answer? <think> hmm'


def by_token(tokens):
    return {token: i for i, token in enumerate(tokens)}


def rows(count, seed=0, width=4):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


# Results of mergekit


@pytest.mark.parametrize('name', MADE['cases'])
def test_equals_mergekit(name):
    """All rows, by token, and padding; tables that mergekit cuts to its tokens are not cut."""
    case, weight = MADE['cases'][name], MADE['weight']
    with np.load(GOLDENS / 'tables.npz') as file:
        tables, want = [file[x] for x in NAMES], file[f'{name}/result']
    plan = vocabulary.plan(
        [by_token(MADE['tokens'][x]) for x in NAMES],
        [len(x) for x in tables],
        names=NAMES,
        base=0 if case['base'] else None,
        **case['section'],
    )
    first, *others = (vocabulary.table(plan, m, tables) for m in range(3))
    if case['base']:
        got = merge.array(case['method'], others, base=first, weight=[weight[x] for x in NAMES[1:]])
    else:
        more = {'weight': [weight[x] for x in NAMES]} | case['parameters']
        got = merge.array(case['method'], [first, *others], **more)
    ours, theirs = by_token(plan.tokens), by_token(case['tokens'])
    assert ours.keys() - {''} == theirs.keys()
    for token, i in theirs.items():
        np.testing.assert_allclose(got[ours[token]], want[i], rtol=1e-6, atol=1e-6, err_msg=token)
    if 'pad_to_multiple_of' in case['section']:
        assert got.shape == want.shape
        np.testing.assert_allclose(got[13:], want[13:], rtol=1e-6, atol=1e-6)


# Rows of a reward model and a language model


def test_rows_by_owner():
    """Shared rows are merged by token whatever their ids, rows of one owner stay bit for bit."""
    rm, lm = by_token('a b c <rm>'.split()), by_token('c <lm> a <lm2> b'.split())
    tables = [rows(4, 0), rows(5, 1)]
    plan = vocabulary.plan([rm, lm], [4, 5], names=['rm', 'lm'])
    assert plan.tokens == ('a', 'b', 'c', '<rm>', '<lm>', '<lm2>')
    both = [vocabulary.table(plan, m, tables) for m in (0, 1)]
    y = merge.array('linear', both, weight=[0.7, 0.3])
    for i, token in enumerate('abc'):
        want = 0.7 * tables[0][i] + 0.3 * tables[1][lm[token]]
        np.testing.assert_allclose(y[i], want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(y[3], tables[0][3])
    np.testing.assert_array_equal(y[4], tables[1][1])
    np.testing.assert_array_equal(y[5], tables[1][3])
    np.testing.assert_array_equal(merge.array('linear', both, weight=[1, 0])[:4], tables[0])
    plan = vocabulary.plan([lm, rm], [5, 4], names=['lm', 'rm'], first=1)
    assert plan.tokens == ('a', 'b', 'c', '<rm>', '<lm>', '<lm2>')


def test_padded_tables():
    """Rows beyond the tokenizer: no less of them than before, and new tokens go there first."""
    rm, lm = by_token('abcd'), by_token('abdce')
    tables = [rows(8, 0), rows(16, 1)]
    plan = vocabulary.plan([rm, lm], [8, 16], names=['rm', 'lm'])
    assert plan.tokens == ('a', 'b', 'c', 'd', 'e', '', '', '')
    for m in (0, 1):
        y = vocabulary.table(plan, m, tables)
        np.testing.assert_array_equal(y[5:], tables[0][5:])
        np.testing.assert_array_equal(y[4], tables[1][4])
    wide = vocabulary.plan([rm, lm], [8, 16], names=['rm', 'lm'], pad_to_multiple_of=3)
    assert len(wide.tokens) == 6
    wide = vocabulary.plan([rm, lm], [4, 16], names=['rm', 'lm'], pad_to_multiple_of=10)
    y = vocabulary.table(wide, 1, tables)
    np.testing.assert_allclose(y[5:], np.tile(tables[1][:5].mean(0), (5, 1)), rtol=1e-6)
    holes = vocabulary.plan([{'a': 0, 'c': 2}, {'c': 0, 'a': 1}], [3, 2], names=['rm', 'lm'])
    assert holes.tokens == ('a', '', 'c')
    np.testing.assert_array_equal(vocabulary.table(holes, 1, tables)[1], tables[0][1])


def test_tables_of_devices_and_of_other_dtypes():
    plan = vocabulary.plan(
        [by_token('ab'), by_token('bc'), by_token('bcd')], [2, 2, 3], names=NAMES,
        pad_to_multiple_of=8, tokens={'d': {'source': {'kind': 'zero'}, 'force': True}},
    )  # fmt: skip
    tables = [rows(2, 0), rows(2, 1), rows(3, 2)]
    for m in range(3):
        want = vocabulary.table(plan, m, tables)
        got = vocabulary.table(plan, m, [jnp.asarray(x) for x in tables])
        assert isinstance(got, jnp.ndarray)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(want[3], 0)
    low = [x.astype(jnp.bfloat16) for x in tables]
    assert vocabulary.table(plan, 0, low).dtype == jnp.bfloat16
    assert vocabulary.table(plan, 0, [low[0], tables[1], low[2]]).dtype == np.float32


# Tokenizers


def text_rows(tokenizer, table, text=TEXT):
    return table[tokenizer(text, add_special_tokens=False)['input_ids']]


def test_permuted_vocabulary_reads_the_same_text():
    """The same rows, in the same order, for the same text."""
    rm = tiny.tokenizer(vocab=320)
    lm = tiny.tokenizer(vocab=320, specials=tiny.SPECIALS[::-1])
    assert rm.get_vocab() != lm.get_vocab()
    table = rows(len(lm))
    plan = vocabulary.plan([rm.get_vocab(), lm.get_vocab()], [len(rm), len(lm)], names=['rm', 'lm'])
    made = vocabulary.tokenizer(plan, [rm, lm])
    assert made.get_vocab() == rm.get_vocab()
    moved = vocabulary.table(plan, 1, [rows(len(rm), 1), table])
    text = TEXT + tiny.EOS + tiny.PAD
    np.testing.assert_array_equal(text_rows(made, moved, text), text_rows(lm, table, text))


@pytest.mark.parametrize('first', ['rm', 'lm'])
def test_tokenizer_of_the_union(first, tmp_path):
    """Added tokens as special as they were; the pad token and template of the reward model."""
    rm, lm = (
        tiny.tokenizer(vocab=300),
        tiny.tokenizer(vocab=300, pad=tiny.EOS, template=tiny.CHATML),
    )
    rm.add_tokens([AddedToken('<rm>', special=True)])
    lm.add_tokens([AddedToken('<think>', special=False), AddedToken('<|im_end|>', special=True)])
    both, sizes = [rm, lm], [len(rm), len(lm)]
    plan = vocabulary.plan(
        [x.get_vocab() for x in both], sizes, names=['rm', 'lm'], first=['rm', 'lm'].index(first)
    )
    vocabulary.tokenizer(plan, both).save_pretrained(tmp_path)
    made = type(rm).from_pretrained(tmp_path)
    assert {i: t for t, i in made.get_vocab().items()} == dict(enumerate(plan.tokens))
    assert made.pad_token == tiny.PAD
    assert made.chat_template == tiny.LLAMA3
    added = {t.content: t.special for t in made.added_tokens_decoder.values()}
    assert [added[t] for t in ('<rm>', '<think>', '<|im_end|>')] == [True, False, True]
    ids = made(TEXT)['input_ids']
    assert ids == [plan.tokens.index(t) for t in lm.tokenize(TEXT)]
    assert plan.tokens.index('<think>') in ids
    assert set(rm.get_vocab()) == set(tiny.tokenizer(vocab=300).get_vocab()) | {'<rm>'}  # no change


def test_ordinary_tokens_change_no_text():
    """Pieces that only the language model has get ids, which no text is read as."""
    rm, lm = tiny.tokenizer(vocab=290), tiny.tokenizer(vocab=330)
    rm.add_tokens([AddedToken('<rm>', special=True)])
    lm.add_tokens([AddedToken('<lm>', special=True)])
    both = [rm, lm]
    plan = vocabulary.plan(
        [x.get_vocab() for x in both], [len(x) for x in both], names=['rm', 'lm']
    )
    assert len(plan.tokens) > 300
    made = vocabulary.tokenizer(plan, both)
    assert {i: t for t, i in made.get_vocab().items()} == dict(enumerate(plan.tokens))
    text = TEXT + ' answer answers better<rm>'
    assert made(text)['input_ids'] == rm(text)['input_ids']
    assert made('<lm>')['input_ids'] == [plan.tokens.index('<lm>')]
    new = plan.tokens[len(rm)]
    assert made.convert_ids_to_tokens(len(rm)) == new


def test_new_tokens():
    """A token that no model has, with the row of another."""
    rm = tiny.tokenizer(vocab=300)
    source = {'kind': 'model_token', 'model': 'rm', 'token': tiny.EOS}
    plan = vocabulary.plan(
        [rm.get_vocab()], [300], names=['rm'], tokens={'<new>': {'source': source}}
    )
    table = rows(300)
    new = vocabulary.table(plan, 0, [table])
    made = vocabulary.tokenizer(plan, [rm])
    np.testing.assert_array_equal(text_rows(made, new, '<new>'), text_rows(rm, table, tiny.EOS))
    assert '<new>' not in made.decode(made('<new>')['input_ids'], skip_special_tokens=True)


# Errors


@pytest.mark.parametrize(
    ('more', 'error'),
    [
        ({'source': 'lm2'}, "found source 'lm2', expected 'union' or a model"),
        ({'source': 'base'}, "found source 'base', expected"),
        ({'tokens': {'x': {'source': 'rm'}}}, "tokens: 'x': found no 'x' in rm"),
        ({'tokens': {'x': {'force': True}}}, "'x': found no source, which a new token needs"),
        ({'tokens': {'c': {'source': 'rm'}}}, "tokens: 'c': found no 'c' in rm"),
        (
            {'tokens': {'c': {'source': {'kind': 'model_token', 'model': 'lm', 'token_id': 9}}}},
            "tokens: 'c': found no 9 in lm",
        ),
    ],
)
def test_plans_that_can_not_be(more, error):
    with pytest.raises(ValueError, match=error):
        vocabulary.plan([by_token('ab'), by_token('bc')], [2, 2], names=['rm', 'lm'], **more)


def test_other_errors():
    with pytest.raises(ValueError, match='lm: found token id 2 of 2 rows'):
        vocabulary.plan([by_token('ab'), by_token('abc')], [2, 2], names=['rm', 'lm'])
    vocabulary.by_id([by_token('ab'), by_token('ab')], ['rm', 'lm'])
    with pytest.raises(ValueError, match="'b' at 1 in rm, None in lm, and 1 such"):
        vocabulary.by_id([by_token('ab'), by_token('a')], ['rm', 'lm'])
    rm, lm = (
        tiny.tokenizer(vocab=300),
        tiny.tokenizer(vocab=300, specials=tiny.SPECIALS[:2], pad=tiny.EOS),
    )
    both = [rm, lm]
    plan = vocabulary.plan(
        [x.get_vocab() for x in both], [len(x) for x in both], names=['rm', 'lm'], source='lm'
    )
    with pytest.raises(ValueError, match=r"found no '<\|pad\|>', the pad token of rm"):
        vocabulary.tokenizer(plan, both)


def test_describe():
    plan = vocabulary.plan(
        [by_token('ab'), by_token('bcd')], [2, 3], names=['rm', 'lm'], pad_to_multiple_of=3
    )
    assert vocabulary.describe(plan) == [
        'vocabulary: 6 rows, 4 of tokens, led by rm',
        'rows that are not of rm: 2 are its mean, 2 are those of lm',
        'rows that are not of lm: 2 are its mean, 1 is those of rm',
    ]
