"""Asking an endpoint on the loopback: each question once, at its pace, through passing faults."""

import asyncio
import email.utils
import itertools
import random
import threading
import time

import pytest
from fake_endpoint import TEMPLATE, Endpoint, Fault, served
from judge_tiny import KEY, QUESTIONS, Timer, endpoint_of, right, run, wanted

from jaxrm import judge, judge_client, judge_endpoint
from jaxrm.data import Preference
from jaxrm.judge_cache import Cache, Reply
from jaxrm.judge_client import Clock, Pace, Progress
from jaxrm.judge_endpoint import Refused

# What is asked


def test_everything_is_asked_once(tmp_path):
    """The same question twice is one; a second run has nothing to ask."""
    with served(Endpoint(right)) as server:
        spent, found = run(server, tmp_path / 'x.jsonl', questions=[*QUESTIONS, *QUESTIONS[:5]])
        assert found == [*wanted(), *wanted()[:5]]
        assert spent == Progress(12, 12, 1200, 24)
        again, found = run(server, tmp_path / 'x.jsonl')
        assert (again, found) == (Progress(0), wanted())
        assert len(server.asked) == 12
    said = sorted(body['messages'][0]['content'] for body in server.asked)
    assert said == sorted(judge.render(question, TEMPLATE) for question in QUESTIONS)
    fields = {key: body[key] for body in server.asked for key in body if key != 'messages'}
    assert fields == {'model': 'm', 'temperature': 0.0, 'max_tokens': 16}
    assert set(server.keys) == {f'Bearer {KEY}'}


def test_other_settings_are_other_questions(tmp_path):
    """Model, address, template, temperature, lengths, options, texts and order."""
    with served(Endpoint(right)) as server:
        first = endpoint_of(server)
        kinds = [
            first, first._replace(model='n'), first._replace(temperature=0.5),
            first._replace(temperature=None), first._replace(max_tokens=None),
            first._replace(template='\n' + TEMPLATE), first._replace(base_url=server.url + '/x'),
            first._replace(options={'seed': 1}), first._replace(options={'seed': 2}),
        ]  # fmt: skip
        keys = {kind.key(kind.request(q)) for kind in kinds for q in QUESTIONS}
        assert len(keys) == len(kinds) * len(QUESTIONS)
        sent = first._replace(temperature=None, max_tokens=None, options={'seed': 1, 'x': {'y': 2}})
        run(server, tmp_path / 'x.jsonl', questions=QUESTIONS[:1], endpoint=sent)
        (body,) = server.asked
    del body['messages']
    assert body == {'model': 'm', 'seed': 1, 'x': {'y': 2}}
    slash = first._replace(base_url=first.base_url + '/')
    assert slash.key(slash.request(QUESTIONS[0])) == first.key(first.request(QUESTIONS[0]))


@pytest.mark.parametrize('bias', [0.5, 1.0])
def test_labels_of_a_biased_judge(tmp_path, bias):
    """k m (m - 1) calls of each prompt; labels are right, and none where all is bias."""
    rng = random.Random(0)

    def biased(*asked):
        return '1' if rng.random() < bias else right(*asked)

    records = [Preference(f'Say {n}', (f'{n} c c c', f'{n} b', f'{n}')) for n in range(6)]
    points = judge.everywhere(records, {'logic': '', 'style': ''})
    asked = list(judge.comparisons(records, points))
    with served(Endpoint(biased)) as server:
        questions = [question for pair in asked for question in pair.questions]
        _, texts = run(server, tmp_path / 'x.jsonl', questions=questions, pace=Pace(4))
        assert len(server.asked) == 6 * 2 * 3 * (3 - 1)
    answers = iter(texts)
    labels = list(judge.labels(judge.verdicts(asked, lambda question: next(answers)), records))
    assert all(len(label.responses[0]) > len(label.responses[1]) for label in labels)
    assert (len(labels) > 6) == (bias < 1)
    assert labels == [] or bias < 1


def test_plan_says_what_it_would_take(tmp_path):
    endpoint = judge_endpoint.Endpoint(
        'm', 'http://127.0.0.1:1/v1', 'ab{query}{first}{second}{respect}'
    )
    question = judge.Question('abcd', 'efgh', '漢字', None)  # 2 + 4 + 4 + 2 + 10 characters
    twice = judge_client.plan([question, question], endpoint, {})
    assert (len(twice.todo), twice.cached) == (1, 0)
    assert (twice.prompt_tokens, twice.completion_tokens) == (8 + 5 + 2, 16)
    assert judge_client.plan([question], endpoint, set(twice.todo))[1:] == (1, 0, 0)
    longer = endpoint._replace(max_tokens=None, options={'max_completion_tokens': 99})
    assert judge_client.plan([question], longer, {}).completion_tokens == 99
    assert judge_endpoint.Price(2.0, 10.0).of(1_000_000, 500_000) == 7
    assert Progress(todo=10, done=4, prompt_tokens=40, completion_tokens=8).whole() == (100, 20)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(tmp_path):
    told = []
    with served(Endpoint(lambda *asked: 'none' if '3' in asked[1] else '1')) as server:
        spent, _ = run(server, tmp_path / 'x.jsonl', say=told.append, parse=judge.only)
    assert [now.done for now in told] == list(range(1, 13))
    assert told[-1] == spent == Progress(12, 12, 1200, 24, unread=2)


def test_tokens_are_estimated_where_nothing_is_said(tmp_path):
    with served(Endpoint(right, usage=False)) as server:
        spent, _ = run(server, tmp_path / 'x.jsonl', questions=QUESTIONS[:1])
        request = endpoint_of(server).request(QUESTIONS[0])
    assert spent == Progress(1, 1, judge_endpoint.estimate(request), len('Reply 1.') // 4 + 1)


# Pace


def test_no_more_at_once_than_asked(tmp_path):
    gate = threading.Event()
    with served(Endpoint(right, gates=dict.fromkeys(range(12), gate))) as server:
        thread = threading.Thread(target=lambda: (server.wait_for(3), gate.set()))
        thread.start()
        run(server, tmp_path / 'x.jsonl')
        thread.join()
    assert server.most_active == 3


@pytest.mark.parametrize(
    ('pace', 'apart'),
    [
        (Pace(3, requests_per_minute=30), 2.0),
        (Pace(3, tokens_per_minute=600), None),
        (Pace(3, requests_per_minute=10_000, tokens_per_minute=1200), None),
    ],
)
def test_rates(tmp_path, pace, apart):
    """The starts, on a clock that only waiting moves, are as far apart as the rate says."""
    timer, starts = Timer(), []

    async def ask(request):
        starts.append((timer.time, judge_endpoint.estimate(request) + 16))
        return Reply('1', 1, 1)

    endpoint = judge_endpoint.Endpoint('m', 'http://127.0.0.1:1/v1', TEMPLATE)
    todo = judge_client.plan(QUESTIONS, endpoint, {}).todo
    with Cache(tmp_path / 'x.jsonl') as cache:
        asyncio.run(judge_client.fetch(todo, endpoint, ask, cache, pace=pace, clock=timer.clock))
    assert len(starts) == 12
    for (before, tokens), (after, _) in itertools.pairwise(starts):
        want = apart or 60 * tokens / pace.tokens_per_minute
        assert after - before == pytest.approx(want)


# Faults that pass


PASSING = [
    Fault(500), Fault(503, body='<html>'), Fault(None), Fault(408), Fault(409),
    Fault(429, body={'error': {'message': 'slowly'}}), Fault(200, body='no json'),
    Fault(200, body={}), Fault(200, body=[]), Fault(200, body={'choices': []}),
    Fault(200, {'Content-Type': 'text/html'}, '<html>'),
    Fault(200, body={'error': {'message': 'overloaded'}}),
]  # fmt: skip


def test_passing_faults_are_tried_again(tmp_path):
    """Each question meets another fault first."""
    timer = Timer()
    faults = {2 * n: fault for n, fault in enumerate(PASSING)}
    with served(Endpoint(right, faults=faults)) as server:
        spent, found = run(server, tmp_path / 'x.jsonl', timer=timer, pace=Pace(1))
        assert found == wanted()
        said = [body['messages'][0]['content'] for body in server.asked]
    assert said[::2] == said[1::2] == list(dict.fromkeys(said))
    assert spent == Progress(12, 12, 1200, 24)
    assert timer.slept == [1.0] * 12


def test_slow_answers_time_out(tmp_path):
    gate = threading.Event()
    with served(Endpoint(right, gates={0: gate})) as server:
        _, found = run(server, tmp_path / 'x.jsonl', pace=Pace(3, timeout=0.3))
        assert found == wanted()
        assert len(server.asked) == 13


def test_back_off_doubles_then_gives_up(tmp_path):
    timer = Timer()
    with served(Endpoint(right, faults=lambda number: Fault(500) if number else None)) as server:
        pace = Pace(1, attempts=5, backoff=0.5, longest=3.0)
        with pytest.raises(Refused, match=r'HTTP 500 .*, 5 times over; what was answered is kept'):
            run(server, tmp_path / 'x.jsonl', pace=pace, timer=timer)
        assert timer.slept == [0.5, 1.0, 2.0, 3.0]
        assert len(server.asked) == 6
        server.faults = {}
        _, found = run(server, tmp_path / 'x.jsonl')
        assert found == wanted()
        assert len(server.asked) == 6 + 11


def test_jitter():
    """From half to one and a half times the wait."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)

    async def ask(request):
        raise judge_endpoint.Busy('busy')

    for draw in (0.0, 0.25, 0.999):
        clock = Clock(lambda: 0.0, sleep, lambda draw=draw: draw)
        limiter = judge_client.Limiter(Pace(attempts=2, backoff=4.0), clock)
        request = judge_endpoint.Endpoint('m').request(QUESTIONS[0])
        with pytest.raises(Refused):
            asyncio.run(judge_client._persist(request, ask, judge_endpoint.Endpoint('m'), limiter))
    assert slept == pytest.approx([2, 3, 6], rel=1e-2)


def in_seconds(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


def test_retry_after(tmp_path):
    """Seconds, milliseconds or a date; what is none of them is the usual wait of a second."""
    told = [
        ({'Retry-After': '7'}, 7, 7),
        ({'Retry-After': '7.5'}, 7.5, 7.5),
        ({'retry-after-ms': '6500', 'Retry-After': '9'}, 6.5, 6.5),
        ({'Retry-After': in_seconds(500)}, 200, 500),
        ({'Retry-After': in_seconds(-500)}, 1, 1),
        *(({'Retry-After': said}, 1, 1) for said in ('soon', '-5', 'nan', 'inf', '')),
    ]
    timer = Timer()
    faults = {2 * n: Fault(429, headers) for n, (headers, *_) in enumerate(told)}
    with served(Endpoint(right, faults=faults)) as server:
        _, found = run(server, tmp_path / 'x.jsonl', pace=Pace(1), timer=timer)
        assert found == wanted()
    for slept, (_, low, high) in zip(timer.slept, told, strict=True):
        assert low <= slept <= high


def test_late_starts_are_made_up_for():
    """A sleep that lasts too long delays one start and not the rate; an idle hour saves up none."""
    time, starts = [0.0], []

    async def sleep(seconds):
        time[0] += seconds + 0.1

    async def main():
        limiter = judge_client.Limiter(
            Pace(requests_per_minute=60), Clock(lambda: time[0], sleep, lambda: 0.5)
        )
        for n in range(10):
            await limiter.turn(1)
            starts.append(time[0])
            time[0] += 3600 * (n == 5)

    asyncio.run(main())
    assert starts[:6] == pytest.approx([0, 1.1, 2.1, 3.1, 4.1, 5.1])
    assert starts[6:] == pytest.approx([3605.1, 3605.95, 3606.95, 3607.95])


def test_all_wait_when_one_is_told_to(tmp_path):
    """A request that was told to wait holds the others, which would only be told the same."""
    asked, slept = [], []

    async def sleep(seconds):
        slept.append(seconds)
        await asyncio.Event().wait()  # time stands still

    async def ask(request):
        asked.append(request)
        told = len(asked) == 3
        await asyncio.sleep(0)
        if told:
            raise judge_endpoint.Busy('busy', 50.0)
        return Reply('1', 1, 1)

    async def main(cache):
        todo = judge_client.plan(QUESTIONS, judge_endpoint.Endpoint('m'), {}).todo
        clock = Clock(lambda: 0.0, sleep, lambda: 0.5)
        endpoint = judge_endpoint.Endpoint('m')
        task = asyncio.create_task(
            judge_client.fetch(todo, endpoint, ask, cache, pace=Pace(3), clock=clock)
        )
        for _ in range(100):
            await asyncio.sleep(0)
        seen = list(slept)
        task.cancel()
        await asyncio.wait([task])
        return seen

    with Cache(tmp_path / 'x.jsonl') as cache:
        seen = asyncio.run(main(cache))
    assert len(asked) <= 5
    assert seen == [50.0, 50.0]  # of who was told, and of the first who waits its turn
