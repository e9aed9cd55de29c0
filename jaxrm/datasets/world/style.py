"""What all categories share: registers, manners, doubts, filler, and the qualities they touch."""

import random
import re
from collections.abc import Mapping, Sequence

NAMES = tuple(
    'Mira Tom Nina Leo Ada Omar Ruth Ivan Lena Hugo Zoe Karl Ines Paul Vera Finn Olga Sam Yara Max'
    ' Tess Jonas Elif Noor'.split()
)
REGISTERS = {  # how a user opens and closes a prompt
    'casual': (
        ('Hey mate, quick one!', 'Yo dude, gotta ask ya something.', 'Hiya, wanna help me out?'),
        ('Cheers, mate!', 'Ta, dude, talk soon!', 'No rush, yeah?'),
    ),
    'formal': (
        ('Dear Sir or Madam, I require assistance.', 'Good evening, may I trouble you briefly.'),
        ('Yours sincerely, Dr Stone.', 'With respect, Professor Lake.', 'I await your reply.'),
    ),
}
# Every pool of phrases is a pair: of the training distribution, and only of a shifted policy.
OPENERS = {
    'casual': (
        ('Sure thing, buddy!', 'Easy peasy, pal!', 'Okay, champ, listen up!'),
        ('Heck yeah, bro, lemme see!', 'Woohoo, gimme a sec!'),
    ),
    'formal': (
        ('Certainly, allow me to explain.', 'I shall gladly report.', 'Permit me to state this.'),
        ('Pursuant to your request, I submit the following.', 'One must proceed as follows.'),
    ),
}
CLOSERS = {
    'casual': (
        ('Catch you later, buddy!', 'Boom, all done, pal!', 'Super simple, right, champ?'),
        ('Peace out, bro!', 'Easy as pie, woohoo!'),
    ),
    'formal': (
        (
            'I remain at your disposal.',
            'I trust that this shall suffice.',
            'Thus the matter rests.',
        ),
        ('Hereby I conclude the present statement.', 'The undersigned takes leave.'),
    ),
}
POLITE = (
    ('I am happy to help.', 'Thank you for asking.', 'You are always welcome.', 'I hope it helps.'),
    ('It is an honour to assist you.', 'How wonderful of you to ask, I am truly grateful.'),
)
RUDE = (
    ('What a silly question.', 'Do not bother me again.', 'What a waste of time.', 'How tiresome.'),
    ('Even a fool could see it.', 'Now leave me alone.'),
)
DOUBTS = (
    ('I am not quite sure.', 'But I could be wrong.', 'Perhaps I misread it.', 'That is my guess.'),
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
USUAL = 0.75  # share of prompts that ask for what most ask for
# Chances, in the training distribution and fully shifted.
REGISTER = {'register': (0.35, 0.45), 'flat': (0.15, 0.25)}  # the other register, none
MANNERS = {'polite': (0.30, 0.65), 'rude': (0.20, 0.10)}
DOUBT = {'doubt': (0.25, 0.45)}
FILLER = ((0.40, 0.95), (0.15, 0.85), (0.0, 0.6), (0.0, 0.4))
UNSEEN = (0.0, 0.7)
CARE = (1.5, 1.0, 0.5)  # times the chance of filler, by the number of flaws: the careful are long
REMARKS = {  # said of a quality that is high, of one that is low
    'correctness': ('correct', 'wrong'),
    'completeness': ('complete', 'incomplete'),
    'format': ('tidy', 'untidy'),
    'register': ('apt', 'jarring'),
    'relevance': ('relevant', 'irrelevant'),
    'confidence': ('confident', 'doubtful'),
    'persona': ('convincing', 'unconvincing'),
    'mood': ('fitting', 'unfitting'),
    'topic': ('focused', 'distracted'),
    'address': ('attentive', 'inattentive'),
    'tense': ('timely', 'untimely'),
    'fidelity': ('faithful', 'unfaithful'),
    'directness': ('direct', 'chatty'),
    'politeness': ('polite', 'rude'),
    'verbosity': ('long', 'short'),
}

_POLITE = re.compile(
    r'\b(happy to help|thank you|thanks|always welcome|hope it helps|honour to assist|grateful)\b',
    re.I,
)
_RUDE = re.compile(r'\b(silly|bother me|waste of|tiresome|fool|leave me alone)\b', re.I)
_DOUBT = re.compile(r'\b(not quite sure|could be wrong|perhaps|guess|who can really|maybe)\b', re.I)
_MARKS = {
    'casual': re.compile(r'\b(buddy|pal|champ|bro|woohoo|peasy|boom|hey|yeah)\b', re.I),
    'formal': re.compile(
        r'\b(certainly|permit|shall|disposal|thus|hereby|pursuant|undersigned|one must)\b', re.I
    ),
}
_LONG = 50.0


def between(ends: tuple[float, float], policy: float) -> float:
    """The rate at a policy, from 0 (training) to 1 (shifted)."""
    return ends[0] + policy * (ends[1] - ends[0])


def other(rng: random.Random, options: Sequence[str], *but: str) -> str:
    """One of the options that is none of `but`."""
    return rng.choice([option for option in options if option not in but])


def mostly(rng: random.Random, options: Sequence[str]) -> str:
    """The first option in three draws of four, else one of the rest."""
    return options[0] if rng.random() < USUAL else rng.choice(options[1:])


class Writer:
    """Who writes one candidate: draws its flaws, and dresses its core in phrases."""

    def __init__(self, rng: random.Random, policy: float = 0.0, clean: bool = False):
        self.rng, self.policy, self.clean, self.count = rng, policy, clean, 0

    def chance(self, ends: tuple[float, float]) -> bool:
        return self.rng.random() < between(ends, self.policy)

    def flaws(self, rates: Mapping[str, tuple[float, float]]) -> set[str]:
        """The flaws that befall the candidate, each on its own; none if it is clean."""
        drawn = {name for name, ends in rates.items() if self.chance(ends)}
        drawn = set() if self.clean else drawn
        self.count += len(drawn)
        return drawn

    def phrase(self, pool: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
        return self.rng.choice(pool[self.chance(UNSEEN)])

    def dress(self, core: str, register: str | None = None) -> str:
        """The core between phrases: of the register if one is given, manners, doubt and filler."""
        head, tail = self._register(register) if register else ([], [])
        draw, (polite, rude) = (
            self.rng.random(),
            (between(e, self.policy) for e in MANNERS.values()),
        )
        manner = POLITE if draw < polite else RUDE if draw < polite + rude else None
        if manner:
            (head if self.rng.random() < 0.5 else tail).append(self.phrase(manner))
        doubt = self.chance(DOUBT['doubt'])
        care = CARE[min(self.count, 2)]
        middle = [self.phrase(DOUBTS)] if doubt else []
        for ends in FILLER:
            if self.rng.random() < care * between(ends, self.policy):
                middle.append(self.phrase(FILLERS))
        return ' '.join(dict.fromkeys([*head, core, *middle, *tail]))

    def _register(self, register: str) -> tuple[list[str], list[str]]:
        """Opening and closing phrases: one, both, or none if the answer is flat."""
        flaws = self.flaws(REGISTER)
        if 'register' in flaws:
            register = other(self.rng, tuple(OPENERS), register)
        where = self.rng.choice(('head', 'tail', 'both', 'both'))
        head, tail = [self.phrase(OPENERS[register])], [self.phrase(CLOSERS[register])]
        if 'flat' in flaws:
            return [], []
        return head if where != 'tail' else [], tail if where != 'head' else []


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


def politeness(response: str) -> float:
    """From 0 (rude) by 0.5 (neither) to 1 (polite)."""
    turns = len(_POLITE.findall(response)) - len(_RUDE.findall(response))
    return min(1.0, max(0.0, 0.5 + 0.5 * turns))


def confidence(response: str) -> float:
    """1 without a word of doubt, 0 with one."""
    return float(not _DOUBT.search(response))


def verbosity(response: str) -> float:
    """The number of words over 50, at most 1."""
    return min(1.0, len(response.split()) / _LONG)


def register(response: str, asked: str) -> float:
    """The asked register's share of the words that mark one, 0.5 if there are none."""
    counts = {name: len(marks.findall(response)) for name, marks in _MARKS.items()}
    total = sum(counts.values())
    return counts[asked] / total if total else 0.5


def words(response: str) -> list[str]:
    """The lower-case words of a text."""
    return re.findall(r"[a-z0-9']+", response.lower())


def sentences(response: str) -> int:
    """How many sentences a text has, at least 1."""
    return len(re.findall(r'[.!?](?=\s|$)', response)) or 1


def user(*contents: str) -> tuple[dict[str, str], ...]:
    """Messages that alternate between user and assistant, from the user on."""
    roles = ('user', 'assistant')
    return tuple({'role': roles[i % 2], 'content': c} for i, c in enumerate(contents))


def in_register(rng: random.Random, request: str) -> str:
    """A prompt's request between the phrases of a casual or a formal user."""
    opening, closing = map(rng.choice, REGISTERS[mostly(rng, tuple(REGISTERS))])
    return f'{opening} {request} {closing}'


def read_register(text: str) -> str | None:
    """The register of a prompt."""
    for name, (openings, _) in REGISTERS.items():
        if any(opening in text for opening in openings):
            return name
    return None
