"""Small sums told as a story; the prompt says whether to answer in digits or in words."""

import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'correctness': 0.35,
    'completeness': 0.25,
    'format': 0.25,
    'confidence': 0.15,
    'politeness': 0.15,
    'verbosity': -0.40,
}
RATES = {
    'slip': (0.25, 0.10),  # the answer is not what the steps say
    'miscount': (0.15, 0.40),  # the last step goes wrong
    'skip': (0.30, 0.45),  # no steps
    'misread': (0.15, 0.25),  # a step takes another number than the story's
    'form': (0.35, 0.50),
}
ITEMS = tuple(
    'apples pears plums stamps coins shells buttons candles marbles ribbons tickets pencils'
    ' feathers cups lemons cherries pebbles stickers'.split()
)
GAINS = ('buys', 'finds', 'wins')
LOSSES = ('sells', 'loses', 'drops')
OPENINGS = (
    'Here is a little sum for you.',
    'Please help me count.',
    'I have a question about my friend.',
    'Let us do some counting together.',
)
TIMES = ('In the morning', 'After lunch', 'On Sunday', 'At the fair')
_START = re.compile(r'\b([A-Z][a-z]+) has (\w+) (\w+)\.')
_STEP = re.compile(rf'\b({"|".join(GAINS + LOSSES)}) (\w+)')
_FORM = re.compile(r'How many .*\? .*\b(digits|words)\b')
_VALUE = {word: i for i, word in enumerate(style.NUMBERS)}


class Task(NamedTuple):
    """Who has how many of what, the steps (verb, number), and the form of the answer."""

    name: str
    item: str
    start: int
    steps: tuple[tuple[str, int], ...]
    form: str


def totals(task: Task) -> list[int]:
    """The count after each step."""
    counts, count = [], task.start
    for verb, number in task.steps:
        count += number if verb in GAINS else -number
        counts.append(count)
    return counts


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """A sum of one or two steps, with every count from 1 to 20."""
    name, item = rng.choice(style.NAMES), rng.choice(ITEMS)
    count = start = rng.randint(2, 9)
    told = []
    for time in rng.sample(TIMES, rng.choice((1, 1, 2))):
        gain = count < 5 or (count < 12 and rng.random() < 0.5)
        number = rng.randint(2, 9) if gain else rng.randint(1, min(9, count - 1))
        count += number if gain else -number
        verb = rng.choice(GAINS if gain else LOSSES)
        told.append(f'{time} {name} {verb} {style.NUMBERS[number]}.')
    form = rng.choice(('digits', 'words'))
    story = ' '.join(told)
    return style.user(
        f'{rng.choice(OPENINGS)} {name} has {style.NUMBERS[start]} {item}. {story} '
        f'How many {item} does {name} have now? Give the answer in {form}.'
    )


def read(text: str) -> Task | None:
    """The sum that a prompt states."""
    start, form = _START.search(text), _FORM.search(text)
    steps = tuple((verb, _VALUE[n]) for verb, n in _STEP.findall(text) if n in _VALUE)
    if not start or not form or not steps or start[2] not in _VALUE:
        return None
    return Task(start[1], start[3], _VALUE[start[2]], steps, form[1])


def _near(rng: random.Random, number: int) -> int:
    return rng.choice([n for d in (-2, -1, 1, 2) if 0 <= (n := number + d) <= 20])


def answer(task: Task, rng: random.Random, policy: float, clean: bool) -> str:
    """A candidate: the steps, then the answer."""
    flaws = style.flaws(RATES, rng, policy, clean)
    counts = totals(task)
    if 'miscount' in flaws:
        counts[-1] = _near(rng, counts[-1])
    final = _near(rng, counts[-1]) if 'slip' in flaws else counts[-1]
    numbers = [number for _, number in task.steps]
    if 'misread' in flaws:
        numbers[-1] = _near(rng, numbers[-1])
    told = [
        f'{verb} {style.NUMBERS[number]}, which makes {style.NUMBERS[count]}'
        for (verb, _), number, count in zip(task.steps, numbers, counts, strict=True)
    ]
    steps = f'{task.name} has {style.NUMBERS[task.start]} {task.item}, {", then ".join(told)}. '
    digits = (task.form == 'digits') != ('form' in flaws)
    core = f'The answer is {final if digits else style.NUMBERS[final]}.'
    return style.dress(core if 'skip' in flaws else steps + core, rng, policy, len(flaws))


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: the answer, the story's numbers in the steps, and the form of the answer."""
    said = [word for word in style.words(response) if word in _VALUE or word.isdecimal()]
    final = said[-1] if said else ''
    value = _VALUE[final] if final in _VALUE else int(final or -1)
    needed = [task.start, *(number for _, number in task.steps)]
    found, rest = 0, said[:-1]
    for number in (style.NUMBERS[n] for n in needed):
        if number in rest:
            found, rest = found + 1, rest[rest.index(number) + 1 :]
    form = 'digits' if final.isdecimal() else 'words'
    return {
        'correctness': float(value == totals(task)[-1]),
        'completeness': found / len(needed),
        'format': float(bool(said) and form == task.form),
        'confidence': style.confidence(response),
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }
