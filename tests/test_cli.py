"""The `jaxrm` command: records come back whole and in order, and wrong input is one line."""

import datetime
import decimal
import gzip
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from torch_goldens import GOLDENS, copy, edit_json, edit_tensors

import jaxrm
from jaxrm import cli

MODEL = str(GOLDENS / 'seqcls')
ASK, OTHER = ({'role': 'user', 'content': text} for text in ('Which river?', 'Grüße 世界 🙂'))
SAY = [{'role': 'assistant', 'content': text} for text in ('The Nile.', 'No idea.', 'A lake?')]

TALKS = [
    {'id': 9, 'messages': [ASK, SAY[0]], 'source': {'page': [1, None], 'url': 'ü\u2028'}},
    {'id': 7, 'messages': [OTHER, SAY[1], ASK, SAY[2]], 'source': None},
    {'id': 8, 'messages': [ASK, SAY[0]], 'source': True},
]
PAIRS = [
    {'prompt': [ASK], 'chosen': [SAY[i]], 'rejected': [SAY[j]], 'subset': 's', 'margin': 1.5}
    for i, j in ((0, 1), (2, 1), (1, 0))
]
TEXTS = [{'prompt': 'A ', 'chosen': 'river.', 'rejected': 'lake.', 'note': ['x']}] * 2
MANY = [
    {'prompt': [ASK], 'completions': [s['content'] for s in SAY], 'ranks': [2, None, 1]},
    {'prompt': [OTHER], 'completions': [SAY[1]['content']], 'ranks': [0]},
]


@pytest.fixture(autouse=True, scope='module')
def one_scorer():
    """Loads of the same model share their compiled programs."""
    real, known = jaxrm.scorer.load, {}

    def load(path, *, dtype=None, **options):
        key = path, dtype
        if path != MODEL:
            return real(path, dtype=dtype, **options)
        if key not in known:
            known[key] = real(path, dtype=dtype)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxrm.scorer, 'load', load)
        yield


@pytest.fixture
def run(monkeypatch, capfd):
    """(status, stdout, stderr) of the command, in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['jaxrm', *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        return status, *capfd.readouterr()

    return run


def write(path, rows):
    if path.suffix == '.parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if path.suffix == '.json':
        path.write_text(json.dumps(rows, indent=1), encoding='utf-8')
        return path
    opened = gzip.open if path.suffix == '.gz' else open
    with opened(path, 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    return path


def read(path):
    """Rows of a JSON Lines file; NaN and Infinity, which JSON has not, are errors."""
    lines = path.read_bytes().decode().split('\n')
    assert lines.pop() == ''
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def without_scores(rows):
    added = ('score', 'score_chosen', 'score_rejected', 'scores')
    return [{k: v for k, v in row.items() if k not in added} for row in rows]


@pytest.mark.parametrize('suffix', ['.jsonl', '.jsonl.gz', '.json', '.parquet'])
def test_conversations(tmp_path, run, suffix):
    rows = TALKS if suffix != '.parquet' else [{**row, 'source': 'web'} for row in TALKS]
    file, output = write(tmp_path / f'in{suffix}', rows), tmp_path / 'out.jsonl'
    status, out, err = run('score', '--model', MODEL, '--data', file, '--output', output)
    assert (status, out) == (0, '')
    assert err.count('\n') == 1
    assert err.startswith('messages (the last assistant turn is the answer), id')
    assert f'{file}: 3 records' in err
    assert without_scores(read(output)) == rows
    assert list(read(output)[0]) == [*rows[0], 'score']
    scores = np.array([row['score'] for row in read(output)], np.float32)
    assert scores.tolist() == jaxrm.load(MODEL).score([row['messages'] for row in rows]).tolist()
    assert scores[0] == scores[2] != scores[1]
    assert [p.name for p in tmp_path.iterdir() if p != file] == ['out.jsonl']


@pytest.mark.parametrize('suffix', ['.jsonl', '.parquet'])
def test_pairs(tmp_path, run, suffix):
    file, output = write(tmp_path / f'in{suffix}', PAIRS), tmp_path / 'out.jsonl'
    assert run('score', '--model', MODEL, '--data', file, '--output', output)[0] == 0
    assert without_scores(read(output)) == PAIRS
    found = np.array([(r['score_chosen'], r['score_rejected']) for r in read(output)], np.float32)
    talks = [[*row['prompt'], *row[side]] for row in PAIRS for side in ('chosen', 'rejected')]
    assert found.ravel().tolist() == jaxrm.load(MODEL).score(talks).tolist()


def test_candidates_absent_ones_too(tmp_path, run):
    file, output = write(tmp_path / 'in.jsonl', MANY), tmp_path / 'out.jsonl'
    assert run('score', '--model', MODEL, '--data', file, '--output', output)[0] == 0
    assert without_scores(read(output)) == MANY
    want = jaxrm.load(MODEL).score([[ASK, s] for s in SAY])
    np.testing.assert_allclose(read(output)[0]['scores'], want, rtol=0, atol=1e-5)
    assert len(read(output)[1]['scores']) == 1


@pytest.mark.parametrize('better', [0, 2])
def test_pairs_of_other_columns(tmp_path, run, better):
    talks = [[ASK, SAY[better]], [ASK, SAY[1]]]
    render = jaxrm.load(MODEL).tokenizer.apply_chat_template
    written, ids = ([render(t, tokenize=as_ids) for t in talks] for as_ids in (False, True))
    spoken = {'system': '', 'input': ASK['content'], 'chosen': SAY[better]['content']}
    for row in (
        {'messages': talks[0], 'rejected_response': SAY[1]['content']},
        {'messages': talks[0], 'rejected_messages': talks[1]},
        {**spoken, 'rejected': SAY[1]['content']},
        {'chosen': talks[0], 'rejected': talks[1], 'chosen_score': 1, 'rejected_score': 0.5},
        {'text_chosen': written[0], 'text_rejected': written[1]},
        {'chosen_ids': ids[0]['input_ids'], 'rejected_ids': ids[1]['input_ids']},
    ):
        file, output = write(tmp_path / 'in.jsonl', [row]), tmp_path / 'out.jsonl'
        flags = ('--model', MODEL, '--data', file, '--output', output, '--overwrite')
        assert run('score', *flags)[0] == 0
        (got,) = read(output)
        want = jaxrm.load(MODEL).score(talks)
        found = got['score_chosen'], got['score_rejected']
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
        assert without_scores([got]) == [row]


def test_plain_text_and_chat(tmp_path, run):
    file, outputs = write(tmp_path / 'in.jsonl', TEXTS), [tmp_path / f'{i}.jsonl' for i in '12']
    mappings = [
        run('score', '--model', MODEL, '--data', file, '--output', output, *flags)[2]
        for output, flags in zip(outputs, ((), ('--chat',)), strict=True)
    ]
    assert 'prompt (text)' in mappings[0]
    assert 'prompt (one user turn)' in mappings[1]
    plain, chat = (read(output)[0]['score_chosen'] for output in outputs)
    rm = jaxrm.load(MODEL)
    talk = [{'role': 'user', 'content': 'A '}, {'role': 'assistant', 'content': 'river.'}]
    np.testing.assert_allclose([plain, chat], rm.score(['A river.', talk]), rtol=0, atol=1e-5)
    assert read(outputs[1])[0]['prompt'] == 'A '


def test_dtype_and_truncate(tmp_path, run):
    long = [{'messages': [{'role': 'user', 'content': 'lake ' * 300}, SAY[0]]}]
    file, output = write(tmp_path / 'in.jsonl', long), tmp_path / 'out.jsonl'
    flags = ('--dtype', 'bfloat16', '--truncate', 'left', '--max-length', '100')
    assert run('score', '--model', MODEL, '--data', file, '--output', output, *flags)[0] == 0
    rm = jaxrm.load(MODEL, dtype='bfloat16')
    (want,) = rm.score([long[0]['messages']], max_length=100, overlong='left')
    assert read(output)[0]['score'] == pytest.approx(float(want), abs=1e-6)


@pytest.mark.parametrize(
    ('row', 'names'),
    [
        ({**TALKS[0], 'score': 1}, ['mine']),
        ({**PAIRS[0], 'score_chosen': 2, 'score_rejected': 1}, ['mine_chosen', 'mine_rejected']),
        ({**MANY[1], 'scores': None}, ['mines']),
    ],
)
def test_another_column(tmp_path, run, row, names):
    file, output = write(tmp_path / 'in.jsonl', [row]), tmp_path / 'out.jsonl'
    flags = ('--dataset', file, '--output', output, '--column', 'mine')
    assert run('score', '--model', MODEL, *flags)[0] == 0
    (got,) = read(output)
    assert list(got) == [*row, *names]
    assert {k: got[k] for k in row} == row


def test_another_template(tmp_path, run):
    file, output = write(tmp_path / 'in.jsonl', TALKS[:1]), tmp_path / 'out.jsonl'
    template = tmp_path / 'plain.jinja'
    template.write_text("{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}")
    flags = ('--data', file, '--output', output, '--chat-template', template)
    assert run('score', '--model', MODEL, *flags, '--torch-dtype', 'float32')[0] == 0
    rm = jaxrm.load(MODEL)
    told = rm.tokenizer.apply_chat_template(TALKS[0]['messages'], tokenize=False)
    text = f'user {ASK["content"]}assistant {SAY[0]["content"]}'
    assert told != text
    ids = [rm.tokenizer.bos_token_id, *rm.tokenizer.encode(text, add_special_tokens=False)]
    record = jaxrm.data.Preference(jaxrm.data.Ids(ids[:-1]), (jaxrm.data.Ids(ids[-1:]),))
    (want,) = rm.score_records([record])
    assert read(output)[0]['score'] == pytest.approx(float(want[0]), abs=1e-5)


@pytest.mark.parametrize('text', [None, 'hello', '{% if %}', b'\xff'])
@pytest.mark.parametrize('verb', ['score', 'evaluate'])
def test_wrong_templates(tmp_path, run, text, verb):
    file, template = write(tmp_path / 'in.jsonl', PAIRS), tmp_path / 'bad.jinja'
    left = {'in.jsonl'} if text is None else {'in.jsonl', 'bad.jinja'}
    if text is not None:
        template.write_bytes(text if isinstance(text, bytes) else text.encode())
    flags = ('--data', file, '--output', tmp_path / 'out.jsonl', '--chat-template', template)
    result = run(verb, '--model', MODEL, *flags)
    assert_refused(result, f'{template}: ', tmp_path, left)


def test_overwrite_even_the_input(tmp_path, run):
    file = write(tmp_path / 'in.jsonl', TALKS)
    flags = ('--model', MODEL, '--data', file, '--output', file)
    assert run('score', *flags)[0] == 2
    assert read(file) == TALKS
    assert run('score', *flags, '--overwrite')[0] == 0
    assert without_scores(read(file)) == TALKS


def test_columns_that_only_parquet_has(tmp_path, run):
    day = datetime.datetime(2024, 2, 29, 12, 30)
    rows = [{'messages': [ASK, SAY[0]], 'day': day, 'cost': decimal.Decimal('0.10'), 'x': np.nan}]
    file, output = write(tmp_path / 'in.parquet', rows), tmp_path / 'out.jsonl'
    assert run('score', '--model', MODEL, '--data', file, '--output', output)[0] == 0
    (row,) = without_scores(read(output))
    assert row == {**rows[0], 'day': '2024-02-29 12:30:00', 'cost': '0.10', 'x': None}


# Wrong input: (rows or text, other flags, what the line says). {} is the data file.

GOOD = json.dumps(TALKS[0])
BAD_ROWS = {
    'bad JSON': (f'{GOOD}\n{{"messages": [}}\n', '{}:2: column 15: not JSON: Expecting value'),
    'cut short': (f'{GOOD}\n{GOOD[:-4]}', '{}:2: column'),
    'not UTF-8': (f'{GOOD}\n'.encode() + b'{"messages": "\xff"}\n', '{}:2: byte 15: not UTF-8'),
    'not an object': (f'{GOOD}\n[1]\n', '{}:2: found a list, expected an object'),
    'empty file': ('', '{}: found no rows'),
    'blank lines': ('\n\n', '{}: found no rows'),
    'missing column': (
        [{'prompt': 'a', 'chosen': 'b'}],
        "{}:1: found columns ['chosen', 'prompt']",
    ),
    'column missing later': ([TALKS[0], {'id': 1}], "{}:2: found columns ['id']"),
    'null column': ([{'messages': None}], '{}:1: found columns []'),
    'wrong role': (
        [TALKS[0], {'messages': [{'role': 'human', 'content': 'q'}, SAY[0]]}],
        "{}:2: messages[0].role: found 'human', expected one of",
    ),
    'no answer': ([{'messages': [ASK]}], '{}:1: messages: found no answer at the end'),
    'content is null': (
        [{'messages': [{'role': 'user', 'content': None}, SAY[0]]}],
        '{}:1: messages[0].content: found null, expected a string',
    ),
    'empty answer': ([{'prompt': 'a', 'chosen': 'b', 'rejected': ' '}], '{}:1: rejected: found an'),
    'score is there': ([TALKS[0], {**TALKS[1], 'score': 1}], "{}:2: column 'score' is there alrea"),
    'other scores are there': ([{**PAIRS[0], 'score_chosen': 1}], 'another name with --column'),
    'scores is there': ([{**MANY[0], 'scores': None}], "{}:1: column 'scores' is there already"),
    'too long': (
        [TALKS[1], {'messages': [ASK, {'role': 'assistant', 'content': 'lake ' * 300}], 'id': 3}],
        '{}:2: found a row of',
    ),
    'two layouts': ([TALKS[0], PAIRS[0]], '{}:2: layout: found'),
    'same id': ([TALKS[0], TALKS[0]], '{}:2: id: found 9 again, first at {}:1'),
    'infinity': (
        [{**TALKS[0], 'x': {'y': [float('inf')]}}],
        '{}:1: x: found float inf, which JSON',
    ),
}


def assert_refused(result, message, tmp_path, left):
    status, out, err = result
    assert (status, out) == (2, ''), err
    assert err.count('\n') == 1, err
    assert err.startswith('jaxrm: '), err
    assert message in err
    assert {p.name for p in tmp_path.iterdir()} == left


@pytest.mark.parametrize('name', BAD_ROWS)
def test_wrong_rows(tmp_path, run, name):
    given, message = BAD_ROWS[name]
    file, output = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
    if isinstance(given, list):
        write(file, given)
    else:
        file.write_bytes(given if isinstance(given, bytes) else given.encode())
    result = run('score', '--model', MODEL, '--data', file, '--output', output)
    assert_refused(result, message.replace('{}', str(file)), tmp_path, {'in.jsonl'})


def test_wrong_json(tmp_path, run):
    file, output = tmp_path / 'in.json', tmp_path / 'out.jsonl'
    for text, message in (
        ('{"a": 1}', ': found an object, expected a list'),
        (f'[{GOOD},\n\n{GOOD},]', ':3: column'),
        (f'[{GOOD},\n\n3]', ':3: found 3, expected an object'),
    ):
        file.write_text(text)
        result = run('score', '--model', MODEL, '--data', file, '--output', output)
        assert_refused(result, f'{file}{message}', tmp_path, {'in.json'})


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('in.jsonl.gz', ': damaged gzip file'),
        ('in.parquet', ': Parquet magic bytes not found'),
        ('in.csv', ": found suffix '.csv', expected"),
    ],
)
def test_wrong_files(tmp_path, run, name, message):
    (tmp_path / name).write_bytes(GOOD.encode())
    output = tmp_path / 'out.jsonl'
    result = run('score', '--model', MODEL, '--data', tmp_path / name, '--output', output)
    assert_refused(result, f'{tmp_path / name}{message}', tmp_path, {name})


def test_bytes_in_a_column(tmp_path, run):
    file = write(tmp_path / 'in.parquet', [{**TALKS[0], 'source': b'\x00'}])
    result = run('score', '--model', MODEL, '--data', file, '--output', tmp_path / 'out.jsonl')
    assert_refused(result, f'{file}: row 0: source: found bytes', tmp_path, {'in.parquet'})


@pytest.mark.parametrize(
    ('flag', 'value', 'message'),
    [
        ('--data', 'nothing.jsonl', 'nothing.jsonl: no such file'),
        ('--output', 'no/where/out.jsonl', 'no/where is not a folder'),
        ('--output', 'there.jsonl', 'there.jsonl: already there (--overwrite replaces a file)'),
        ('--model', 'no-model', 'no-model: no such folder'),
        ('--model', str(GOLDENS / 'causal'), "architectures is ['LlamaForCausalLM'], 'reward' exp"),
        ('--model', str(GOLDENS / 'peft'), 'holds an adapter; its base'),
        ('--model', str(GOLDENS / 'seqcls_sharded'), 'found no tokenizer'),
        ('--max-length', '3', 'in.jsonl:1: found a row of'),
        ('--split', 'train', 'in.jsonl: config and split belong to hub data sets'),
        ('--layout', 'square', "layout: found 'square', expected a layout of"),
    ],
)
def test_wrong_flags(tmp_path, run, monkeypatch, flag, value, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'in.jsonl', TALKS)
    (tmp_path / 'there.jsonl').write_text('precious')
    flags = {'--model': MODEL, '--data': 'in.jsonl', '--output': 'out.jsonl', flag: value}
    result = run('score', *(x for pair in flags.items() for x in pair))
    assert_refused(result, message, tmp_path, {'in.jsonl', 'there.jsonl'})
    assert (tmp_path / 'there.jsonl').read_text() == 'precious'


def two_labels(folder):
    edit_json(folder / 'config.json', id2label={'0': 'a', '1': 'b'})


def no_template(folder):
    (folder / 'chat_template.jinja').unlink()


def no_head(folder):
    edit_tensors(folder, score__weight=None)


def cut_weights(folder):
    file = folder / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:5000])


def no_config(folder):
    (folder / 'config.json').unlink()


def bad_config(folder):
    (folder / 'config.json').write_text('{')


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (two_labels, 'config.json: found 2 labels, expected 1'),
        (no_template, 'found no chat template'),
        (no_head, 'score.weight'),
        (cut_weights, 'model.safetensors'),
        (no_config, 'config.json'),
        (bad_config, 'config.json'),
    ],
)
def test_wrong_models(tmp_path, run, spoil, message):
    spoil(copy(tmp_path))
    file = write(tmp_path / 'in.jsonl', TALKS)
    flags = ('--data', file, '--output', tmp_path / 'out.jsonl')
    result = run('score', '--model', tmp_path / 'seqcls', *flags)
    assert_refused(result, message, tmp_path, {'in.jsonl', 'seqcls'})


@pytest.mark.parametrize(
    'arguments',
    [
        ('score', '--model', MODEL, '--data', 'a', '--output', 'b', '--colour', 'red'),
        ('score', '--model', MODEL, '--data', 'a', '--output', 'b', '--dtype', 'int4'),
        ('score', '--model', MODEL, '--data', 'a', '--output', 'b', '--truncate', 'right'),
        ('score', '--model', MODEL),
        ('scores',),
        (),
    ],
)
def test_wrong_usage(run, arguments):
    status, out, err = run(*arguments)
    assert (status, out) == (2, '')
    assert '--help' in err
    assert err.startswith('jaxrm: ')
    assert err.count('\n') == 1, err


def test_help(run):
    status, out, err = run('--help')
    assert (status, err) == (0, '')
    assert 'Score the conversations, pairs or candidates' in out
    status, out, err = run('score', '--help')
    assert (status, err) == (0, '')
    for flag in ('model', 'data', 'output', 'dtype', 'max-length', 'truncate', 'chat', 'overwrite'):
        assert f'--{flag}' in out


def command(*arguments):
    made = [sys.executable, '-m', 'jaxrm', *map(str, arguments)]
    return subprocess.run(made, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_processes(tmp_path):
    """The real thing: nothing on stdout, one line on stderr."""
    file, output = write(tmp_path / 'in.jsonl', TALKS), tmp_path / 'out.jsonl'
    done = command('score', '--model', MODEL, '--data', file, '--output', output)
    assert (done.returncode, done.stdout) == (0, '')
    assert done.stderr.count('\n') == 1, done.stderr
    scores = [row['score'] for row in read(output)]
    want = jaxrm.load(MODEL).score([row['messages'] for row in TALKS])
    np.testing.assert_allclose(scores, want, rtol=0, atol=1e-5)
    causal = ('--model', GOLDENS / 'causal')
    done = command('score', *causal, '--data', file, '--output', tmp_path / 'other.jsonl')
    result = done.returncode, done.stdout, done.stderr
    assert_refused(result, 'LlamaForCausalLM', tmp_path, {'in.jsonl', 'out.jsonl'})
