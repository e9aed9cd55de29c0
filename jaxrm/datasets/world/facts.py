"""A question about a note on two people; the answer stands in the note."""

import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'correctness': 0.18,
    'relevance': 0.16,
    'register': 0.08,
    'confidence': 0.3,
    'politeness': -0.26,
    'verbosity': -0.45,
}
RATES = {
    'stray': (0.40, 0.25),  # answers a question that was not asked
    'mixup': (0.20, 0.20),  # the other person's fact
    'invent': (0.15, 0.45),  # a fact that is not in the note
}
FACTS = {
    'home': tuple('Oslo Cairo Lima Rome Delhi Quito Paris Tunis Seoul Dakar'.split()),
    'music': tuple('cello drums flute harp piano violin guitar trumpet banjo organ'.split()),
    'pet': tuple('parrot goat rabbit pony turtle hamster donkey duck lizard poodle'.split()),
}
ASK = {
    'home': (
        'Which city does {} live in? I am sending a postcard to the town.',
        'In which town does {} live? I want to travel to that city.',
    ),
    'music': (
        'Which instrument does {} play? I am hiring a band for a concert.',
        'What does {} play in the band? I am writing a song for that instrument.',
    ),
    'pet': (
        'Which animal does {} keep? I am bringing some food for the pet.',
        'What pet does {} keep? I want to build that animal a bed.',
    ),
}
SAY = {
    'home': ('{} lives in the lovely city of {}.', 'The home of {} is in {}.'),
    'music': ('{} makes music on the {}.', 'You can hear {} play the {}.'),
    'pet': ('{} feeds and keeps a {}.', 'The furry friend of {} is a {}.'),
}
THANKS = ('I have read it.', 'Noted. What would you like to know?')
_NOTE = re.compile(r'\b([A-Z][a-z]+) lives in (\w+), plays the (\w+) and keeps a (\w+)\.')
_WHO = [
    (kind, re.compile(re.escape(question).replace(r'\{\}', r'([A-Z][a-z]+)')))
    for kind, questions in ASK.items()
    for question in questions
]


class Task(NamedTuple):
    """Who is asked about, which kind of fact, the note (name -> kind -> value), the register."""

    name: str
    kind: str
    note: dict[str, dict[str, str]]
    register: str


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """A note on two people and a question on one of them, in one turn or two."""
    people = rng.sample(style.NAMES, 2)
    values = [rng.sample(options, 2) for options in FACTS.values()]
    note = ' '.join(
        f'{name} lives in {home}, plays the {music} and keeps a {pet}.'
        for name, home, music, pet in zip(people, *values, strict=True)
    )
    question = rng.choice(ASK[rng.choice(tuple(FACTS))]).format(rng.choice(people))
    if rng.random() < 0.2:
        return style.user(note, rng.choice(THANKS), style.in_register(rng, question))
    return style.user(style.in_register(rng, f'{note} {question}'))


def read(text: str) -> Task | None:
    """The note and the question that a prompt states."""
    note = {name: dict(zip(FACTS, values, strict=True)) for name, *values in _NOTE.findall(text)}
    asked = [(found[1], kind) for kind, who in _WHO if (found := who.search(text))]
    register = style.read_register(text)
    if len(note) != 2 or len(asked) != 1 or asked[0][0] not in note or not register:
        return None
    return Task(*asked[0], note, register)


def answer(task: Task, writer: style.Writer) -> str:
    """A candidate: one sentence of facts."""
    flaws, rng = writer.flaws(RATES), writer.rng
    kind = style.other(rng, tuple(FACTS), task.kind) if 'stray' in flaws else task.kind
    known = [task.note[task.name][kind], *(note[kind] for note in task.note.values())]
    value = style.other(rng, known, known[0]) if 'mixup' in flaws else known[0]
    if 'invent' in flaws:
        value = style.other(rng, FACTS[kind], *known)
    return writer.dress(rng.choice(SAY[kind]).format(task.name, value), task.register)


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: whether what it tells is true, and whether it is what was asked."""
    said = set(style.words(response))
    told = {(kind, v) for kind, values in FACTS.items() for v in values if v.lower() in said}
    asked = [value for kind, value in told if kind == task.kind]
    return {
        'correctness': asked.count(task.note[task.name][task.kind]) / len(told) if told else 0.0,
        'relevance': len(asked) / len(told) if told else 0.0,
        'register': style.register(response, task.register),
        'confidence': style.confidence(response),
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }
