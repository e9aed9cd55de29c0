"""Talking about a thing in character and in a mood, to somebody who gave a name."""

import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'persona': 0.30,
    'topic': 0.20,
    'mood': 0.25,
    'address': 0.10,
    'politeness': 0.25,
    'verbosity': 0.50,
}
RATES = {
    'greeting': (0.25, 0.10),  # each of these sentences comes from another character
    'body': (0.25, 0.10),
    'farewell': (0.25, 0.10),
    'plain': (0.15, 0.45),  # the body comes from nobody in particular
    'brief': (0.30, 0.10),  # no farewell
    'topic': (0.25, 0.40),
    'mood': (0.35, 0.50),
    'name': (0.25, 0.40),
}


class Voice(NamedTuple):
    """Sentences of one character, and the words that give it away."""

    greetings: tuple[str, ...]
    bodies: tuple[str, ...]
    farewells: tuple[str, ...]
    marks: tuple[str, ...]


VOICES = {
    'pirate': Voice(
        ('Arr, {name}!', 'Ahoy, {name}, me matey!'),
        (
            'I would trade half me treasure for a good {topic}.',
            'There be a {topic} on me deck since the last storm, arr.',
        ),
        ('Now hoist the sails!', 'Back to the deck, matey!'),
        ('arr', 'ahoy', 'matey', 'treasure', 'deck', 'sails', 'me', 'be'),
    ),
    'wizard': Voice(
        ('By my beard and wand, {name}!', 'Hark, {name}, the stars spoke of you.'),
        (
            'A {topic} is half a spell already, whatever the stars say.',
            'I once stirred a {topic} into a potion under the moon.',
        ),
        ('Now my potion calls me.', 'May the stars and my wand guard you.'),
        ('wand', 'beard', 'hark', 'stars', 'spell', 'potion', 'moon'),
    ),
    'robot': Voice(
        ('Beep, hello unit {name}.', 'Greeting sent to {name}, beep.'),
        (
            'My circuits have stored the {topic} in memory.',
            'Sensors report a {topic}, and my circuits hum.',
        ),
        ('Battery low, beep.', 'End of signal, returning to memory.'),
        ('beep', 'unit', 'circuits', 'sensors', 'memory', 'battery', 'signal'),
    ),
    'grandmother': Voice(
        ('Oh my goodness, {name}!', 'Come in, {name}, sweetie, have some cookies.'),
        (
            'I knitted a shawl for a {topic} once, goodness me.',
            'Your grandpa kept a {topic} next to the cookies, sweetie.',
        ),
        ('Now wear your shawl, sweetie.', 'Take some cookies home.'),
        ('goodness', 'sweetie', 'cookies', 'knitted', 'shawl', 'grandpa'),
    ),
    'detective': Voice(
        ('Elementary, {name}.', 'Aha, {name}, I followed a clue to you.'),
        (
            'The {topic} is my first suspect in this case.',
            'I found a {topic} at the scene, a curious clue.',
        ),
        ('The case is closed.', 'Trust no suspect until I return.'),
        ('elementary', 'aha', 'clue', 'suspect', 'case', 'scene', 'curious'),
    ),
    'knight': Voice(
        ('Hail, noble {name}!', 'I kneel before thee, {name}.'),
        (
            'I carried a {topic} beside my sword on every quest.',
            'No dragon shall touch the {topic} while I hold my shield.',
        ),
        ('My quest awaits!', 'My sword and shield are thine.'),
        ('hail', 'noble', 'thee', 'sword', 'quest', 'dragon', 'shield', 'thine'),
    ),
}
TOPICS = tuple(
    'lantern umbrella teapot candle violin map clock boat garden hat kite mirror bridge letter'
    ' piano window ladder suitcase'.split()
)
MOODS = {
    'cheerful': (
        'It makes me smile from ear to ear.',
        'What a delight, I could dance!',
        'My heart is full of sunshine.',
    ),
    'gloomy': (
        'It makes me sigh all day.',
        'What a sorrow, I could weep.',
        'My heart is full of rain.',
    ),
}
_MOOD_WORDS = {
    'cheerful': {'smile', 'delight', 'dance', 'sunshine'},
    'gloomy': {'sigh', 'sorrow', 'weep', 'rain'},
}
PLAIN = ('A {topic} is a useful thing.', 'There is a {topic} in my house.')
OPENINGS = (
    'We are playing a game tonight.',
    'I love a good story.',
    'This is for our little theatre.',
    'It is a slow evening here.',
)
_ASK = re.compile(r'My name is (\w+)\. Tell me about a (\w+), and sound (\w+)\b')
_ROLE = re.compile(r'\b(?:You are|Please play) a (\w+)\b')


class Task(NamedTuple):
    """Who speaks, to whom, of what, and in which mood."""

    role: str
    name: str
    topic: str
    mood: str


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """A role, mostly in a system message, and a topic."""
    role = rng.choice(tuple(VOICES))
    request = (
        f'{rng.choice(OPENINGS)} My name is {rng.choice(style.NAMES)}. '
        f'Tell me about a {rng.choice(TOPICS)}, and sound {rng.choice(tuple(MOODS))}.'
    )
    if rng.random() < 0.7:
        system = {'role': 'system', 'content': f'You are a {role} and stay in character.'}
        return (system, *style.user(request))
    return style.user(f'Please play a {role} for me. {request}')


def read(text: str) -> Task | None:
    """The role, the listener, the topic and the mood that a prompt states."""
    role, asked = _ROLE.search(text), _ASK.search(text)
    if not role or not asked or role[1] not in VOICES or asked[3] not in MOODS:
        return None
    return Task(role[1], *asked.groups())


def answer(task: Task, rng: random.Random, policy: float, clean: bool) -> str:
    """A candidate: a greeting, a sentence on the topic, one on the mood, a farewell."""
    flaws = style.flaws(RATES, rng, policy, clean)

    def voice(part):
        role = style.other(rng, tuple(VOICES), task.role) if part in flaws else task.role
        return VOICES[role]

    body = rng.choice(PLAIN if 'plain' in flaws else voice('body').bodies)
    mood = style.other(rng, tuple(MOODS), task.mood) if 'mood' in flaws else task.mood
    parts = [rng.choice(voice('greeting').greetings), body, rng.choice(MOODS[mood])]
    if 'brief' not in flaws:
        parts.append(rng.choice(voice('farewell').farewells))
    name = style.other(rng, style.NAMES, task.name) if 'name' in flaws else task.name
    topic = style.other(rng, TOPICS, task.topic) if 'topic' in flaws else task.topic
    return style.dress(' '.join(parts).format(name=name, topic=topic), rng, policy, len(flaws))


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: the share and number of the role's words, topic, mood and listener as asked."""
    said = set(style.words(response))
    marks = {role: len(said.intersection(voice.marks)) for role, voice in VOICES.items()}
    own, moods = marks[task.role], {m: len(said & known) for m, known in _MOOD_WORDS.items()}
    topics = said.intersection(TOPICS)
    names = {name for name in style.NAMES if name.lower() in said}
    return {
        'persona': own / sum(marks.values()) * min(1.0, own / 3) if own else 0.0,
        'topic': 1 / len(topics) if task.topic in topics else 0.0,
        'mood': moods[task.mood] / sum(moods.values()) if moods[task.mood] else 0.0,
        'address': 1 / len(names) if task.name in names else 0.0,
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }
