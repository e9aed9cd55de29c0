"""A language model behind any OpenAI-compatible address: what is sent, and what comes back."""

import contextlib
import datetime
import email.utils
import hashlib
import importlib
import json
import math
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from jaxrm import judge
from jaxrm.judge import Question
from jaxrm.judge_cache import Reply

OPENAI = 'https://api.openai.com/v1'
PASSING = {408, 409, 425, 429}  # HTTP status codes that another attempt may mend, as may 5xx
OWN = ('model', 'messages', 'temperature', 'max_tokens')  # fields of a request
PART = 8  # as many characters of a key in a row are not to be seen
SPENT = {'insufficient_quota', 'billing_hard_limit_reached'}  # 429 that no waiting mends


class Endpoint(NamedTuple):
    """A model behind an address, and how it is asked. The key is no part of it.

    What is None is not sent: the server's default holds. `options` are further fields of the
    request, such as reasoning_effort or max_completion_tokens.
    """

    model: str
    base_url: str = OPENAI
    template: str = judge.TEMPLATE
    temperature: float | None = 0.0
    max_tokens: int | None = 16
    options: Mapping[str, Any] | None = None

    def request(self, question: Question) -> dict[str, Any]:
        """The fields of the request."""
        said = judge.render(question, self.template)
        given = {'temperature': self.temperature, 'max_tokens': self.max_tokens}
        return {
            'model': self.model,
            'messages': [{'role': 'user', 'content': said}],
            **{name: value for name, value in given.items() if value is not None},
            **(self.options or {}),
        }

    def key(self, request: Mapping[str, Any]) -> str:
        """Of everything that the answer depends on."""
        content = json.dumps([self.base_url.rstrip('/'), request], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class Price(NamedTuple):
    """Dollars a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Dollars."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


class Busy(Exception):
    """Another attempt may do; `wait` is the time in seconds that the server asks for."""

    def __init__(self, why: str, wait: float = 0.0):
        super().__init__(why)
        self.wait = wait


class Refused(ValueError):
    """No other attempt will do."""


class BadQuestion(Refused):
    """Nor for this question, but for others perhaps."""


def check(endpoint: Endpoint) -> None:
    """Raises ValueError for what cannot work; quotes nothing that could be a secret."""
    judge.check_template(endpoint.template)
    url = urllib.parse.urlsplit(endpoint.base_url)
    if url.scheme not in ('http', 'https') or not url.hostname or url.port == 0:
        raise ValueError('base_url: found another address, expected http(s)://host/path')
    if url.username is not None or url.query:
        raise ValueError('base_url: found @ or ? in it, expected secrets in the environment alone')
    twice = set(endpoint.options or {}) & {*OWN, 'stream', 'n'}
    if twice:
        raise ValueError(f'options: found {sorted(twice)}, expected other fields than jaxrm sets')


Ask = Callable[[dict[str, Any]], Awaitable[Reply]]


def estimate(request: Mapping[str, Any]) -> int:
    """About how many tokens a prompt has: a quarter of its ASCII characters, and all others."""
    text = ''.join(m['content'] for m in request['messages'])
    plain = sum(map(str.isascii, text))
    return 8 + math.ceil(plain / 4) + len(text) - plain


def longest(endpoint: Endpoint) -> int:
    """Tokens an answer can have, as far as that is known."""
    given = (endpoint.options or {}).get('max_completion_tokens', endpoint.max_tokens)
    return given if isinstance(given, int) else 0


@contextlib.asynccontextmanager
async def connect(endpoint: Endpoint, key: str | None, *, timeout: float) -> AsyncIterator[Ask]:
    """What asks the endpoint once. Nothing that it raises or logs has the key in it."""
    try:
        openai = importlib.import_module('openai')
    except ImportError as error:
        raise ValueError(f"asking needs openai: pip install 'jaxrm[judge]' ({error})") from error
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ValueError('key: found white space or a character that no key has')
    told = {'api_key': key or 'none', 'base_url': endpoint.base_url, 'timeout': timeout}
    async with openai.AsyncOpenAI(**told, max_retries=0) as client:

        async def ask(request: dict[str, Any]) -> Reply:
            extra = {k: v for k, v in request.items() if k in (endpoint.options or {})}
            plain = {k: v for k, v in request.items() if k not in extra}
            try:
                found = await client.chat.completions.create(**plain, extra_body=extra or None)
                return _reply(found, request)
            except (openai.OpenAIError, ValueError) as error:
                fault = _fault(openai, error, endpoint, key)
            raise fault  # after the block: what it came from holds the request, and so the key

        yield ask


def _reply(found: Any, request: dict[str, Any]) -> Reply:
    """Raises ValueError for what is no completion; an answer without text is ''."""
    choices = getattr(found, 'choices', None)
    message = getattr(choices[0], 'message', None) if choices else None
    text = getattr(message, 'content', None)
    if message is None or not isinstance(text, str | None):
        raise ValueError('no completion')
    prompt, completion = (
        getattr(getattr(found, 'usage', None), f'{side}_tokens', None)
        for side in ('prompt', 'completion')
    )
    guess = len(text or '') // 4 + 1
    return Reply(
        text or '',
        prompt if isinstance(prompt, int) else estimate(request),
        completion if isinstance(completion, int) else guess,
    )


def _fault(openai: Any, error: Exception, endpoint: Endpoint, key: str | None) -> Exception:
    """What an error of the client means here."""
    where = f'{endpoint.base_url}: '
    if isinstance(error, UnicodeEncodeError):
        return BadQuestion('question: found a lone surrogate, expected Unicode text')
    if isinstance(error, openai.APITimeoutError):
        return Busy(f'{where}no answer in time')
    if isinstance(error, openai.APIConnectionError):
        return Busy(f'{where}no connection ({type(error.__cause__).__name__})')
    if not isinstance(error, openai.APIStatusError):
        return Busy(f'{where}found no completion in the answer, expected one')
    status, code = error.status_code, str(error.code)
    if status in (401, 403):
        return Refused(f'{where}HTTP {status}: the key is not accepted for {endpoint.model!r}')
    said = f'{where}HTTP {status} for {endpoint.model!r}: {_quoted(error, key)}'
    if (status in PASSING or status >= 500) and code not in SPENT:
        return Busy(said, _asked_to_wait(error.response.headers))
    return (BadQuestion if status in (400, 413, 422) else Refused)(said)


def _quoted(error: Any, key: str | None) -> str:
    """The server's own words, cut short and without the key."""
    body = error.body if isinstance(error.body, dict) else {}
    said = ' '.join(str(body.get('message') or error.body or 'no message').split())
    return masked(said, key)[:300]


def masked(said: str, key: str | None) -> str:
    """The text without the key, nor any part of it that is long enough to tell."""
    if not key:
        return said
    size, out, at = min(PART, len(key)), [], 0
    parts = {key[i : i + size] for i in range(len(key) - size + 1)}
    hidden = [any(said[j : j + size] in parts for j in range(max(0, i - size + 1), i + 1))
              for i in range(len(said))]  # fmt: skip
    while at < len(said):
        end = next((i for i in range(at, len(said)) if hidden[i] != hidden[at]), len(said))
        out.append('***' if hidden[at] else said[at:end])
        at = end
    return ''.join(out)


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds of Retry-After, a number or a date; 0 without it."""
    for name, unit in (('retry-after-ms', 1e-3), ('retry-after', 1.0)):
        said = headers.get(name, '')
        with contextlib.suppress(ValueError):
            seconds = float(said) * unit
            return seconds if 0 <= seconds < math.inf else 0.0
    with contextlib.suppress(ValueError):
        until = email.utils.parsedate_to_datetime(headers.get('retry-after', ''))
        now = datetime.datetime.now(until.tzinfo)
        return max(0.0, (until - now).total_seconds())
    return 0.0
