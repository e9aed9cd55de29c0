"""experiments.label_capabilities against an endpoint on the loopback that knows the world."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_endpoint import TEMPLATE, Endpoint, Fault, served

from experiments import common, label_capabilities
from jaxrm import data, judge
from jaxrm.data import Preference
from jaxrm.datasets import stand_in, synthetic

KEY = 'sk-not-to-be-seen-0123456789'
POINTS = {'facts': ['correctness', 'verbosity'], 'arithmetic': {'correctness': 'the sum is right'}}
LOOKS = stand_in.judge()


def knowing(respect, query, first, second):
    """The stand-in, told in words which quality counts."""
    words = respect.removeprefix('in respect of ').split(' (')[0]
    return LOOKS((query, first, second, None if respect == 'as a whole' else words))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Flags for twelve pairs of two categories."""
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    records = synthetic.preferences(12, seed=3, labels='gold', categories=list(POINTS))
    rows = [
        {'prompt': r.messages, 'chosen': [say(r, 0)], 'rejected': [say(r, 1)], 'group': r.group}
        for r in records
    ]
    files = {'data.jsonl': rows, 'points.json': [POINTS], 'test.jsonl': other()}
    for name, lines in files.items():
        (tmp_path / name).write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (tmp_path / 'template.txt').write_text(TEMPLATE)
    return label_capabilities.Config(
        dataset_name=str(tmp_path / 'data.jsonl'), model='m', output_dir=tmp_path / 'out',
        capabilities=tmp_path / 'points.json', template=tmp_path / 'template.txt',
        exclude=(str(tmp_path / 'test.jsonl'),), price_prompt=1e4, price_completion=1e5,
    )  # fmt: skip


def say(record, side):
    return {'role': 'assistant', 'content': record.responses[side]}


def other():
    """A pair whose prompt is not in the data."""
    (record,) = synthetic.preferences(1, seed=9, categories=['facts'], split='test')
    return [{'prompt': record.messages, 'chosen': [say(record, 0)], 'rejected': [say(record, 1)]}]


def count(config):
    groups = [record.group for record in data.load(config.dataset_name).records]
    return 2 * sum(len(POINTS[group]) for group in groups)


def test_labels(config, capsys):
    """Right in every capability; a second run asks nothing and comes to the same."""
    with served(Endpoint(knowing)) as server:
        config = dataclasses.replace(config, base_url=server.url)
        label_capabilities.main(config)
        asked = len(server.asked)
        assert asked == count(config)
        first = (config.output_dir / 'labels.jsonl').read_bytes()
        label_capabilities.main(config)
        assert len(server.asked) == asked
    assert (config.output_dir / 'labels.jsonl').read_bytes() == first
    found = data.load(config.output_dir / 'labels.jsonl').records
    assert {r.group for r in found} <= {f'{g}/{c}' for g, names in POINTS.items() for c in names}
    for pair in found:
        better, worse = (
            synthetic.gold(pair.messages, x).qualities[pair.group.split('/')[1]]
            for x in pair.responses
        )
        assert better > worse
    said = json.loads((config.output_dir / 'statistics.json').read_text())
    assert said['labels'] == said['groups']['all']['kept'] == len(found) > 5
    assert (said['asked'], said['cached']) == (0, asked)
    assert (said['prompt_tokens'], said['completion_tokens']) == (100 * asked, 2 * asked)
    assert said['dollars'] == pytest.approx((asked * 100 * 1e4 + asked * 2 * 1e5) / 1e6)
    assert said['groups']['facts/verbosity']['retention'] > 0.7
    out = capsys.readouterr().out
    assert f'{asked} questions to ask, 0 answered already' in out
    assert f'${(asked * 100 * 1e4 + asked * 2 * 1e5) / 1e6:.2f}' in out


def test_dry_run_asks_and_writes_nothing(config, capsys):
    with served(Endpoint(knowing)) as server:
        label_capabilities.main(dataclasses.replace(config, base_url=server.url, dry_run=True))
        assert server.asked == []
    assert not config.output_dir.exists()
    assert f'{count(config)} questions to ask, 0 answered already' in capsys.readouterr().out


def test_without_prices_nothing_is_said_to_be_free(config, capsys):
    with served(Endpoint(knowing)) as server:
        free = {'price_prompt': 0.0, 'price_completion': 0.0, 'base_url': server.url}
        label_capabilities.main(dataclasses.replace(config, **free))
    said = json.loads((config.output_dir / 'statistics.json').read_text())
    assert said['dollars'] is None
    out = ' '.join(capsys.readouterr().out.split())
    assert f'{100 * count(config)} + {2 * count(config)} tokens, no price given' in out
    assert '$' not in out


def test_overall_is_the_judge_as_a_baseline(config, capsys):
    """Labels are of the gold order, which the judge knows; the first one is position bias."""
    whole = dataclasses.replace(config, capabilities=None)
    with served(Endpoint(knowing)) as server:
        label_capabilities.main(dataclasses.replace(whole, base_url=server.url))
    said = json.loads((config.output_dir / 'statistics.json').read_text())
    assert said['accuracy'] == [1, 1, 1]
    with served(Endpoint(lambda *asked: '1')) as server:
        out = config.output_dir.with_name('first')
        label_capabilities.main(dataclasses.replace(whole, base_url=server.url, output_dir=out))
    said = json.loads((out / 'statistics.json').read_text())
    assert (said['labels'], said['groups']['all']['position_bias']) == (0, 1)
    assert said['accuracy'] == [0.5, 0.5, 0.5]
    assert 'accuracy as a judge: 0.500' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'api_key_env': 'NO_SUCH_KEY'}, r'found no key, expected it in \$NO_SUCH_KEY'),
        ({'exclude': ('data.jsonl',)}, 'record 0: found an excluded prompt'),
        ({'options': '{'}, '--options: no JSON'),
        ({'options': '[]'}, '--options: found a list, expected an object'),
        ({'concurrency': 0}, 'concurrency: found 0'),
        ({'capabilities': 'data.jsonl'}, 'Extra data'),
        ({'capabilities': 'list.json'}, r'list\.json: found a list, expected an object of groups'),
        ({'capabilities': 'wrong.json'}, r"wrong\.json: 'facts': expected names"),
        ({'template': 'data.jsonl'}, 'template: '),
    ],
)
def test_wrong_flags(config, monkeypatch, tmp_path, change, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'list.json').write_text('[]')
    (tmp_path / 'wrong.json').write_text('{"facts": {"correctness": 1}}')
    paths = {k: Path(v) for k, v in change.items() if k in ('capabilities', 'template')}
    with pytest.raises(ValueError, match=said) as error:
        label_capabilities.main(dataclasses.replace(config, **change | paths))
    assert KEY not in str(error.value)
    assert not config.output_dir.exists()


def test_faults_are_one_line(config, monkeypatch, capsys):
    """On the command line; the answers that had come are kept, and nothing else is written."""
    fault = Fault(404, body={'error': {'message': f'no such model for {KEY}'}})
    with served(Endpoint(knowing, faults={3: fault})) as server:
        argv = ['--dataset_name', config.dataset_name, '--model', 'm', '--base_url', server.url]
        argv += ['--output_dir', str(config.output_dir), '--template', str(config.template)]
        argv += ['--capabilities', str(config.capabilities), '--concurrency', '1']
        monkeypatch.setattr(sys, 'argv', ['label_capabilities', *argv])
        monkeypatch.delenv('JAXRM_TRACEBACK', raising=False)
        with pytest.raises(SystemExit) as end:
            common.launch(label_capabilities.Config, label_capabilities.main)
    assert end.value.code == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"error: {server.url}: HTTP 404 for 'm': no such model for ***"
    (left,) = config.output_dir.iterdir()
    assert left.read_text().count('\n') == 3
    assert KEY not in left.read_text()


@pytest.mark.slow
def test_stopped_by_hand(config, tmp_path):
    """Control-C: one line, and the next run goes on."""
    gate = threading.Event()
    with served(Endpoint(knowing, gates={5: gate})) as server:
        argv = ['--dataset_name', config.dataset_name, '--model', 'm', '--base_url', server.url]
        argv += ['--output_dir', config.output_dir, '--template', config.template]
        argv += ['--capabilities', config.capabilities, '--concurrency', '1']
        made = [sys.executable, '-m', 'experiments.label_capabilities', *map(str, argv)]
        env = os.environ | {'PYTHONPATH': str(Path(__file__).resolve().parent.parent)}
        pipe = subprocess.PIPE
        child = subprocess.Popen(made, env=env, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
        server.wait_for(6)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (130, '')
        assert 'stopped; the same command asks what is not answered yet' in out
        assert KEY not in out
        label_capabilities.main(dataclasses.replace(config, base_url=server.url))
        assert len(server.asked) == count(config) + 1


def test_points_of_the_paper():
    """27 experts in five categories, of 20 names, in the order of the router's classes."""
    path = Path(label_capabilities.__file__).with_name('points_dmoerm.json')
    found = judge.read_points(path)
    counts = {'roleplay': 6, 'chat': 5, 'subj_qa': 5, 'obj_qa': 6, 'text': 5}
    assert {group: len(names) for group, names in found.items()} == counts
    assert list(found) == list(counts)
    assert len({name for names in found.values() for name in names}) == 20
    records = [Preference('Say', ('a', 'b'), group=group) for group in counts]
    assert len(list(judge.comparisons(records, found))) == 27
