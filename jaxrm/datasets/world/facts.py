"""Questions about a note on two people; everything needed stands in the note."""

import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'correctness': 0.35,
    'completeness': 0.20,
    'grounding': 0.20,
    'confidence': 0.25,
    'politeness': -0.25,
    'verbosity': -0.60,
}
RATES = {
    'mixup': (0.30, 0.20),  # the other person's fact
    'invent': (0.25, 0.45),  # a fact that is not in the note
    'omit': (0.30, 0.30),  # half of a double question
    'extra': (0.25, 0.50),  # a fact nobody asked for
}
FACTS = {
    'home': tuple('Oslo Cairo Lima Rome Delhi Quito Paris Tunis Seoul Dakar'.split()),
    'music': tuple('cello drums flute harp piano violin guitar trumpet banjo organ'.split()),
    'pet': tuple('parrot goat rabbit pony turtle hamster donkey duck lizard poodle'.split()),
}
SAY = {'home': 'lives in {}', 'music': 'plays the {}', 'pet': 'keeps a {}'}
ASK = {
    'home': 'where does {} live',
    'music': 'which instrument does {} play',
    'pet': 'which animal does {} keep',
}
OPENINGS = ('Here is a note about my friends.', 'Please read this first.', 'Some facts for you.')
THANKS = ('I have read it.', 'Noted. What would you like to know?')
_NOTE = re.compile(r'\b([A-Z][a-z]+) lives in (\w+), plays the (\w+) and keeps a (\w+)\.')
_WHO = {kind: re.compile(question.format('([A-Z][a-z]+)'), re.I) for kind, question in ASK.items()}


class Task(NamedTuple):
    """Who is asked about, which facts are asked for, and the note: name -> kind -> value."""

    name: str
    kinds: tuple[str, ...]
    note: dict[str, dict[str, str]]


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """A note on two people and one or two questions on one of them, in one or two turns."""
    people = rng.sample(style.NAMES, 2)
    values = [rng.sample(options, 2) for options in FACTS.values()]
    note = ' '.join(
        f'{name} lives in {home}, plays the {music} and keeps a {pet}.'
        for name, home, music, pet in zip(people, *values, strict=True)
    )
    kinds = rng.sample(tuple(FACTS), rng.choice((1, 2)))
    name = rng.choice(people)
    question = ' and '.join(ASK[kind].format(name) for kind in kinds)
    note = f'{rng.choice(OPENINGS)} {note}'
    question = f'{question[0].upper()}{question[1:]}?'
    if rng.random() < 0.3:
        return style.user(note, rng.choice(THANKS), question)
    return style.user(f'{note} {question}')


def read(text: str) -> Task | None:
    """The note and the questions that a prompt states."""
    note = {name: dict(zip(FACTS, values, strict=True)) for name, *values in _NOTE.findall(text)}
    asked = {kind: found[1] for kind, who in _WHO.items() if (found := who.search(text))}
    names = set(asked.values())
    if len(note) != 2 or len(names) != 1 or not names <= note.keys():
        return None
    return Task(names.pop(), tuple(asked), note)


def answer(task: Task, rng: random.Random, policy: float, clean: bool) -> str:
    """A candidate: one sentence of facts."""
    flaws = style.flaws(RATES, rng, policy, clean)
    kinds = list(task.kinds)
    if 'omit' in flaws and len(kinds) > 1:
        kinds.remove(rng.choice(kinds))
    told = {kind: task.note[task.name][kind] for kind in kinds}
    (friend,) = (note for name, note in task.note.items() if name != task.name)
    if 'mixup' in flaws:
        kind = rng.choice(kinds)
        told[kind] = friend[kind]
    if 'invent' in flaws:
        kind = rng.choice(kinds)
        told[kind] = style.other(rng, FACTS[kind], friend[kind], task.note[task.name][kind])
    spare = [kind for kind in FACTS if kind not in task.kinds]
    if 'extra' in flaws:
        kind = rng.choice(spare)
        told[kind] = task.note[task.name][kind]
    *most, last = (SAY[kind].format(value) for kind, value in told.items())
    core = f'{", ".join(most)} and {last}' if most else last
    return style.dress(f'{task.name} {core}.', rng, policy, len(flaws))


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: asked facts told right, told at all, and told facts that the note holds."""
    said = set(style.words(response))
    told = {kind: {v for v in values if v.lower() in said} for kind, values in FACTS.items()}
    asked = [kind for kind in task.kinds if told[kind]]
    right = [kind for kind in asked if told[kind] == {task.note[task.name][kind]}]
    known = {value for note in task.note.values() for value in note.values()}
    everything = set().union(*told.values())
    return {
        'correctness': len(right) / len(asked) if asked else 0.0,
        'completeness': len(asked) / len(task.kinds),
        'grounding': len(everything & known) / len(everything) if everything else 0.0,
        'confidence': style.confidence(response),
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }
