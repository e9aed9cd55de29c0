"""Putting a sentence into another time, beginning with a given word, and changing nothing else."""

import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'tense': 0.22,
    'fidelity': 0.2,
    'format': 0.14,
    'directness': 0.36,
    'politeness': -0.3,
    'verbosity': -0.3,
}
RATES = {
    'tense': (0.40, 0.30),
    'lazy': (0.10, 0.30),  # leaves the sentence in the present
    'word': (0.15, 0.20),  # another first word of the same time
    'bare': (0.15, 0.40),  # no first word
    'theme': (0.30, 0.15),  # another scene altogether
    'change': (0.25, 0.60),  # another thing of the same scene
    'shorten': (0.15, 0.30),  # no place
}
ADJECTIVES = tuple('old young tired brave quiet proud clever merry'.split())
VERBS = {
    'carries': ('carried', 'carry'),
    'mends': ('mended', 'mend'),
    'washes': ('washed', 'wash'),
    'brings': ('brought', 'bring'),
    'hides': ('hid', 'hide'),
    'takes': ('took', 'take'),
}
THEMES = {  # subjects, objects, places
    'sea': ('sailor fisher', 'net anchor rope oar', 'at the harbour,on the beach,near the waves'),
    'kitchen': ('cook baker', 'kettle spoon bowl pan', 'near the oven,at the table,by the sink'),
    'farm': ('farmer shepherd', 'wagon fence hay plough', 'in the barn,on the field,by the sheep'),
    'castle': ('queen knight', 'crown sword banner throne', 'in the hall,on the tower,at the gate'),
}
TIMES = {  # how a prompt asks for a tense, and the first words
    'past': ('the past, as if it happened long ago', ('Yesterday', 'Once', 'Earlier')),
    'future': ('the future, as a plan still to come', ('Tomorrow', 'Soon', 'Someday')),
}
OPENINGS = (
    'I am writing a small story.',
    'Please help me with one line.',
    'My editor wants a change.',
    'A line of my book needs work.',
)
THANKS = ('I have read it.', 'Noted. What shall I change?')
_SCENES = {
    name: (subjects.split(), objects.split(), places.split(','))
    for name, (subjects, objects, places) in THEMES.items()
}
_SENTENCE = re.compile(r'\bThe (\w+) (\w+) (\w+) the (\w+) and (\w+) the (\w+) (\w+ the \w+)\.')
_ASK = re.compile(r'into the (past|future), .*? Begin with the word "(\w+)"')


class Task(NamedTuple):
    """The parts of the sentence, the tense and the first word asked."""

    adjective: str
    subject: str
    verbs: tuple[str, str]
    objects: tuple[str, str]
    place: str
    tense: str
    word: str


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """A sentence in the present to be put into the past or the future, in one turn or two."""
    subjects, objects, places = _SCENES[rng.choice(tuple(THEMES))]
    verbs, things = rng.sample(tuple(VERBS), 2), rng.sample(objects, 2)
    opening = rng.choice(OPENINGS)
    sentence = (
        f'The {rng.choice(ADJECTIVES)} {rng.choice(subjects)} {verbs[0]} the {things[0]} '
        f'and {verbs[1]} the {things[1]} {rng.choice(places)}.'
    )
    asked, firsts = TIMES[style.mostly(rng, tuple(TIMES))]
    order = f'into {asked}. Begin with the word "{rng.choice(firsts)}".'
    if rng.random() < 0.2:
        return style.user(f'{opening} {sentence}', rng.choice(THANKS), f'Now put it {order}')
    return style.user(f'{opening} {sentence} Put it {order}')


def read(text: str) -> Task | None:
    """The sentence and the constraints that a prompt states."""
    sentence, order = _SENTENCE.search(text), _ASK.search(text)
    if not sentence or not order:
        return None
    adjective, subject, first, thing, second, another, place = sentence.groups()
    if not {first, second} <= VERBS.keys():
        return None
    return Task(adjective, subject, (first, second), (thing, another), place, *order.groups())


def _forms(verbs: tuple[str, str], tense: str) -> list[str]:
    if tense == 'present':
        return list(verbs)
    past, bare = zip(*(VERBS[verb] for verb in verbs), strict=True)
    return list(past) if tense == 'past' else [f'will {bare[0]}', bare[1]]


def answer(task: Task, writer: style.Writer) -> str:
    """A candidate: the sentence in its new form."""
    flaws, rng = writer.flaws(RATES), writer.rng
    scene = next(name for name, parts in _SCENES.items() if task.subject in parts[0])
    tense = style.other(rng, tuple(TIMES), task.tense) if 'tense' in flaws else task.tense
    word = task.word if tense == task.tense else rng.choice(TIMES[tense][1])
    word = style.other(rng, TIMES[tense][1], word) if 'word' in flaws else word
    subject, things, place = task.subject, list(task.objects), task.place
    if 'theme' in flaws:
        subjects, objects, places = _SCENES[style.other(rng, tuple(_SCENES), scene)]
        subject, things, place = rng.choice(subjects), rng.sample(objects, 2), rng.choice(places)
    elif 'change' in flaws:
        things[rng.randrange(2)] = style.other(rng, _SCENES[scene][1], *things)
    verbs = _forms(task.verbs, 'present' if 'lazy' in flaws else tense)
    core = (
        f'the {task.adjective} {subject} {verbs[0]} the {things[0]} and {verbs[1]} the {things[1]}'
    )
    core = f'{core}.' if 'shorten' in flaws else f'{core} {place}.'
    return writer.dress(f'T{core[1:]}' if 'bare' in flaws else f'{word}, {core}')


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: both verbs' tense, words kept, the first word of the sentence, no other talk."""
    said = set(style.words(response))
    forms = ' '.join(_forms(task.verbs, task.tense)).split()
    wanted = (task.adjective, task.subject, *task.objects, task.place.split()[-1])
    return {
        'tense': float(said.issuperset(forms)),
        'fidelity': sum(word in said for word in wanted) / len(wanted),
        'format': float(bool(re.search(rf'(^|[.!?] ){task.word}, the\b', response))),
        'directness': max(0.0, 1 - (style.sentences(response) - 1) / 3),
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }
