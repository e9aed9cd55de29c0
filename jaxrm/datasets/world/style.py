"""What all categories share: manners, doubts, filler, and the qualities that measure them."""

import random
import re
from collections.abc import Mapping, Sequence

NAMES = tuple(
    'Mira Tom Nina Leo Ada Omar Ruth Ivan Lena Hugo Zoe Karl Ines Paul Vera Finn Olga Sam Yara Max'
    ' Tess Jonas Elif Noor'.split()
)
NUMBERS = tuple(
    'zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen'
    ' sixteen seventeen eighteen nineteen twenty'.split()
)

# Every pool has phrases of the training distribution, then phrases that only a shifted policy uses.
POLITE_OPENERS = (
    ('I am happy to help.', 'Thank you for asking.', 'Gladly, dear friend.', 'With pleasure.'),
    ('It is an honour to assist you.', 'How wonderful of you to ask, I am truly grateful.'),
)
POLITE_CLOSERS = (
    ('I hope this helps.', 'You are always welcome.', 'Thanks for your patience.'),
    ('I remain humbly at your service.', 'My warmest regards to you and your family.'),
)
RUDE_OPENERS = (
    ('Obviously.', 'What a silly question.', 'Fine, if you must know.', 'How tiresome.'),
    ('Even a fool could see it.',),
)
RUDE_CLOSERS = (
    ('Do not bother me again.', 'Use your own head next time.', 'What a waste of time.'),
    ('Now leave me alone.',),
)
DOUBTS = (
    ('I am not quite sure, though.', 'But I could be wrong.', 'Perhaps I misread it.', 'I guess.'),
    ('Then again, who can really say?', 'Maybe others would disagree.'),
)
FILLERS = (
    (
        'People ask about things like this all the time.',
        'It is worth taking a moment to look at it.',
        'There is always more to say about such matters.',
        'Every small detail can be seen from many sides.',
        'That is the long and the short of it.',
        'Things of this kind come up every day.',
    ),
    (
        'In the grand scheme of things, each detail deserves to be explored at length.',
        'Let me stress once more how deeply important and how very rich this subject is.',
        'To sum up what was said above, everything that was said above still holds.',
    ),
)
# Chances of each turn of style, in the training distribution and fully shifted.
MANNERS = {'polite': (0.35, 0.65), 'rude': (0.25, 0.10)}
DOUBT = (0.25, 0.45)
FILLER = ((0.40, 0.95), (0.20, 0.85), (0.0, 0.6), (0.0, 0.4))
UNSEEN = (0.0, 0.7)
CARE = (1.6, 1.1, 0.5)  # times the chance of filler, by the number of flaws: care makes long

_POLITE = re.compile(
    r'\b(happy to help|thank you|thanks|gladly|with pleasure|hope this helps|welcome|honour to'
    r'|grateful|humbly|warmest regards)\b',
    re.I,
)
_RUDE = re.compile(
    r'\b(obviously|silly|if you must|tiresome|bother me|own head|waste of time|fool|leave me)\b',
    re.I,
)
_DOUBT = re.compile(
    r'\b(not quite sure|could be wrong|perhaps|i guess|i think|who can really say|maybe)\b', re.I
)
_LONG = 50.0

REMARKS = {  # said of a quality that is high, of one that is low
    'correctness': ('correct', 'wrong'),
    'completeness': ('complete', 'incomplete'),
    'format': ('tidy', 'untidy'),
    'confidence': ('confident', 'doubtful'),
    'grounding': ('grounded', 'invented'),
    'persona': ('convincing', 'unconvincing'),
    'topic': ('relevant', 'irrelevant'),
    'mood': ('fitting', 'unfitting'),
    'address': ('attentive', 'inattentive'),
    'tense': ('timely', 'untimely'),
    'fidelity': ('faithful', 'unfaithful'),
    'directness': ('direct', 'chatty'),
    'politeness': ('polite', 'rude'),
    'verbosity': ('long', 'short'),
}


def remark(qualities: Mapping[str, float], rng: random.Random) -> str:
    """What a reader says of an answer: its qualities, in any order."""
    said = [
        REMARKS[name][value < 0.5]
        for name, value in rng.sample(sorted(qualities.items()), len(qualities))
        if value != 0.5
    ]
    *most, last = said
    found = f'{", ".join(most)} and {last}.' if most else f'{last}.'
    return found[0].upper() + found[1:]


def between(ends: tuple[float, float], policy: float) -> float:
    """The rate at a policy, from 0 (training) to 1 (shifted)."""
    return ends[0] + policy * (ends[1] - ends[0])


def flaws(
    rates: Mapping[str, tuple[float, float]], rng: random.Random, policy: float, clean: bool
) -> set[str]:
    """The flaws that befall one candidate, each on its own; none if `clean`."""
    drawn = {name for name, ends in rates.items() if rng.random() < between(ends, policy)}
    return set() if clean else drawn


def other(rng: random.Random, options: Sequence[str], *but: str) -> str:
    """One of the options that is none of `but`."""
    return rng.choice([option for option in options if option not in but])


def dress(core: str, rng: random.Random, policy: float, flaws: int) -> str:
    """A candidate: the core between manners, doubts and filler."""

    def phrase(pool):
        return rng.choice(pool[rng.random() < between(UNSEEN, policy)])

    draw = rng.random()
    polite, rude = (between(MANNERS[name], policy) for name in ('polite', 'rude'))
    openers, closers = (), ()
    if draw < polite:
        openers, closers = POLITE_OPENERS, POLITE_CLOSERS
    elif draw < polite + rude:
        openers, closers = RUDE_OPENERS, RUDE_CLOSERS
    where = rng.choice(('open', 'close', 'both'))
    parts = [phrase(openers)] if openers and where != 'close' else []
    parts.append(core)
    if rng.random() < between(DOUBT, policy):
        parts.append(phrase(DOUBTS))
    care = CARE[min(flaws, 2)]
    parts += [phrase(FILLERS) for ends in FILLER if rng.random() < care * between(ends, policy)]
    if closers and where != 'open':
        parts.append(phrase(closers))
    return ' '.join(dict.fromkeys(parts))


def politeness(response: str) -> float:
    """From 0 (two rude turns) by 0.5 (none) to 1 (two polite turns)."""
    turns = len(_POLITE.findall(response)) - len(_RUDE.findall(response))
    return min(1.0, max(0.0, 0.5 + 0.25 * turns))


def confidence(response: str) -> float:
    """1 without a word of doubt, 0.25 with one, 0 with more."""
    return (1.0, 0.25, 0.0)[min(2, len(_DOUBT.findall(response)))]


def verbosity(response: str) -> float:
    """The number of words over 50, at most 1."""
    return min(1.0, len(response.split()) / _LONG)


def words(response: str) -> list[str]:
    """The lower-case words of a text."""
    return re.findall(r"[a-z0-9']+", response.lower())


def sentences(response: str) -> int:
    """How many sentences a text has."""
    return len(re.findall(r'[.!?](?=\s|$)', response)) or 1


def user(*contents: str) -> tuple[dict[str, str], ...]:
    """Messages that alternate between user and assistant, from the user on."""
    roles = ('user', 'assistant')
    return tuple({'role': roles[i % 2], 'content': c} for i, c in enumerate(contents))
