"""A small world of chat with known preferences: any size, any noise, no download.

Prompts come from five categories. Each has named qualities that `gold` computes from the text
alone, and its own weights on them: `facts` wants short and curt answers and `persona` long and
warm ones, so that the two conflict; `arithmetic` and `ordering` get on. Much of a reward lies
between prompt and answer (the fact that was asked, the role to play), out of reach of words counted
in the answer; yet three prompts of four ask for what most ask for (digits, the past), so that
counting words is worth something. Candidates are good answers with flaws; `policy` shifts which
flaws, how long, and in which phrases.
"""

import json
import math
import random
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from jaxrm.data import Message, Preference
from jaxrm.datasets.world import arithmetic, facts, ordering, persona, rewrite, style

_WORLD = {
    'arithmetic': arithmetic,
    'ordering': ordering,
    'facts': facts,
    'persona': persona,
    'rewrite': rewrite,
}
WEIGHTS: dict[str, dict[str, float]] = {name: part.WEIGHTS for name, part in _WORLD.items()}
CATEGORIES: dict[str, tuple[str, ...]] = {name: tuple(w) for name, w in WEIGHTS.items()}
QUALITIES: tuple[str, ...] = tuple(dict.fromkeys(q for names in CATEGORIES.values() for q in names))
SPLITS = {'test': 1, 'validation': 1, 'train': 4, 'pretrain': 4}  # tenths of all prompts
SIZES = {'train': 8000, 'validation': 1000, 'test': 2000}
TEMPERATURE = 0.11
_SPLIT_OF = [split for split, tenths in SPLITS.items() for _ in range(tenths)]
_NAN = math.nan


class Gold(NamedTuple):
    """What a response is worth: its prompt's category, its qualities in [0, 1], their mixture."""

    category: str
    qualities: dict[str, float]
    reward: float


def gold(messages: Sequence[Message], response: str) -> Gold:
    """The true qualities and reward of a response, from text alone.

    Raises ValueError on a prompt that is not of this world or a response that is not text.
    """
    category, task = _read(messages)
    return _judge(category, task, response)


def load(split: str) -> list[Preference]:
    """The default pairs of `train`, `validation` or `test`, with sampled labels."""
    if split not in SIZES:
        raise ValueError(f'split: found {split!r}, expected one of {tuple(SIZES)}')
    return preferences(SIZES[split], seed=0, split=split)


def preferences(
    n: int,
    *,
    seed: int,
    split: str = 'train',
    candidates: int = 2,
    policy: float = 0.0,
    temperature: float = TEMPERATURE,
    flips: float = 0.0,
    labels: str = 'sampled',
    categories: Sequence[str] | None = None,
) -> list[Preference]:
    """n prompts with candidates, rated on all QUALITIES and labelled as by `label`.

    `policy` goes from 0 (the training distribution) to 1 (other flaws, longer answers, unseen
    phrases). The first k records do not depend on n; prompts do not depend on the policy, nor texts
    on the labels, except that labels by a quality skip prompts without it and sets that all tie.
    """
    if candidates < 1 or not 0 <= policy <= 1:
        raise ValueError(
            f'candidates, policy: found {candidates}, {policy}, expected >= 1 and in [0, 1]'
        )
    names = _categories(categories, labels if labels in QUALITIES else None)
    column = QUALITIES.index(labels) if labels in QUALITIES else None
    records = [_sample((seed, split, i), names, candidates, policy, column) for i in range(n)]
    return label(records, labels, seed=seed, temperature=temperature, flips=flips)


def label(
    records: Sequence[Preference],
    labels: str = 'sampled',
    *,
    seed: int,
    temperature: float = TEMPERATURE,
    flips: float = 0.0,
) -> list[Preference]:
    """The same records ranked anew, best first, each candidate with its ratings.

    `sampled` draws a Plackett-Luce order of gold reward / temperature (for a pair, Bradley-Terry),
    `gold` orders by gold reward, the name of a quality by that quality, ties equal; `none` takes
    the ranks away. Then an order is turned round with probability `flips`. Responses are text, from
    any policy. Chance depends on the seed, the record's id (without one, its text) and the set of
    responses, not on their order: labelling the result again with the same seed changes nothing.
    """
    if labels not in ('sampled', 'gold', 'none', *QUALITIES):
        raise ValueError(
            f"labels: found {labels!r}, expected 'sampled', 'gold', 'none' or one of {QUALITIES}"
        )
    if temperature <= 0 or not 0 <= flips <= 1:
        raise ValueError(
            f'temperature, flips: found {temperature}, {flips}, expected > 0 and in [0, 1]'
        )
    return [_label(record, labels, seed, temperature, flips) for record in records]


def text(
    n: int,
    *,
    seed: int,
    split: str = 'pretrain',
    categories: Sequence[str] | None = None,
    remarks: float = 0.0,
) -> list[tuple[Message, ...]]:
    """n conversations for language modelling, each ending with a good answer.

    The content of an answer is right; its manners, doubts and filler vary as in training. A share
    `remarks` holds a candidate with flaws instead, and then the user's remark on some of its
    qualities: what a model has to read to know a good answer from a bad one.
    """
    names, conversations = _categories(categories, None), []
    for i in range(n):
        messages, category, task = _prompt((seed, split, i), names)
        rng = random.Random(f'{seed} {split} {i} text')
        remarked = rng.random() < remarks
        answer = _WORLD[category].answer(task, style.Writer(rng, clean=not remarked))
        turns = [{'role': 'assistant', 'content': answer}]
        if remarked:
            qualities = _judge(category, task, answer).qualities
            turns.append({'role': 'user', 'content': style.remark(qualities, rng)})
        conversations.append((*messages, *turns))
    return conversations


def _categories(categories: Sequence[str] | None, quality: str | None) -> tuple[str, ...]:
    """The named categories (all if None) that have the quality."""
    names = tuple(CATEGORIES if categories is None else categories)
    if not set(names) <= CATEGORIES.keys():
        raise ValueError(f'categories: found {names}, expected some of {tuple(CATEGORIES)}')
    names = tuple(name for name in names if quality is None or quality in CATEGORIES[name])
    if not names:
        raise ValueError(f'categories: found none with the quality {quality!r}')
    return names


def _read(messages: Sequence[Message] | str) -> tuple[str, tuple]:
    """The category and the task of a prompt."""
    if isinstance(messages, str):
        raise ValueError(f'messages: found the text {messages!r}, expected messages')
    said = '\n'.join(m['content'] for m in messages if m['role'] != 'assistant')
    for category, part in _WORLD.items():
        if (task := part.read(said)) is not None:
            return category, task
    raise ValueError(f'messages: found {said!r}, expected a prompt of the synthetic world')


def _judge(category: str, task: tuple, response: str | Sequence[Message]) -> Gold:
    if not isinstance(response, str):
        raise ValueError(f'response: found {response!r}, expected text')
    qualities, weights = _WORLD[category].judge(task, response), WEIGHTS[category]
    return Gold(category, qualities, sum(weights[name] * qualities[name] for name in weights))


def _prompt(key: tuple, categories: Sequence[str]) -> tuple[tuple[Message, ...], str, tuple]:
    """A prompt of the split, its category and task. The text decides which split a prompt is in."""
    seed, split, *_ = key
    if split not in SPLITS:
        raise ValueError(f'split: found {split!r}, expected one of {tuple(SPLITS)}')
    rng = random.Random(f'{key} prompt')
    category = rng.choice(categories)
    while True:
        messages = _WORLD[category].ask(rng)
        if _SPLIT_OF[_hash(messages) % len(_SPLIT_OF)] == split:
            return messages, *_read(messages)


def _hash(*parts: object) -> int:
    return zlib.crc32(json.dumps(parts).encode())


def _sample(
    key: tuple, categories: Sequence[str], candidates: int, policy: float, column: int | None
) -> Preference:
    """An unranked record with distinct candidates that do not all tie in the column, if given."""
    for attempt in range(1000):
        messages, category, task = _prompt((*key, attempt) if attempt else key, categories)
        rng = random.Random(f'{key} {attempt} answers')
        responses: dict[str, None] = {}
        while len(responses) < candidates:
            responses[_WORLD[category].answer(task, style.Writer(rng, policy))] = None
        ratings = tuple(_ratings(_judge(category, task, response)) for response in responses)
        if column is None or candidates == 1 or len({row[column] for row in ratings}) > 1:
            break
    name = f'{key[1]}-{key[0]}-{key[2]}-{_hash(messages, tuple(responses)):08x}'
    return Preference(messages, tuple(responses), ratings=ratings, group=category, id=name)


def _ratings(worth: Gold) -> tuple[float, ...]:
    return tuple(worth.qualities.get(name, _NAN) for name in QUALITIES)


def _label(
    record: Preference, labels: str, seed: int, temperature: float, flips: float
) -> Preference:
    category, task = _read(record.messages)
    worths = [_judge(category, task, response) for response in record.responses]
    record = record._replace(ratings=tuple(map(_ratings, worths)), group=category, ranks=None)
    if labels == 'none':
        return record
    texts = [str(response) for response in record.responses]
    name = record.id or _hash(record.messages, sorted(texts))
    rng = random.Random(f'{seed} {name} labels')
    noise = {text: -math.log(-math.log(rng.random())) for text in sorted(texts)}
    if labels in QUALITIES:
        if labels not in CATEGORIES[category]:
            raise ValueError(f'labels: found {labels!r}, expected one of {CATEGORIES[category]}')
        keys = [worth.qualities[labels] for worth in worths]
    elif labels == 'gold':
        keys = [worth.reward for worth in worths]
    else:
        keys = [w.reward / temperature + noise[t] for w, t in zip(worths, texts, strict=True)]
    if rng.random() < flips:
        keys = [-key for key in keys]
    return _ranked(record, keys)


def _ranked(record: Preference, keys: Sequence[float]) -> Preference:
    """The record, candidates sorted by falling key."""
    order = sorted(range(len(keys)), key=lambda i: -keys[i])
    ranks = tuple(sum(keys[j] > keys[i] for j in order) for i in order)
    responses = tuple(record.responses[i] for i in order)
    ratings = record.ratings and tuple(record.ratings[i] for i in order)
    return record._replace(responses=responses, ratings=ratings, ranks=ranks)
