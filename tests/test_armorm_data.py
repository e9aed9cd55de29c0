"""What the ArmoRM experiments read: files of ratings and pairs, raters' scales, the world."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from experiments import armorm, common, scales
from jaxrm import data, evaluate, hf_heads, tokens
from jaxrm.data import DataError, Preference
from jaxrm.datasets import synthetic
from jaxrm.regress import Scale

J = len(synthetic.QUALITIES)


def write(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Flags of answers with ratings of two kinds and of pairs, and the rows of the ratings."""
    folder, rows, pairs = tmp_path_factory.mktemp('files'), [], []
    for record in synthetic.preferences(30, seed=0, labels='gold'):
        for answer, rating in zip(record.responses, record.ratings, strict=True):
            talk = [*record.messages, {'role': 'assistant', 'content': answer}]
            grade = None if len(rows) % 3 else 4 * round(rating[4])
            rows.append({'messages': talk, 'polite': grade, 'long': rating[5], 'other': 'x'})
        sides = dict(zip(('chosen', 'rejected'), record.responses, strict=True))
        pairs.append({'prompt': record.messages, **sides})
    c = armorm.Data(
        cache=None, verbosity='long',
        dataset_ratings=write(folder / 'rated.jsonl', rows),
        dataset_pairs=write(folder / 'pairs.jsonl', pairs),
        rating_columns=('polite', 'long'), rating_scales=('polite=0:4',),
    )  # fmt: skip
    return c, rows


@pytest.fixture(scope='module')
def tokenizer():
    return common.train_tokenizer(common.texts(synthetic.preferences(20, seed=0)), 300)


def prompts(some):
    return [r.messages for r in some.records]


def test_files(files, tokenizer):
    """Answers with a rating a column on its own scale, and pairs of which some are held out."""
    c, rows = files
    read = armorm.sets(c, tokenizer, ('ratings', 'pairs', 'test', 'reference'))
    names = read['ratings'].objectives
    assert names == ('polite', 'long')
    of = scales.given(c.rating_scales, names)
    rating_cJ = scales.normalised(read['ratings'].tokens.rating, names, of)
    want = [[np.nan if r['polite'] is None else r['polite'] / 5 + 0.1, r['long']] for r in rows]
    np.testing.assert_allclose(rating_cJ, want, rtol=1e-6)
    sizes = [len(read[name].records) for name in ('pairs', 'test')]
    assert sum(sizes) == 30
    assert 0 < sizes[1] < 15
    assert not {*map(str, prompts(read['pairs']))} & {*map(str, prompts(read['test']))}
    assert read['reference'].records == read['pairs'].records


@pytest.mark.parametrize(
    ('names', 'own', 'want'),
    [
        (('ratings',), {}, ['rated']),
        (('pairs',), {}, ['pairs']),
        (('test',), {'dataset_test': 'pairs'}, ['pairs']),
        (('ratings', 'reference'), {'dataset_reference': 'other'}, ['rated', 'other']),
        (('reference', 'test'), {'dataset_reference': 'other'}, ['other', 'pairs']),
        (('pairs', 'test'), {'dataset_test': 'other'}, ['other', 'pairs']),
    ],
)
def test_only_what_is_asked_for_is_read(files, tmp_path, monkeypatch, names, own, want):
    c, _ = files
    other = shutil.copy(c.dataset_pairs, tmp_path / 'other.jsonl')
    paths = {'pairs': c.dataset_pairs, 'other': str(other)}
    c = dataclasses.replace(c, **{flag: paths[name] for flag, name in own.items()})
    load, asked = data.load, []

    def counted(path, **options):
        asked.append(path.rpartition('/')[2].removesuffix('.jsonl'))
        return load(path, **options)

    monkeypatch.setattr(data, 'load', counted)
    found, _ = armorm.read(c, c.sources, names)
    assert asked == want
    assert set(names) <= set(found)
    assert all(found[name] for name in names)


# Records without a user turn


PLAIN = {'prompt': 'What is it?', 'chosen': ' Late.', 'rejected': ' No.'}
SILENT = {'prompt': [{'role': 'system', 'content': 'Be brief.'}], 'chosen': 'a', 'rejected': 'b'}
GOOD = {'prompt': [{'role': 'user', 'content': 'q'}], 'chosen': 'a', 'rejected': 'b'}


@pytest.mark.parametrize('name', ['pairs', 'test', 'reference'])
@pytest.mark.parametrize(
    ('rows', 'found'),
    [([PLAIN], '1: found plain text'), ([GOOD, SILENT], '2: found no user turn')],
)
def test_pairs_without_a_user_turn_are_refused(files, tokenizer, tmp_path, name, rows, found):
    """A gate has nowhere to read; --chat makes plain text a turn."""
    c, _ = files
    path = write(tmp_path / 'mine.jsonl', rows)
    c = dataclasses.replace(c, **{f'dataset_{name}': path})
    with pytest.raises(DataError, match=f'^{path}:{found}, expected messages with a user turn'):
        armorm.sets(c, tokenizer, (name,))
    if rows == [PLAIN]:
        found, _ = armorm.read(dataclasses.replace(c, chat=True), c.sources, (name,))
        assert any(found.values())


def test_ratings_of_plain_text_are_read(files, tokenizer, tmp_path):
    """They are read at the answer's end alone."""
    c, _ = files
    rows = [{'prompt': 'q', 'completion': f' {k}', 'polite': k, 'long': 0.5} for k in range(3)]
    c = dataclasses.replace(c, dataset_ratings=write(tmp_path / 'plain.jsonl', rows))
    (found,) = armorm.sets(c, tokenizer, ('ratings',)).values()
    assert len(found.records) == 3


# Scales


@pytest.mark.parametrize(
    ('column', 'value', 'expected'),
    [
        ('polite', 5, 'expected 0 to 4$'),
        ('polite', -1, 'expected 0 to 4$'),
        ('long', 1.01, 'expected 0 to 1, or its scale as --rating_scales long=low:high$'),
        ('long', -0.5, 'expected 0 to 1, or its scale'),
    ],
)
def test_a_rating_outside_its_scale_is_refused(files, tmp_path, column, value, expected):
    c, rows = files
    rows = [dict(row) for row in rows]
    rows[7][column] = value
    path = write(tmp_path / 'rated.jsonl', rows)
    c = dataclasses.replace(c, dataset_ratings=path)
    with pytest.raises(DataError, match=f'^{path}:8: {column}: found {value:g}, {expected}'):
        armorm.read(c, c.sources, ('ratings',))


def test_the_ends_of_a_scale_are_on_it(files, tmp_path):
    c, rows = files
    rows = [{**row, 'polite': 4 * (i % 2), 'long': i % 2} for i, row in enumerate(rows)]
    c = dataclasses.replace(c, dataset_ratings=write(tmp_path / 'rated.jsonl', rows))
    armorm.read(c, c.sources, ('ratings',))


def test_ratings_without_names_are_refused(tmp_path):
    rows = [{'prompt': GOOD['prompt'], 'completions': ['a', 'b'], 'ratings': [0.5, 1.0]}]
    path = write(tmp_path / 'rated.jsonl', rows)
    c = armorm.Data(dataset_ratings=path, dataset_pairs=path)
    with pytest.raises(DataError, match=f'^{path}:1: found no ratings by name, expected'):
        armorm.read(c, c.sources, ('ratings',))


@pytest.mark.parametrize(
    ('texts', 'found'),
    [
        (('b=0:4', 'b=1:5'), "found 'b' twice, expected one scale an objective"),
        (('b=0:4', 'c=4:0'), "found 'c=4:0', expected name=low:high, two finite numbers"),
        (('c=2:2',), "found 'c=2:2', expected name=low:high, two finite"),
        (('c=0:inf',), "found 'c=0:inf', expected name"),
        (('c=nan:4',), "found 'c=nan:4', expected name"),
        (('c=0',), "found 'c=0', expected name=low:high"),
        (('c',), "found 'c', expected name=low:high"),
        (('d=0:4',), r"found 'd', expected one of \['b', 'c'\]"),
    ],
)
def test_scales_that_are_none(texts, found):
    with pytest.raises(ValueError, match=f'^--rating_scales: {found}'):
        scales.given(texts, ('b', 'c'))


def test_the_released_ratings_are_not_normalised_again():
    """They are bin centres already; HelpSteer's scales are only stored, to show ratings by."""
    c, names = armorm.Data(preset='armorm'), hf_heads.OBJECTIVES
    rating_cJ = np.tile(np.linspace(0.1, 0.9, 5)[:, None], 19)
    given = scales.given(c.rating_scales, names)
    np.testing.assert_array_equal(scales.normalised(rating_cJ, names, given), rating_cJ)
    stored = scales.stored(c, names)
    assert stored == dict.fromkeys(names[:5], Scale(0, 4))
    assert tuple(map(stored.get, names)) == hf_heads.SCALES
    np.testing.assert_allclose(stored[names[4]].original(rating_cJ[:, 4]), np.arange(5), atol=1e-12)


def test_flags_are_stored_over_the_preset():
    names = hf_heads.OBJECTIVES
    c = armorm.Data(
        preset='armorm', rating_scales=(f'{names[0]}=1:5',), stored_scales=(f'{names[7]}=1:10',)
    )
    want = {**dict.fromkeys(names[:5], Scale(0, 4)), names[0]: Scale(1, 5), names[7]: Scale(1, 10)}
    assert scales.stored(c, names) == want
    assert scales.stored(c, names[1:3] + names[7:8] + names[:1]) == {
        name: want[name] for name in (*names[1:3], names[7], names[0])
    }
    assert armorm.Data().sources.scales == {}


# Prompts of several sets


def some_set(questions, tokenizer):
    records = [
        Preference(({'role': 'user', 'content': q},), ('a', 'b'), ranks=(0, 1)) for q in questions
    ]
    return armorm.Set(records, tokens.encode(records, tokenizer).tokens)


def test_prompts_that_other_sets_have_are_left_out_of_the_test(tokenizer):
    test = some_set(['one', 'two', 'three', 'two', 'four'], tokenizer)
    pairs, ratings = (some_set(x, tokenizer) for x in (['four'], ['two', 'six']))
    left, count = armorm.apart({'pairs': pairs, 'test': test, 'ratings': ratings})
    assert count == {'pairs': 1, 'ratings': 2}
    assert left.tokens.record.tolist() == [0, 2]
    assert left.records == test.records
    for field, found in tokens.select(test.tokens, [0, 2])._asdict().items():
        np.testing.assert_array_equal(getattr(left.tokens, field), found)
    assert evaluate.prompts([left.records[i] for i in left.tokens.record])[1].count('three') == 1
    with pytest.raises(ValueError, match=r"^test: found every prompt in \['pairs'\] too, expected"):
        armorm.apart({'test': ratings, 'pairs': some_set(['six', 'two'], tokenizer)})


# The world


def test_the_released_data_is_named():
    s = armorm.Data(preset='armorm', dataset_test='mine.jsonl').sources
    assert len(s.columns) == 19
    assert s.columns.index(s.verbosity) == 4
    assert s.test == 'mine.jsonl'
    assert all('/' in name for name in (s.model, s.ratings, s.pairs, s.reference))


def test_the_world_is_rated_in_part_and_shares_no_prompt():
    some, objectives = armorm.world(armorm.Data(prompts=300, pairs=300, test_pairs=100, rated=0.2))
    assert objectives == synthetic.QUALITIES
    rating = np.array([r.ratings for r in some['ratings']])
    whole = synthetic.preferences(300, seed=0, split='validation', labels='none')
    whole = np.array([r.ratings for r in whole])
    here = ~np.isnan(rating)
    np.testing.assert_array_equal(rating[here], whole[here])
    assert here.sum() / (~np.isnan(whole)).sum() == pytest.approx(0.2, abs=0.02)
    texts = [{str(r.messages) for r in some[name]} for name in ('ratings', 'pairs', 'test')]
    assert not texts[0] & texts[1]
    assert not texts[1] & texts[2]


def test_a_liking_for_length_is_in_the_ratings_alone():
    sizes = {'prompts': 60, 'pairs': 800, 'test_pairs': 10, 'rated': 1.0}
    plain, biased = (armorm.world(armorm.Data(**sizes, length_bias=bias))[0] for bias in (0.0, 1.0))
    v = synthetic.QUALITIES.index('verbosity')
    rating, liked = (np.array([r.ratings for r in some['ratings']]) for some in (plain, biased))
    want = (rating + rating[..., [v]]) / 2
    want[..., v] = rating[..., v]
    np.testing.assert_allclose(liked, want)
    assert [r.responses for r in biased['pairs']] == [r.responses for r in plain['pairs']]
    worth = [(np.nan_to_num(r.ratings) * (np.arange(J) != v)) @ armorm.weights(r.group)
             for r in biased['pairs']]  # fmt: skip
    better = [r.ranks.index(0) for r in biased['pairs']]
    chosen = np.array([w[b] - w[1 - b] for w, b in zip(worth, better, strict=True)])
    likely = 1 / (1 + np.exp(-np.abs(chosen) / synthetic.TEMPERATURE))
    assert (chosen > 0).mean() == pytest.approx(likely.mean(), abs=0.05)
