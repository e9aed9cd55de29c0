"""What a crash of a run of questions leaves: every answer that had come."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fake_endpoint import Endpoint, served
from judge_tiny import right, run, wanted

from jaxrm.files import DataError
from jaxrm.judge_cache import Cache, Reply, read

CHILD = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import judge_tiny as t
class Server: url = {url!r}
t.run(Server, Path({path!r}), pace=t.Pace(2))
"""


def test_killed_and_resumed(tmp_path):
    """What was answered before a kill -9 is not asked again; only what was on its way is."""
    gate = threading.Event()
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    cache = tmp_path / 'x.jsonl'
    with served(Endpoint(right, gates={7: gate, 8: gate})) as server:
        code = CHILD.format(paths=paths, url=server.url, path=str(cache))
        child = subprocess.Popen([sys.executable, '-c', code])
        server.wait_for(9)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert len(read(cache)) == 7
        server.gates = {}
        gate.set()
        spent, found = run(server, cache)
    assert found == wanted()
    assert spent.done == 5
    said = [body['messages'][0]['content'] for body in server.asked]
    assert len(said) == 14
    assert sorted(said[:7] + said[9:]) == sorted(set(said))


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / 'deep' / 'x.jsonl'
    with Cache(path) as cache:
        cache.add('a', Reply('1 \u2028 ü "\n', 3, 1))
        cache.add('b', Reply('', 4, 2))
    whole = path.read_bytes()
    for at in range(1, len(whole.splitlines(keepends=True)[1])):
        path.write_bytes(whole[:-at])
        assert list(read(path)) == ['a']
        with Cache(path) as cache:
            assert ('a' in cache, 'b' in cache, len(cache)) == (True, False, 1)
            cache.add('b', Reply('', 4, 2))
        assert path.read_bytes() == whole
    assert read(path) == {'a': Reply('1 \u2028 ü "\n', 3, 1), 'b': Reply('', 4, 2)}
    path.write_bytes(whole + b'\0' * 40)
    with Cache(path) as cache:
        assert len(cache) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize('line', [b'{}\n', b'junk\n', b'{"key": "a", "text": 1}\n', b'\0\0\n'])
def test_a_broken_line_before_the_last_is_an_error(tmp_path, line):
    path = tmp_path / 'x.jsonl'
    with Cache(path) as cache:
        cache.add('a', Reply('1', 3, 1))
    path.write_bytes(line + path.read_bytes())
    before = path.read_bytes()
    for opened in (read, Cache):
        with pytest.raises(DataError, match=r'x\.jsonl:1: found no reply'):
            opened(path)
    assert path.read_bytes() == before


def test_two_runs_do_not_share_a_file(tmp_path):
    with Cache(tmp_path / 'x.jsonl'):
        with pytest.raises(DataError, match='another run has it open'):
            Cache(tmp_path / 'x.jsonl')
        assert read(tmp_path / 'x.jsonl') == {}
    with Cache(tmp_path / 'x.jsonl') as cache:
        cache.add('a', Reply('1', 1, 1))
    assert json.loads((tmp_path / 'x.jsonl').read_text())['key'] == 'a'
    assert read(tmp_path / 'missing') == {}
    assert not (tmp_path / 'missing').exists()
