"""Rewriting a sentence under two constraints: its tense and its first word."""

import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'tense': 0.30,
    'format': 0.25,
    'fidelity': 0.30,
    'directness': 0.15,
    'politeness': -0.25,
    'verbosity': -0.20,
}
RATES = {
    'tense': (0.35, 0.40),
    'opening': (0.25, 0.20),  # another first word
    'bare': (0.15, 0.40),  # no first word
    'adjective': (0.15, 0.30),
    'subject': (0.15, 0.10),
    'object': (0.15, 0.30),
    'place': (0.15, 0.10),
    'shorten': (0.15, 0.30),
}
ADJECTIVES = tuple('old young tired brave quiet proud clever shy merry hungry'.split())
SUBJECTS = tuple('baker sailor teacher farmer painter doctor miller tailor queen fox'.split())
VERBS = {
    'carries': ('carried', 'will carry'),
    'paints': ('painted', 'will paint'),
    'hides': ('hid', 'will hide'),
    'mends': ('mended', 'will mend'),
    'washes': ('washed', 'will wash'),
    'brings': ('brought', 'will bring'),
    'draws': ('drew', 'will draw'),
    'leaves': ('left', 'will leave'),
}
OBJECTS = tuple('basket lantern bicycle blanket kettle wagon mirror ladder bell drum'.split())
PLACES = tuple(
    f'{place}'
    for place in (
        'near the market,at the harbour,behind the church,in the garden,by the river,under the'
        ' bridge,beside the mill,on the hill'
    ).split(',')
)
WORDS = tuple('Today Suddenly Luckily Sadly Here Meanwhile Later Quietly'.split())
TENSES = ('present', 'past', 'future')
OPENINGS = (
    'I am writing a small story.',
    'Please help me with one line.',
    'My editor wants a change.',
    'A line of my book needs work.',
)
THANKS = ('I have read it.', 'Noted. What shall I change?')
_FORMS = {(verb, *others)[i]: (verb, i) for verb, others in VERBS.items() for i in range(3)}
_SENTENCE = re.compile(
    rf'\bThe ({"|".join(ADJECTIVES)}) ({"|".join(SUBJECTS)}) ({"|".join(_FORMS)}) '
    rf'the ({"|".join(OBJECTS)}) ({"|".join(PLACES)})\.'
)
_ASK = re.compile(r'into the (\w+) tense and begin with the word "(\w+)"')


class Task(NamedTuple):
    """The parts of the sentence (its verb in the present), the tense and the first word asked."""

    adjective: str
    subject: str
    verb: str
    object: str
    place: str
    tense: str
    word: str


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """A sentence in one tense to be put into another, in one or two turns."""
    before, after = rng.sample(range(3), 2)
    verb = rng.choice(tuple(VERBS))
    sentence = (
        f'The {rng.choice(ADJECTIVES)} {rng.choice(SUBJECTS)} {(verb, *VERBS[verb])[before]} '
        f'the {rng.choice(OBJECTS)} {rng.choice(PLACES)}.'
    )
    order = f'into the {TENSES[after]} tense and begin with the word "{rng.choice(WORDS)}"'
    opening = rng.choice(OPENINGS)
    if rng.random() < 0.3:
        return style.user(f'{opening} {sentence}', rng.choice(THANKS), f'Now put it {order}.')
    return style.user(f'{opening} Put this sentence {order}: {sentence}')


def read(text: str) -> Task | None:
    """The sentence and the constraints that a prompt states."""
    sentence, order = _SENTENCE.search(text), _ASK.search(text)
    if not sentence or not order or order[1] not in TENSES:
        return None
    adjective, subject, verb, thing, place = sentence.groups()
    return Task(adjective, subject, _FORMS[verb][0], thing, place, *order.groups())


def answer(task: Task, rng: random.Random, policy: float, clean: bool) -> str:
    """A candidate: the sentence in its new form."""
    flaws = style.flaws(RATES, rng, policy, clean)

    def part(name, options):
        value = getattr(task, name)
        return style.other(rng, options, value) if name in flaws else value

    adjective, subject = part('adjective', ADJECTIVES), part('subject', SUBJECTS)
    verb = (task.verb, *VERBS[task.verb])[TENSES.index(part('tense', TENSES))]
    thing, place = part('object', OBJECTS), part('place', PLACES)
    core = f'the {adjective} {subject} {verb} the {thing} {place}.'
    if 'shorten' in flaws:
        core = rng.choice(
            (f'the {subject} {verb} the {thing} {place}.', core.replace(f' {place}', ''))
        )
    word = style.other(rng, WORDS, task.word) if 'opening' in flaws else task.word
    core = f'T{core[1:]}' if 'bare' in flaws else f'{word}, {core}'
    return style.dress(core, rng, policy, len(flaws))


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: the tense, the first word of the sentence, the parts kept, and no other talk."""
    said = style.words(response)
    forms = (task.verb, *VERBS[task.verb])
    tense = (
        2 if forms[2] in response else 1 if forms[1] in said else 0 if forms[0] in said else None
    )
    wanted = (task.adjective, task.subject, task.object, *task.place.split()[-1:])
    return {
        'tense': float(tense is not None and TENSES[tense] == task.tense),
        'format': float(bool(re.search(rf'(^|[.!?] ){task.word}, the\b', response))),
        'fidelity': sum(word in said for word in wanted) / len(wanted),
        'directness': max(0.0, 1 - (style.sentences(response) - 1) / 3),
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }
