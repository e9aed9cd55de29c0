"""What ends a run of questions to an endpoint, and where its key goes: nowhere."""

import asyncio
import logging
import os
import sys
import threading
import time
import traceback

import pytest
from fake_endpoint import TEMPLATE, Endpoint, Fault, served
from judge_tiny import KEY, PAIRS, QUESTIONS, Timer, endpoint_of, right, run, wanted

from jaxrm import judge, judge_client, judge_endpoint
from jaxrm.judge_cache import Cache, read
from jaxrm.judge_client import Pace, Progress
from jaxrm.judge_endpoint import Refused

LASTING = [
    (Fault(401, body={'error': {'message': f'wrong key {KEY}'}}), 'HTTP 401: the key is not'),
    (Fault(403), 'HTTP 403: the key is not accepted'),
    (Fault(404, body={'error': {'message': 'no such model'}}), "404 for 'm': no such model"),
    (Fault(400, body={'error': {'message': f'{KEY} is too long'}}), ': *** is too long'),
    (Fault(422, body='plain words'), 'plain words'),
    (Fault(429, body={'error': {'message': 'pay', 'code': 'insufficient_quota'}}), ': pay'),
]


def asking(server, times):
    """What asking so many times in a row gives, errors too."""
    endpoint, found = endpoint_of(server), []

    async def main():
        async with judge_endpoint.connect(endpoint, KEY, timeout=5) as ask:
            for question in (QUESTIONS * times)[:times]:
                try:
                    found.append(await ask(endpoint.request(question)))
                except (Refused, judge_endpoint.Busy) as error:
                    found.append(error)

    asyncio.run(main())
    return found


def test_lasting_faults():
    """One line each, which says what is wrong."""
    with served(Endpoint(right, faults=dict(enumerate(f for f, _ in LASTING)))) as server:
        found = asking(server, len(LASTING))
    for (_, said), error in zip(LASTING, found, strict=True):
        assert isinstance(error, Refused), error
        assert said in str(error)
        assert '\n' not in str(error)


@pytest.mark.parametrize(
    ('fault', 'said'),
    [
        (Fault(404, body={'error': {'message': 'no such model'}}), 'no such model'),
        (Fault(429, {'Retry-After': '4000'}), 'asks to wait 4000 s, expected at most 600'),
    ],
)
def test_lasting_faults_end_the_run(tmp_path, fault, said):
    """At once, but what is on its way is kept."""
    gate = threading.Event()
    gates = {0: gate, 1: gate}
    with served(Endpoint(right, faults={2: fault}, gates=gates)) as server:
        threading.Thread(target=lambda: (server.wait_for(3), time.sleep(0.05), gate.set())).start()
        with pytest.raises(Refused, match=said):
            run(server, tmp_path / 'x.jsonl')
        assert len(server.asked) == 3
        assert len(read(tmp_path / 'x.jsonl')) == 2
        run(server, tmp_path / 'x.jsonl')
        assert len(server.asked) == 13


async def within(seconds, work):
    return await asyncio.wait_for(work, seconds)


def test_who_waits_is_not_waited_for(tmp_path):
    """One request rests after a fault, another meets the end: no sleep of an hour first."""
    timer = Timer()

    async def sleep(seconds):
        timer.slept.append(seconds)
        await asyncio.Event().wait()  # for ever

    async def ask(request):
        if 'Say 0' in request['messages'][0]['content']:
            raise judge_endpoint.Busy('busy')
        for _ in range(5):
            await asyncio.sleep(0)
        raise Refused('the end')

    endpoint = judge_endpoint.Endpoint('m', 'http://127.0.0.1:1/v1', TEMPLATE)
    todo = judge_client.plan(QUESTIONS, endpoint, {}).todo
    options = {'pace': Pace(3), 'clock': timer.clock._replace(sleep=sleep)}
    with Cache(tmp_path / 'x.jsonl') as cache, pytest.raises(Refused, match='the end'):
        asyncio.run(within(5, judge_client.fetch(todo, endpoint, ask, cache, **options)))
    assert timer.slept == [1.0, 1.0]


def test_bad_questions_can_be_skipped(tmp_path):
    with served(Endpoint(right, faults={4: Fault(400)})) as server:
        spent, found = run(server, tmp_path / 'x.jsonl', pace=Pace(1), skip=True)
        assert len(server.asked) == 12
    assert found == [None if i == 4 else text for i, text in enumerate(wanted())]
    assert spent == Progress(12, 12, 1100, 22, skipped=1)
    verdicts = list(judge.verdicts(PAIRS, dict(zip(QUESTIONS, found, strict=True)).get))
    assert [v.winner() for v in verdicts] == [0, 0, None, 0, 0, 0]


def test_a_judge_that_only_babbles_is_stopped(tmp_path):
    """Nobody pays for a night of answers that name no reply."""
    with served(Endpoint(lambda *asked: 'As a model')) as server:
        with pytest.raises(Refused, match=r"5 answers, and none names .* 'As a model'"):
            run(server, tmp_path / 'x.jsonl', pace=Pace(1, patience=5), parse=judge.only)
        assert len(server.asked) == 5
    first = iter(['1'])
    with served(Endpoint(lambda *asked: next(first, 'none'))) as server:
        spent, _ = run(server, tmp_path / 'y', pace=Pace(1, patience=5), parse=judge.only)
    assert spent.unread == 11


def test_a_full_disk_ends_the_run(tmp_path, monkeypatch):
    real, count = os.fsync, iter(range(99))

    def full(file):
        if next(count) == 2:
            raise OSError(28, 'No space left on device')
        real(file)

    with served(Endpoint(right)) as server:
        monkeypatch.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left'):
            run(server, tmp_path / 'x.jsonl', pace=Pace(1))
        assert len(read(tmp_path / 'x.jsonl')) == 2
        _, found = run(server, tmp_path / 'x.jsonl')
    assert found == wanted()
    assert len(server.asked) == 13


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'base_url': 'ftp://x/v1'}, 'base_url: found another address'),
        ({'base_url': 'localhost:8000'}, 'base_url: found another address'),
        ({'base_url': f'http://me:{KEY}@x/v1'}, 'base_url: found @'),
        ({'base_url': f'http://x/v1?key={KEY}'}, 'base_url: found @ or [?]'),
        ({'template': '{query}'}, 'template: found fields'),
        ({'options': {'stream': True}}, r"options: found \['stream'\]"),
    ],
)
def test_wrong_endpoints(change, said):
    endpoint = judge_endpoint.Endpoint('m')._replace(**change)
    with pytest.raises(ValueError, match=said) as error:
        judge_client.check(endpoint, Pace())
    assert KEY not in str(error.value)


@pytest.mark.parametrize('name', Pace._fields)
def test_wrong_paces(name):
    with pytest.raises(ValueError, match=f'{name}: found 0, expected more than 0'):
        judge_client.check(judge_endpoint.Endpoint('m'), Pace()._replace(**{name: 0}))


def test_openai_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'openai', None)
    with served(Endpoint(right)) as server, pytest.raises(ValueError, match=r'jaxrm\[judge\]'):
        run(server, tmp_path / 'x.jsonl')


# The key


def test_the_key_is_seen_nowhere(tmp_path, caplog, capfd):
    """Not in files, logs, output or exceptions, whatever the server says of it."""
    caplog.set_level(logging.DEBUG)
    for name in ('openai', 'httpx2', 'httpcore2', 'asyncio'):
        caplog.set_level(logging.DEBUG, name)
    told = {'error': {'message': f'no {KEY}'}}
    faults = [
        *(Fault(n, body=told) for n in (400, 401, 403, 404, 500, 200)),
        *(Fault(None), Fault(200, body=KEY), Fault(200, body={'choices': KEY})),
    ]
    with served(Endpoint(right, faults=dict(enumerate(faults)))) as server:
        found = asking(server, len(faults))
        server.faults = lambda number: Fault(500, body=told) if number > 10 else None
        with pytest.raises(Refused) as caught:
            run(server, tmp_path / 'x.jsonl', pace=Pace(1, attempts=2))
        assert set(server.keys) == {f'Bearer {KEY}'}
    for error in (*found, caught.value):
        assert isinstance(error, Exception)
        assert (error.__cause__, error.__context__) == (None, None)
    said = ''.join(
        text for e in (*found, caught.value) for text in (repr(e), *traceback.format_exception(e))
    )
    files = [path.read_text() for path in tmp_path.rglob('*') if path.is_file()]
    assert len(files) == 1
    assert {'openai', 'httpcore2'} <= {r.name.split('.')[0] for r in caplog.records}
    logs = [caplog.text, *map(repr, map(vars, caplog.records))]
    assert not any(KEY in text for text in (said, *logs, *files, *capfd.readouterr()))


def test_no_long_part_of_a_key_is_shown():
    """Eight characters of it in a row tell too much; seven are chance."""
    said = f'no {KEY}, sk-not-t...3456789, not {KEY[:7]} or {KEY[3:11]}{KEY[5:20]}.'
    found = judge_endpoint.masked(said, KEY)
    assert found == f'no ***, ***...3456789, not {KEY[:7]} or ***.'
    assert judge_endpoint.masked('key abc', 'abc') == 'key ***'
    assert judge_endpoint.masked('none', None) == 'none'
    parts = {KEY[i : i + 8] for i in range(len(KEY) - 7)}
    assert not any(part in found for part in parts)


@pytest.mark.parametrize('key', [f'{KEY}\n', f' {KEY}', f'{KEY}\u2028', 'sk-ü'])
def test_keys_no_header_can_have(key):
    async def main():
        async with judge_endpoint.connect(judge_endpoint.Endpoint('m'), key, timeout=1):
            pytest.fail('connected')

    with pytest.raises(ValueError, match='key: found white space') as error:
        asyncio.run(main())
    assert 'sk-' not in str(error.value)


def test_the_key_does_not_follow_to_another_server(tmp_path):
    with served(Endpoint(right)) as other:
        away = Fault(307, {'Location': f'{other.url}/chat/completions'})
        with served(Endpoint(right, faults=lambda number: away)) as server:
            run(server, tmp_path / 'x.jsonl', questions=QUESTIONS[:1])
        assert other.keys == [None]
