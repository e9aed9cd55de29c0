"""Putting a few things in order; the prompt says which way round and how to set them out."""

import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'correctness': 0.40,
    'completeness': 0.20,
    'grounding': 0.15,
    'format': 0.25,
    'politeness': 0.15,
    'verbosity': -0.40,
}
RATES = {
    'swap': (0.30, 0.30),
    'reverse': (0.25, 0.15),
    'omit': (0.25, 0.40),
    'add': (0.15, 0.35),
    'form': (0.35, 0.50),
}
SCALES = {
    ('animals', 'smallest', 'largest'): 'ant mouse cat goat lion horse whale',
    ('travellers', 'slowest', 'fastest'): 'snail turtle walker bicycle car train rocket',
    ('days', 'earliest', 'latest'): 'Monday Tuesday Wednesday Thursday Friday Saturday Sunday',
    ('people', 'youngest', 'oldest'): 'baby child teenager student parent grandparent ancestor',
    ('things', 'coldest', 'hottest'): 'snow rain bath tea oven fire lava',
    ('objects', 'lightest', 'heaviest'): 'feather letter apple book chair piano ship',
    ('numbers', 'lowest', 'highest'): 'two four six eight ten twelve twenty',
}
FORMS = {'commas': ', ', 'arrows': ' -> ', 'slashes': ' / '}
OPENINGS = (
    'I am making a game for my class.',
    'Please sort something for me.',
    'Here is a small puzzle.',
    'I need a tidy row.',
)
_ASK = re.compile(r'Put these (\w+) in order from (\w+) to (\w+): ([\w, ]+)\. Use (\w+) ')
_ITEMS = {key: tuple(items.split()) for key, items in SCALES.items()}


class Task(NamedTuple):
    """The whole scale from the asked first to the asked last, the items, and how to set them out."""

    scale: tuple[str, ...]
    items: tuple[str, ...]
    form: str
    ends: tuple[str, str]


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """Three to five items of one scale."""
    noun, low, high = key = rng.choice(tuple(SCALES))
    if rng.random() < 0.5:
        low, high = high, low
    items = ', '.join(rng.sample(_ITEMS[key], rng.choice((3, 4, 4, 5))))
    return style.user(
        f'{rng.choice(OPENINGS)} Put these {noun} in order from {low} to {high}: {items}. '
        f'Use {rng.choice(tuple(FORMS))} between them.'
    )


def read(text: str) -> Task | None:
    """The order that a prompt asks for."""
    found = _ASK.search(text)
    if not found:
        return None
    noun, first, last, items, form = found.groups()
    for (name, low, high), scale in _ITEMS.items():
        if name == noun and {first, last} == {low, high} and form in FORMS:
            scale = scale if first == low else scale[::-1]
            return Task(scale, tuple(items.split(', ')), form, (first, last))
    return None


def answer(task: Task, rng: random.Random, policy: float, clean: bool) -> str:
    """A candidate: the items in a row."""
    flaws = style.flaws(RATES, rng, policy, clean)
    row = sorted(task.items, key=task.scale.index)
    if 'reverse' in flaws:
        row.reverse()
    if 'swap' in flaws:
        i, j = rng.sample(range(len(row)), 2)
        row[i], row[j] = row[j], row[i]
    if 'omit' in flaws:
        del row[rng.randrange(len(row))]
    if 'add' in flaws:
        row.insert(rng.randint(0, len(row)), style.other(rng, task.scale, *task.items))
    form = style.other(rng, tuple(FORMS), task.form) if 'form' in flaws else task.form
    lead = rng.choice(('', 'The order is ', f'From {task.ends[0]} to {task.ends[1]}: '))
    return style.dress(f'{lead}{FORMS[form].join(row)}.', rng, policy, len(flaws))


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: pairs in the right order, items named, none added, and what stands between them."""
    spots = {item: m.start() for item in task.scale if (m := re.search(rf'\b{item}\b', response))}
    row = [item for item in sorted(spots, key=spots.get) if item in task.items]
    places = [task.scale.index(item) for item in row]
    pairs = [(a, b) for i, a in enumerate(places) for b in places[i + 1 :]]
    ends = sorted((spots[item], spots[item] + len(item)) for item in spots)
    gaps = [response[a[1] : b[0]] for a, b in zip(ends, ends[1:], strict=False)]
    return {
        'correctness': sum(a < b for a, b in pairs) / len(pairs) if pairs else 0.0,
        'completeness': len(row) / len(task.items),
        'grounding': len(row) / len(spots) if spots else 0.0,
        'format': sum(gap == FORMS[task.form] for gap in gaps) / len(gaps) if gaps else 0.0,
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }
