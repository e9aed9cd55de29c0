"""Questions to a judge behind an endpoint: planned, paced, retried, kept, and each asked once."""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple

from jaxrm import judge_endpoint
from jaxrm.judge import Question
from jaxrm.judge_cache import Cache, Reply
from jaxrm.judge_endpoint import Ask, BadQuestion, Busy, Endpoint, Refused

LATE = 0.25  # seconds that a start may be late and the next one still on time
Parse = Callable[[str], int | None]


class Pace(NamedTuple):
    """How fast to ask, how long to wait, and how often to try."""

    concurrency: int = 8
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf  # of prompt and longest answer, as estimated
    timeout: float = 60.0  # seconds
    attempts: int = 8
    backoff: float = 1.0  # seconds before the second attempt; twice as long before each next
    longest: float = 600.0  # seconds that a server may ask to wait
    patience: int = 50  # answers that name no reply, from the first one on


class Clock(NamedTuple):
    """Where time and chance come from."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    draw: Callable[[], float] = random.random


class Plan(NamedTuple):
    """What there is to ask: questions by key, each once, and estimates of their tokens."""

    todo: dict[str, Question]
    cached: int  # questions that are answered already
    prompt_tokens: int
    completion_tokens: int  # at most


class Progress(NamedTuple):
    """How far it is: answers of this run, and what they took."""

    todo: int
    done: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unread: int = 0  # answers that name no reply
    skipped: int = 0  # questions that the server does not accept

    def whole(self) -> tuple[float, float]:
        """Prompt and completion tokens of the whole run, if the rest is like what is done."""
        scale = self.todo / max(1, self.done)
        return self.prompt_tokens * scale, self.completion_tokens * scale


SILENT: Callable[[Progress], None] = lambda progress: None  # noqa: E731


def plan(questions: Iterable[Question], endpoint: Endpoint, known: Container[str]) -> Plan:
    """What is to be asked of the questions, given the keys that are known."""
    todo: dict[str, Question] = {}
    cached, tokens = set(), 0
    for question in questions:
        request = endpoint.request(question)
        key = endpoint.key(request)
        if key in known:
            cached.add(key)
        elif key not in todo:
            todo[key] = question
            tokens += judge_endpoint.estimate(request)
    return Plan(todo, len(cached), tokens, len(todo) * judge_endpoint.longest(endpoint))


class Limiter:
    """Lets one request start after another, as far apart as the rates ask."""

    def __init__(self, pace: Pace, clock: Clock):
        self.pace, self.clock = pace, clock
        self.free = clock.now()  # when the next one may start
        self.lock, self.over = asyncio.Lock(), False
        self.resting: set[asyncio.Task | None] = set()

    async def turn(self, tokens: int) -> None:
        """Waits until a request of so many tokens may start; first come, first served."""
        async with self.lock:
            while (wait := self.free - self.clock.now()) > 0 or self.over:
                await self.rest(wait)
            pace = self.pace
            minutes = max(1 / pace.requests_per_minute, tokens / pace.tokens_per_minute)
            self.free = max(self.free, self.clock.now() - LATE) + 60 * minutes

    def hold(self, seconds: float) -> None:
        """Nobody starts for so long."""
        self.free = max(self.free, self.clock.now() + seconds)

    async def rest(self, seconds: float) -> None:
        """Sleeps, unless it is all over."""
        if self.over:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        self.resting.add(task)
        try:
            await self.clock.sleep(seconds)
        finally:
            self.resting.discard(task)

    def stop(self) -> None:
        """Ends whoever rests now or later; what is on its way may come."""
        self.over = True
        for task in tuple(self.resting):
            if task is not None:
                task.cancel()


async def fetch(
    todo: Mapping[str, Question],
    endpoint: Endpoint,
    ask: Ask,
    cache: Cache,
    *,
    pace: Pace = Pace(),  # noqa: B008 (a named tuple)
    clock: Clock = Clock(),  # noqa: B008
    parse: Parse | None = None,
    skip: bool = False,
    say: Callable[[Progress], None] = SILENT,
) -> Progress:
    """Asks every question and keeps the replies.

    With `skip` a question that the server does not accept is left without a reply. Whatever else
    fails ends the run, when what is on its way has come: raises Refused, or OSError of the cache.
    """
    limiter, rest, failed = Limiter(pace, clock), iter(todo.items()), list[Exception]()
    state = Progress(len(todo))

    async def one(key: str, question: Question) -> Progress:
        try:
            reply = await _persist(endpoint.request(question), ask, endpoint, limiter)
        except BadQuestion:
            if not skip:
                raise
            return state._replace(done=state.done + 1, skipped=state.skipped + 1)
        cache.add(key, reply)
        unread = parse is not None and parse(reply.text) is None
        found = _with(state, reply, unread)
        if found.unread == found.done == pace.patience:
            said = f'the last one was {reply.text!r:.100}'
            raise Refused(f'{found.done} answers, and none names a reply: {said}')
        return found

    async def work() -> None:
        nonlocal state
        for key, question in rest:
            try:
                state = await one(key, question)
            except (Refused, OSError) as error:
                failed.append(error)
                limiter.stop()
            if failed:
                return
            say(state)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(pace.concurrency, len(todo))):
            group.create_task(work())
    if failed:
        raise failed[0]
    return state


def _with(state: Progress, reply: Reply, unread: bool) -> Progress:
    return state._replace(
        done=state.done + 1,
        prompt_tokens=state.prompt_tokens + reply.prompt_tokens,
        completion_tokens=state.completion_tokens + reply.completion_tokens,
        unread=state.unread + unread,
    )


async def _persist(
    request: dict[str, Any], ask: Ask, endpoint: Endpoint, limiter: Limiter
) -> Reply:
    """The reply, after as many attempts as it takes."""
    pace, why = limiter.pace, ''
    tokens = judge_endpoint.estimate(request) + judge_endpoint.longest(endpoint)
    for attempt in range(pace.attempts):
        await limiter.turn(tokens)
        try:
            return await ask(request)
        except Busy as busy:
            why, wait = str(busy), busy.wait
        if wait > pace.longest:
            raise Refused(f'{why}; asks to wait {wait:.0f} s, expected at most {pace.longest:g}')
        limiter.hold(wait)
        if attempt + 1 < pace.attempts:
            again = pace.backoff * 2**attempt * (0.5 + limiter.clock.draw())
            await limiter.rest(max(wait, min(again, pace.longest)))
    raise Refused(f'{why}, {pace.attempts} times over; what was answered is kept')


def run(
    todo: Mapping[str, Question],
    endpoint: Endpoint,
    cache: Cache,
    *,
    key: str | None,
    pace: Pace = Pace(),  # noqa: B008
    clock: Clock = Clock(),  # noqa: B008
    parse: Parse | None = None,
    skip: bool = False,
    say: Callable[[Progress], None] = SILENT,
) -> Progress:
    """`fetch` over the network, with the key of the endpoint or without any.

    Where an event loop runs already, as in a notebook, await `fetch` with judge_endpoint.connect.
    """

    async def main() -> Progress:
        async with judge_endpoint.connect(endpoint, key, timeout=pace.timeout) as ask:
            options = {'pace': pace, 'clock': clock, 'parse': parse, 'skip': skip, 'say': say}
            return await fetch(todo, endpoint, ask, cache, **options)  # type: ignore[arg-type]

    check(endpoint, pace)
    return asyncio.run(main()) if todo else Progress(0)


def answers(endpoint: Endpoint, cache: Cache) -> Callable[[Question], str | None]:
    """What judge.verdicts asks: the text of a question's reply."""

    def answer(question: Question) -> str | None:
        reply = cache.get(endpoint.key(endpoint.request(question)))
        return None if reply is None else reply.text

    return answer


def check(endpoint: Endpoint, pace: Pace) -> None:
    """Raises ValueError for what cannot work."""
    judge_endpoint.check(endpoint)
    for name, value in pace._asdict().items():
        if not value > 0:
            raise ValueError(f'{name}: found {value}, expected more than 0')
