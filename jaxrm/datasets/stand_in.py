"""A stand-in for a language model that judges the answers of the synthetic world.

It sees the texts of a question and nothing else, and errs as such judges do: by opinions that it
keeps, by wavering, by taking the first reply unread, and by answers that name none.
"""

import random
from collections.abc import Callable, Mapping, Sequence

from jaxrm.datasets import synthetic

Rate = float | Mapping[str, float]  # of all capabilities, or by name; of those unnamed 0
Judge = Callable[[Sequence[str | None]], str]

SAYS = ('{}', '{}.', 'Reply {}', 'Reply {} is better.')
GARBAGE = ('I cannot tell.', 'Both replies have their merits.', 'As a model I take no sides.', '')


def judge(
    *,
    noise: Rate = 0.0,
    waver: Rate = 0.0,
    position: Rate = 0.0,
    garbage: Rate = 0.0,
    seed: int = 0,
) -> Judge:
    """What answers (query, first, second, capability, ...); capability None is the gold reward.

    `noise` and `waver` are standard deviations of Gaussian errors in the difference of the
    qualities, which lie in [0, 1]: of an opinion on a pair, the same in both orders, and of each
    time it is asked. `position` is the chance to take the first reply unread, `garbage` that of an
    answer that names none. Replies that seem equal give the first. The same question has the same
    answer. Raises ValueError for a prompt that is not of the world, or a quality it has not.
    """
    for name, rate in (('position', position), ('garbage', garbage)):
        values = rate.values() if isinstance(rate, Mapping) else (rate,)
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f'{name}: found {rate}, expected chances from 0 to 1')

    def answer(question: Sequence[str | None]) -> str:
        query, first, second, capability = question[:4]
        if query is None or first is None or second is None:
            raise ValueError('question: found None, expected a query and two replies')
        gap = _worth(query, first, capability) - _worth(query, second, capability)
        low, high = sorted((first, second))
        opinion = random.Random(f'{(seed, query, low, high, capability)}').gauss()
        rng = random.Random(f'{(seed, query, first, second, capability)} asked')
        turn = 1 if first == low else -1
        gap += _rate(noise, capability) * turn * opinion + _rate(waver, capability) * rng.gauss()
        unread = rng.random() < _rate(position, capability)
        if rng.random() < _rate(garbage, capability):
            return rng.choice(GARBAGE)
        return rng.choice(SAYS).format(1 if unread or gap >= 0 else 2)

    return answer


def _rate(rate: Rate, capability: str | None) -> float:
    if isinstance(rate, Mapping):
        return rate.get(capability or '', 0.0)
    return rate


def _worth(query: str, reply: str, capability: str | None) -> float:
    found = synthetic.gold([{'role': 'user', 'content': query}], reply)
    if capability is None:
        return found.reward
    if capability not in found.qualities:
        known = tuple(found.qualities)
        raise ValueError(f'capability: found {capability!r}, expected one of {known}')
    return found.qualities[capability]
