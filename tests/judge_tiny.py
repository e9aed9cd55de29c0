"""Twelve questions, a judge that answers them rightly, and a run against an endpoint."""

import asyncio

from fake_endpoint import TEMPLATE

from jaxrm import judge, judge_client, judge_endpoint
from jaxrm.data import Preference
from jaxrm.judge_cache import Cache
from jaxrm.judge_client import Clock, Pace

KEY = 'sk-not-to-be-seen-0123456789'
RECORDS = [Preference(f'Say {n}', (f'{n} b b', f'{n} a'), ranks=(0, 1)) for n in range(6)]
PAIRS = list(judge.comparisons(RECORDS, None))
QUESTIONS = [question for pair in PAIRS for question in pair.questions]  # 12


def right(respect, query, first, second):
    """The longer one, in words that both parsers understand."""
    return f'Reply {1 if len(first) > len(second) else 2}.'


class Timer:
    """A clock that sleeping alone moves."""

    def __init__(self):
        self.time, self.slept = 0.0, []
        self.clock = Clock(lambda: self.time, self.sleep, lambda: 0.5)

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


def endpoint_of(server, **options):
    return judge_endpoint.Endpoint('m', server.url, TEMPLATE, **options)


def run(server, path, *, pace=None, questions=QUESTIONS, endpoint=None, timer=None, **options):
    """(what it took, texts of the replies in order) of a run against the server."""
    endpoint = endpoint or endpoint_of(server)
    with Cache(path) as cache:
        plan = judge_client.plan(questions, endpoint, cache)
        spent = judge_client.run(
            plan.todo, endpoint, cache, key=KEY, pace=pace or Pace(concurrency=3),
            clock=(timer or Timer()).clock, **options,
        )  # fmt: skip
    answer = judge_client.answers(endpoint, cache)
    return spent, [answer(question) for question in questions]


def wanted():
    return [right('', *question[:3]) for question in QUESTIONS]
