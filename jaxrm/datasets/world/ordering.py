"""Putting a few things in order; the prompt says which way round and what goes between them."""

import itertools
import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'correctness': 0.22,
    'completeness': 0.15,
    'format': 0.22,
    'confidence': 0.28,
    'politeness': 0.22,
    'verbosity': -0.25,
}
RATES = {
    'reverse': (0.40, 0.25),
    'swap': (0.10, 0.40),
    'omit': (0.25, 0.40),
    'add': (0.10, 0.35),
    'form': (0.40, 0.50),
}
SCALES = {
    ('animals', 'smallest', 'largest'): 'ant mouse cat goat lion horse whale',
    ('travellers', 'slowest', 'fastest'): 'snail turtle walker bicycle car train rocket',
    ('days', 'earliest', 'latest'): 'Monday Tuesday Wednesday Thursday Friday Saturday Sunday',
    ('people', 'youngest', 'oldest'): 'baby child teenager student parent grandparent ancestor',
    ('things', 'coldest', 'hottest'): 'snow rain bath tea oven fire lava',
    ('objects', 'lightest', 'heaviest'): 'feather letter apple book chair piano ship',
}
FORMS = {'commas': ', ', 'arrows': ' -> ', 'slashes': ' / '}
WAYS = {'climb up': 'Climbing up', 'go down': 'Going down'}
_ASK = re.compile(
    r'Put these (\w+) in a row: (.+?)\. Start with the (\w+) and (climb up|go down) to the (\w+), '
    r'and keep the (\w+)\.'
)
_ITEMS = {key: tuple(items.split()) for key, items in SCALES.items()}


class Task(NamedTuple):
    """The scale from the asked first to the asked last, the items, and how to set them out."""

    scale: tuple[str, ...]
    items: tuple[str, ...]
    way: str
    form: str
    register: str


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """Three to five items of one scale."""
    noun, *ends = key = rng.choice(tuple(SCALES))
    way, form = style.mostly(rng, tuple(WAYS)), style.mostly(rng, tuple(FORMS))
    first, last = ends if way == 'climb up' else ends[::-1]
    items = FORMS[form].join(rng.sample(_ITEMS[key], rng.choice((3, 4, 4, 5))))
    request = (
        f'Put these {noun} in a row: {items}. '
        f'Start with the {first} and {way} to the {last}, and keep the {form}.'
    )
    return style.user(style.in_register(rng, request))


def read(text: str) -> Task | None:
    """The order that a prompt asks for."""
    found, register = _ASK.search(text), style.read_register(text)
    if not found or not register or found[6] not in FORMS:
        return None
    noun, items, first, way, last, form = found.groups()
    scale = _ITEMS.get((noun, first, last)) or _ITEMS.get((noun, last, first), ())[::-1]
    items = tuple(items.split(FORMS[form]))
    return Task(scale, items, way, form, register) if set(items) <= set(scale) else None


def answer(task: Task, writer: style.Writer) -> str:
    """A candidate: the items in a row."""
    flaws, rng = writer.flaws(RATES), writer.rng
    row, way = sorted(task.items, key=task.scale.index), task.way
    if 'reverse' in flaws:
        row, way = row[::-1], style.other(rng, tuple(WAYS), way)
    if 'swap' in flaws:
        i, j = rng.sample(range(len(row)), 2)
        row[i], row[j] = row[j], row[i]
    if 'omit' in flaws:
        del row[rng.randrange(len(row))]
    if 'add' in flaws:
        row.insert(rng.randint(0, len(row)), style.other(rng, task.scale, *task.items))
    form = style.other(rng, tuple(FORMS), task.form) if 'form' in flaws else task.form
    return writer.dress(f'{WAYS[way]}: {FORMS[form].join(row)}.', task.register)


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: pairs in the right order, the items and no others, what stands between them."""
    spots = {item: m.start() for item in task.scale if (m := re.search(rf'\b{item}\b', response))}
    row = sorted(spots, key=spots.__getitem__)
    places = [task.scale.index(item) for item in row if item in task.items]
    pairs = [(a, b) for i, a in enumerate(places) for b in places[i + 1 :]]
    gaps = [response[spots[a] + len(a) : spots[b]] for a, b in itertools.pairwise(row)]
    return {
        'correctness': sum(a < b for a, b in pairs) / len(pairs) if pairs else 0.0,
        'completeness': len(places) / len({*task.items, *row}),
        'format': sum(gap == FORMS[task.form] for gap in gaps) / len(gaps) if gaps else 0.0,
        'confidence': style.confidence(response),
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }
