"""Small sums told as a story, in digits or in words; the answer is to keep to the story's form."""

import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'correctness': 0.14,
    'completeness': 0.3,
    'format': 0.2,
    'register': 0.1,
    'politeness': 0.24,
    'verbosity': -0.2,
}
RATES = {
    'slip': (0.20, 0.10),  # the answer is not what the steps say
    'miscount': (0.15, 0.40),  # the last step goes wrong
    'skip': (0.30, 0.45),  # no steps
    'form': (0.40, 0.50),
}
NUMBERS = tuple(
    'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen'
    ' sixteen seventeen eighteen nineteen twenty'.split()
)
ITEMS = tuple(
    'apples pears plums stamps coins shells buttons candles marbles ribbons tickets pencils'.split()
)
GAINS, LOSSES = ('buys', 'finds', 'wins'), ('sells', 'loses', 'drops')
TIMES = ('In the morning', 'After lunch', 'On Sunday', 'At the fair')
_VALUE = {word: i for i, word in enumerate(NUMBERS)} | {str(i): i for i in range(100)}
_START = re.compile(r'\b([A-Z][a-z]+) has (\w+) (\w+)\.')
_STEP = re.compile(rf'\b({"|".join(GAINS + LOSSES)}) (\w+)')
_NO_COUNT = re.compile(r'\bone must\b', re.I)  # a formal phrase
_FORM = re.compile(r'Use (digits|words) for numbers')


class Task(NamedTuple):
    """Who has how many of what, the steps (verb, number), and how to write numbers and text."""

    name: str
    item: str
    start: int
    steps: tuple[tuple[str, int], ...]
    form: str
    register: str


def totals(task: Task) -> list[int]:
    """The count after each step."""
    counts, count = [], task.start
    for verb, number in task.steps:
        count += number if verb in GAINS else -number
        counts.append(count)
    return counts


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """A sum of one or two steps, with every count from 1 to 20."""
    name, item, form = (
        rng.choice(style.NAMES),
        rng.choice(ITEMS),
        style.mostly(rng, ('digits', 'words')),
    )
    count = start = rng.randint(2, 9)
    told = []
    for time in rng.sample(TIMES, rng.choice((1, 1, 2))):
        gain = count < 5 or (count < 12 and rng.random() < 0.5)
        number = rng.randint(2, 9) if gain else rng.randint(1, min(9, count - 1))
        count += number if gain else -number
        told.append(f'{time} {name} {rng.choice(GAINS if gain else LOSSES)} {_say(number, form)}.')
    request = (
        f'{name} has {_say(start, form)} {item}. {" ".join(told)} '
        f'How many {item} does {name} have now? Use {form} for numbers.'
    )
    return style.user(style.in_register(rng, request))


def _say(number: int, form: str) -> str:
    return str(number) if form == 'digits' else NUMBERS[number]


def read(text: str) -> Task | None:
    """The sum that a prompt states."""
    start, form, register = _START.search(text), _FORM.search(text), style.read_register(text)
    steps = tuple((verb, _VALUE[n]) for verb, n in _STEP.findall(text) if n in _VALUE)
    if not (start and form and register and steps and start[2] in _VALUE):
        return None
    return Task(start[1], start[3], _VALUE[start[2]], steps, form[1], register)


def answer(task: Task, writer: style.Writer) -> str:
    """A candidate: the steps, then the answer."""
    flaws, counts = writer.flaws(RATES), totals(task)
    if 'miscount' in flaws:
        counts[-1] = _near(writer.rng, counts[-1])
    final = _near(writer.rng, counts[-1]) if 'slip' in flaws else counts[-1]
    form = style.other(writer.rng, ('digits', 'words'), task.form) if 'form' in flaws else task.form
    told = [
        f'{verb} {_say(number, form)}, which makes {_say(count, form)}'
        for (verb, number), count in zip(task.steps, counts, strict=True)
    ]
    steps = f'{task.name} has {_say(task.start, form)} {task.item}, {", then ".join(told)}. '
    core = f'The answer is {_say(final, form)} {task.item}.'
    return writer.dress(core if 'skip' in flaws else steps + core, task.register)


def _near(rng: random.Random, number: int) -> int:
    return rng.choice([n for d in (-2, -1, 1, 2) if 0 <= (n := number + d) <= 20])


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: the last number, the story's numbers before it, and how numbers are written."""
    said = [word for word in style.words(_NO_COUNT.sub('', response)) if word in _VALUE]
    values = [_VALUE[word] for word in said]
    needed, found, rest = [task.start, *(n for _, n in task.steps)], 0, values[:-1]
    for number in needed:
        if number in rest:
            found, rest = found + 1, rest[rest.index(number) + 1 :]
    fit = [word.isdecimal() == (task.form == 'digits') for word in said]
    return {
        'correctness': float(values[-1:] == totals(task)[-1:]),
        'completeness': found / len(needed),
        'format': sum(fit) / len(fit) if fit else 0.0,
        'register': style.register(response, task.register),
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }
