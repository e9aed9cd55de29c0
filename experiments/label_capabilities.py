"""Capability labels, or overall ones, of preference data by a language model.

Run:     python -m experiments.label_capabilities --dataset_name pairs.jsonl --model MODEL
             --capabilities points.json --exclude test.jsonl --dry_run
         (then without --dry_run; --base_url for another address than OpenAI's)
Cost:    what the model costs: k m (m - 1) questions a prompt of m answers and k capabilities;
         --dry_run says how many, and for how much, and asks nothing
Expect:  labels.jsonl, pairs whose group is category/capability, and statistics.json

points.json has for each group of the data ("" for none) a list of names, or an object of names and
their definitions; points_dmoerm.json beside this file has those of arXiv 2403.01197.
Without it the question is which answer is better as a whole, and the accuracy of the model as a
judge is told, too. The key is read from the environment alone. A run that was stopped goes on
where it was: whatever was answered is in answers.jsonl, and is not asked again.
"""

import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import common
from jaxrm import data, evaluate, files, judge, judge_cache, judge_client
from jaxrm.judge_endpoint import OPENAI, Endpoint, Price

SHOWN = {  # of judge.Statistics, and the head of its column
    'comparisons': 'pairs',
    'kept': 'kept',
    'retention': 'share',
    'position_bias': 'bias',
    'unparseable': 'unread',
    'agreement': 'as data',
}


@dataclasses.dataclass(frozen=True)
class Config:
    dataset_name: str = tyro.MISSING  # .jsonl(.gz), .json, .parquet or hub name
    model: str = tyro.MISSING  # as the endpoint calls it
    output_dir: Path = Path('runs/label_capabilities')
    base_url: str = OPENAI
    api_key_env: str = 'OPENAI_API_KEY'  # the variable that has the key
    capabilities: Path | None = None  # JSON; without it as a whole
    exclude: tuple[str, ...] = ()  # data sets whose prompts must not be sent: the test sets
    split: str | None = None
    layout: str | None = None
    chat: bool = False  # plain strings become a user and an assistant turn
    query: judge.Query = 'conversation'  # or the last user turn alone
    template: Path | None = None  # text with {query} {first} {second} {respect}
    parse: Literal['only', 'first'] = 'only'  # one reply's number alone, or the first digit 1 or 2
    swap_filter: bool = True  # without it one order decides (both are asked)
    temperature: float | None = 0.0  # None is not sent
    max_tokens: int | None = 16  # of an answer; None is not sent
    options: str = '{}'  # JSON of further fields, as '{"max_completion_tokens": 500}'
    concurrency: int = 8
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    timeout: float = 60.0  # seconds
    attempts: int = 8
    skip_bad_questions: bool = False  # that the server does not accept, as too long
    price_prompt: float = 0.0  # dollars a million tokens
    price_completion: float = 0.0
    dry_run: bool = False


def main(c: Config) -> None:
    """Ask what is not answered yet, then write the labels."""
    endpoint, pace = settings(c)
    found = data.load(c.dataset_name, split=c.split, layout=c.layout, chat=c.chat)
    points = None if c.capabilities is None else judge.read_points(c.capabilities)
    hidden = [data.load(n, layout=c.layout, chat=c.chat).records for n in c.exclude]
    excluded = [record.messages for records in hidden for record in records]
    ask = functools.partial(
        judge.comparisons, found.records, points, query=c.query, excluded=excluded
    )
    cache, price = c.output_dir / 'answers.jsonl', Price(c.price_prompt, c.price_completion)
    questions = (question for each in ask() for question in each.questions)
    plan = judge_client.plan(questions, endpoint, judge_cache.read(cache))
    tokens = plan.prompt_tokens, plan.completion_tokens
    common.console.print(
        f'{found.mapping}\n{len(plan.todo)} questions to ask, {plan.cached} answered already: '
        f'about {tokens[0]} tokens of prompts, at most {tokens[1]} of answers, '
        f'{cost(price, tokens)}'
    )
    if c.dry_run:
        return
    secret = key(c) if plan.todo else None
    with judge_cache.Cache(cache) as replies:
        spent = asked(c, plan, endpoint, replies, pace, price, secret)
    answer = judge_client.answers(endpoint, replies)
    verdicts = list(judge.verdicts(ask(), answer, judge.PARSE[c.parse]))
    total = taken((question for each in ask() for question in each.questions), endpoint, replies)
    write(c, found, verdicts, plan, spent, total, price)


def settings(c: Config) -> tuple[Endpoint, judge_client.Pace]:
    """The endpoint and the pace of the flags, checked."""
    template = judge.TEMPLATE if c.template is None else c.template.read_text(encoding='utf-8')
    try:
        options = json.loads(c.options)
    except ValueError as error:
        raise ValueError(f'--options: no JSON: {error}') from error
    if not isinstance(options, dict):
        raise ValueError(f'--options: found {files.kind(options)}, expected an object')
    endpoint = Endpoint(c.model, c.base_url, template, c.temperature, c.max_tokens, options)
    pace = judge_client.Pace(
        c.concurrency, c.requests_per_minute, c.tokens_per_minute, c.timeout, c.attempts
    )
    judge_client.check(endpoint, pace)
    return endpoint, pace


def key(c: Config) -> str | None:
    """The key from the environment; OpenAI's own address needs one."""
    found = os.environ.get(c.api_key_env) or None
    if found is None and c.base_url == OPENAI:
        raise ValueError(f'{c.base_url}: found no key, expected it in ${c.api_key_env}')
    return found


def cost(price: Price, tokens: tuple[float, float]) -> str:
    """What so many tokens of prompts and answers cost, as far as that is known."""
    return f'${price.of(*tokens):.2f}' if any(price) else 'no price given'


def taken(
    questions: Iterable[judge.Question], endpoint: Endpoint, replies: judge_cache.Cache
) -> tuple[int, int]:
    """Tokens of prompts and of answers of all questions, whichever run asked them."""
    keys = {endpoint.key(endpoint.request(question)) for question in questions}
    found = [reply for key in keys if (reply := replies.get(key)) is not None]
    return sum(x.prompt_tokens for x in found), sum(x.completion_tokens for x in found)


def asked(
    c: Config,
    plan: judge_client.Plan,
    endpoint: Endpoint,
    replies: judge_cache.Cache,
    pace: judge_client.Pace,
    price: Price,
    secret: str | None,
) -> judge_client.Progress:
    """What the questions took; a bar shows it as they are answered."""
    if not plan.todo:
        return judge_client.Progress(0)
    columns = (
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn('{task.fields[said]}')
    )  # fmt: skip
    with Progress(*columns, console=common.console) as bar:
        task = bar.add_task('', total=len(plan.todo), said='')

        def say(now: judge_client.Progress) -> None:
            so_far = cost(price, (now.prompt_tokens, now.completion_tokens))
            whole = f' of {cost(price, now.whole())}' if any(price) else ''
            said = f'{so_far}{whole}, {now.unread} name no reply'
            bar.update(task, completed=now.done, said=said)

        options: dict[str, Any] = {
            'pace': pace,
            'parse': judge.PARSE[c.parse],
            'skip': c.skip_bad_questions,
        }
        try:
            return judge_client.run(plan.todo, endpoint, replies, key=secret, say=say, **options)
        except KeyboardInterrupt:
            common.console.print('stopped; the same command asks what is not answered yet')
            sys.exit(130)


def write(
    c: Config,
    found: data.Loaded,
    verdicts: list[judge.Verdict],
    plan: judge_client.Plan,
    spent: judge_client.Progress,
    total: tuple[int, int],
    price: Price,
) -> None:
    """labels.jsonl and statistics.json, and what they say; tokens and cost are those of all runs.

    A question that was sent again after a fault is counted once, as it was answered.
    """
    labels = judge.labels(verdicts, found.records, swap=c.swap_filter)
    count = judge.write(c.output_dir / 'labels.jsonl', labels)
    groups = judge.statistics(verdicts, found.records)
    rows: dict[str, Sequence[Any]]
    rows = {group: [plain(getattr(x, name)) for name in SHOWN] for group, x in groups.items()}
    common.table(f'{c.model}: labels of {c.dataset_name}', rows, list(SHOWN.values()))
    said: dict[str, Any] = {'model': c.model, 'base_url': c.base_url, 'labels': count}
    said |= {'cached': plan.cached, 'asked': spent.done, 'skipped': spent.skipped}
    said |= {'prompt_tokens': total[0], 'completion_tokens': total[1]}
    said |= {'dollars': price.of(*total) if any(price) else None}
    if c.capabilities is None:
        said |= accuracy(found, verdicts)
    said['groups'] = {k: dict(zip(SHOWN, row, strict=True)) for k, row in rows.items()}
    common.write_json(c.output_dir / 'statistics.json', said)
    tokens = f'{total[0]} + {total[1]} tokens, {cost(price, total)}'
    common.console.print(f'{count} labels, {tokens}; files are in {c.output_dir}')


def accuracy(found: data.Loaded, verdicts: list[judge.Verdict]) -> Mapping[str, Any]:
    """How often the judge finds the better answer, an inconsistent pair counting half."""
    ranks = evaluate.ranks(found.records)
    each = evaluate.pairs(ranks, judge.scores(verdicts, found.records))
    prompts = evaluate.prompts(found.records)
    interval = evaluate.interval(each.accuracy + each.ties / 2, prompts=prompts)
    common.console.print(f'accuracy as a judge: {interval}')
    return {'accuracy': interval}


def plain(value: float) -> float | None:
    """As JSON has it."""
    return None if math.isnan(value) else round(value, 4)


if __name__ == '__main__':
    common.launch(Config, main)
