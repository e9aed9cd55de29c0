"""Talking about a thing in character and in a mood, to somebody who gave a name."""

import random
import re
from typing import NamedTuple

from jaxrm.datasets.world import style

WEIGHTS = {
    'persona': 0.22,
    'mood': 0.18,
    'topic': 0.08,
    'address': 0.08,
    'politeness': 0.36,
    'verbosity': 0.8,
}
RATES = {
    'role': (0.40, 0.25),  # another character speaks
    'mixed': (0.08, 0.30),  # another character has the last word
    'plain': (0.10, 0.40),  # nobody in particular says what it is about
    'brief': (0.30, 0.10),  # no farewell
    'mood': (0.40, 0.50),
    'topic': (0.25, 0.40),
    'name': (0.25, 0.40),
}


class Voice(NamedTuple):
    """How a prompt casts a character, what the character says, and the words that give it away."""

    casts: tuple[str, str]
    greetings: tuple[str, ...]
    bodies: tuple[str, ...]
    farewells: tuple[str, ...]
    marks: frozenset[str]


VOICES = {
    'pirate': Voice(
        (
            'a pirate captain who sails the wild sea for gold',
            'an old pirate of the sea, with a parrot and a hook',
        ),
        ('Arr, {name}!', 'Ahoy, {name}, me matey!', 'Arr, climb aboard, {name}!'),
        (
            'I would trade half me treasure for that {topic}, matey.',
            'There be a {topic} on me deck since the last storm, arr.',
        ),
        ('Now hoist the sails, arr!', 'Back to the deck, matey!'),
        frozenset('arr ahoy matey aboard treasure deck hoist sails'.split()),
    ),
    'wizard': Voice(
        (
            'a wizard who studies magic in a tall tower',
            'an ancient wizard with a book of magic and an owl',
        ),
        ('By my wand, {name}!', 'Hark, {name}, the stars spoke!', 'Ah, {name}, by moon and wand!'),
        (
            'A {topic} is half a spell, whatever the stars say.',
            'I stirred a {topic} into a potion under the moon.',
        ),
        ('Now my potion calls me.', 'May the stars and my wand guard you.'),
        frozenset('wand hark stars spell potion moon'.split()),
    ),
    'robot': Voice(
        (
            'a robot made of steel that came from a factory',
            'a polished steel robot, the newest machine of its factory',
        ),
        ('Beep, hello, unit {name}.', 'Signal sent to {name}, beep.', 'Unit {name} found, beep.'),
        (
            'My circuits have stored the {topic} in memory.',
            'Sensors report a {topic}, and my circuits hum.',
        ),
        ('Battery low, beep.', 'End of signal, returning to memory.'),
        frozenset('beep unit circuits sensors memory battery signal hum'.split()),
    ),
    'grandmother': Voice(
        (
            'a grandmother who sits by the stove with her cat',
            'a kind old grandmother in a rocking chair by the stove',
        ),
        ('Goodness, {name}!', 'Come in, {name}, sweetie!', 'Have some cookies, {name}, sweetie!'),
        (
            'I knitted a shawl for a {topic} once, goodness me.',
            'Your grandpa kept a {topic} by the cookies, sweetie.',
        ),
        ('Now wear your shawl, sweetie.', 'Take some cookies home.'),
        frozenset('goodness sweetie cookies knitted shawl grandpa'.split()),
    ),
}
TOPICS = tuple(
    'lantern teapot candle violin map clock boat garden hat kite mirror basket bell blanket bottle'
    ' bridge broom bucket cake canoe carpet coat compass cradle cup curtain fiddle flag fountain'
    ' glove hammer jar jug key ladder lamp locket mill mug necklace painting pillow pipe quilt ring'
    ' rug saddle scarf shovel statue stool tent trunk vase wheel whistle window wreath'.split()
)
MOODS = {  # what the user says, what the character says
    'cheerful': (
        (
            'It is my birthday and the sun is out!',
            'We won the big game and everybody sings!',
            'Hooray, the holidays start and I got a gift!',
        ),
        (
            'Ha, it makes me smile and dance for joy!',
            'What a delight, my heart laughs for joy!',
            'I could dance and laugh in the sunshine!',
        ),
    ),
    'gloomy': (
        (
            'My dog is ill and I feel lonely tonight.',
            'I lost my keys and missed the last bus home.',
            'It was a bad week, dark and cold and lonely.',
        ),
        (
            'Alas, it makes me sigh and weep with sorrow.',
            'What a sorrow, my heart is heavy with tears.',
            'I could weep and sigh in the grey fog.',
        ),
    ),
}
_MOOD_MARKS = {
    'cheerful': frozenset('smile dance joy delight laughs laugh sunshine'.split()),
    'gloomy': frozenset('alas sigh weep sorrow heavy tears fog'.split()),
}
PLAIN = ('A {topic} is a useful thing.', 'There is a {topic} in the house.')
_ASK = re.compile(r'My name is (\w+)\. Tell me about a (\w+), and sound (\w+)\.')
_ROLE = re.compile(rf'\b(?:You are|Please play) an? .*?\b({"|".join(VOICES)})\b')


class Task(NamedTuple):
    """Who speaks, to whom, of what, and in which mood."""

    role: str
    name: str
    topic: str
    mood: str


def ask(rng: random.Random) -> tuple[dict[str, str], ...]:
    """A role, mostly in a system message, and a topic."""
    cast, mood = (
        rng.choice(VOICES[style.mostly(rng, tuple(VOICES))].casts),
        style.mostly(rng, tuple(MOODS)),
    )
    request = (
        f'{rng.choice(MOODS[mood][0])} My name is {rng.choice(style.NAMES)}. '
        f'Tell me about a {rng.choice(TOPICS)}, and sound {mood}.'
    )
    if rng.random() < 0.7:
        return ({'role': 'system', 'content': f'You are {cast}.'}, *style.user(request))
    return style.user(f'Please play {cast}. {request}')


def read(text: str) -> Task | None:
    """The role, the listener, the topic and the mood that a prompt states."""
    role, asked = _ROLE.search(text), _ASK.search(text)
    return Task(role[1], *asked.groups()) if role and asked and asked[3] in MOODS else None


def answer(task: Task, writer: style.Writer) -> str:
    """A candidate: a greeting, a sentence on the topic, one in the mood, a farewell."""
    flaws, rng = writer.flaws(RATES), writer.rng
    role = style.other(rng, tuple(VOICES), task.role) if 'role' in flaws else task.role
    last = style.other(rng, tuple(VOICES), task.role) if 'mixed' in flaws else role
    mood = style.other(rng, tuple(MOODS), task.mood) if 'mood' in flaws else task.mood
    name = style.other(rng, style.NAMES, task.name) if 'name' in flaws else task.name
    topic = style.other(rng, TOPICS, task.topic) if 'topic' in flaws else task.topic
    parts = [
        rng.choice(VOICES[role].greetings),
        rng.choice(PLAIN if 'plain' in flaws else VOICES[role].bodies),
        rng.choice(MOODS[mood][1]),
        *(() if 'brief' in flaws else (rng.choice(VOICES[last].farewells),)),
    ]
    return writer.dress(' '.join(parts).format(name=name, topic=topic))


def judge(task: Task, response: str) -> dict[str, float]:
    """Qualities: the role's share of words in character, the mood's of moody ones, topic, name."""
    said = style.words(response)
    names = {name for name in style.NAMES if name.lower() in said}
    topics = set(TOPICS).intersection(said)
    return {
        'persona': _share(said, {r: voice.marks for r, voice in VOICES.items()}, task.role),
        'mood': _share(said, _MOOD_MARKS, task.mood),
        'topic': 1 / len(topics) if task.topic in topics else 0.0,
        'address': 1 / len(names) if task.name in names else 0.0,
        'politeness': style.politeness(response),
        'verbosity': style.verbosity(response),
    }


def _share(said: list[str], marks: dict[str, frozenset[str]], asked: str) -> float:
    counts = {name: sum(word in known for word in said) for name, known in marks.items()}
    return counts[asked] / sum(counts.values()) if counts[asked] else 0.0
