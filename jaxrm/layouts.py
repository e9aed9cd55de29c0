"""Layouts of preference rows: which columns they have, and a small reader for each.

`LAYOUTS` is the whole list; another layout is one more entry. In files a smaller rank is better
and only the order counts; of ratings larger is better, and null, NaN and -100 are missing.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from jaxrm import annotations, records
from jaxrm.files import DataError, Row, kind
from jaxrm.records import Answer, Ids, Message, Prompt, Read, fail

Kind = Literal['pair', 'answer', 'candidates']
Reader = Callable[[Row, str, bool], Read]  # of (row, place, chat)


class Layout(NamedTuple):
    """Columns that a row must have to be read so, may have, and must not have.

    The `optional` ones are in all rows or in none, the `free` ones in any. Beside the `told` ones
    the layout is read only if it was named.
    """

    name: str
    kind: Kind  # of record it gives: a pair, one answer, or several candidates
    read: Reader
    required: frozenset[str]
    optional: frozenset[str]
    free: frozenset[str]
    refused: frozenset[str]
    told: frozenset[str]

    @property
    def columns(self) -> frozenset[str]:
        return self.required | self.optional | self.free


# Readers.


def _explicit(row: Row, where: str, chat: bool) -> Read:
    prompt, read_prompt = records.prompt(row['prompt'], where, chat)
    chosen, read_chosen = records.answer(row['chosen'], where, 'chosen', prompt)
    rejected, read_rejected = records.answer(row['rejected'], where, 'rejected', prompt)
    if read_chosen != read_rejected:
        fail(where, 'rejected', read_rejected, f'{read_chosen}, like chosen')
    how = f'prompt ({read_prompt}), chosen/rejected ({read_chosen})'
    return records.pair(row, where, prompt, (chosen, rejected), how, worse='rejected')


def _implicit(row: Row, where: str, chat: bool) -> Read:
    """The prompt is the shared beginning: whole turns of messages, characters of strings."""
    sides = row['chosen'], row['rejected']
    if not all(isinstance(side, str) for side in sides):
        return _conversations('chosen', 'rejected')(row, where, chat)
    if chat:
        fail(where, 'chosen', 'a string', 'messages: no turns to wrap without a prompt')
    cut = _shared_characters(*sides)
    if 'prompt' in row and row['prompt'] is None:
        fail(where, 'prompt', 'null', 'a prompt, or no such column')
    if not cut:
        fail(where, 'rejected', 'no beginning shared with chosen', 'a shared prompt')
    row = {**row, 'prompt': sides[0][:cut], 'chosen': sides[0][cut:], 'rejected': sides[1][cut:]}
    return _explicit(row, where, chat)._replace(how=_shared('chosen/rejected text'))


def _shared(what: str) -> str:
    return f'prompt (shared beginning of {what})'


def _conversations(better: str, worse: str) -> Reader:
    """Of two conversations with the same prompt."""

    def read(row: Row, where: str, chat: bool) -> Read:
        a, b = (records.messages(row[side], where, side) for side in (better, worse))
        cut = _shared_turns(a, b)
        if not cut:
            fail(where, worse, f'no prompt shared with {better}', 'answers to the same prompt')
        prompt, _ = records.prompt(list(a[:cut]), where, chat, better)
        sides = [
            records.answer(list(x[cut:]), where, side, prompt)[0]
            for x, side in ((a, better), (b, worse))
        ]
        how = _shared(f'{better}/{worse} messages')
        return records.pair(row, where, prompt, sides, how, worse=worse)

    return read


def _shared_characters(a: str, b: str) -> int:
    """Length of the shared beginning; each keeps a character, and a space goes to the answers."""
    cut = _shared_length(a, b)
    return cut - 1 if cut > 0 and a[cut - 1] == ' ' else cut


def _shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the shared beginning, after which each keeps something."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), max(shortest - 1, 0))


def _shared_turns(a: Sequence[Message], b: Sequence[Message]) -> int:
    """How many turns the prompt has: what follows it is an assistant turn on both sides."""
    cut = _shared_length(a, b)
    while cut > 0 and not a[cut]['role'] == b[cut]['role'] == 'assistant':
        cut -= 1
    return cut


def _rendered(row: Row, where: str, chat: bool) -> Read:
    """Two texts that a chat template wrote."""
    sides = [records.text(row[c], where, c) for c in ('text_chosen', 'text_rejected')]
    if chat:
        fail(where, 'text_chosen', 'a rendered text', 'messages or a prompt, to make turns of')
    cut = _shared_characters(*sides)
    if not cut:
        fail(where, 'text_rejected', 'no beginning shared with text_chosen', 'a shared prompt')
    answers = [side[cut:] for side in sides]
    how = f'{_shared("text_chosen/text_rejected")}, rendered already, nothing added'
    read = records.pair(row, where, sides[0][:cut], answers, how, worse='text_rejected')
    return read._replace(record=read.record._replace(rendered=True))


def _token_ids(infix: str) -> Reader:
    """Of two whole rows of token ids; columns are named chosen + `infix`."""

    def read(row: Row, where: str, chat: bool) -> Read:
        columns = [f'{side}{infix}' for side in ('chosen', 'rejected')]
        a, b = (records.token_ids(row[column], where, column) for column in columns)
        for side, ids in (('chosen', a), ('rejected', b)):
            _check_mask(row.get(f'{side}_attention_mask'), where, f'{side}_attention_mask', ids)
        cut = _shared_length(a, b)
        if not cut:
            fail(where, columns[1], f'no beginning shared with {columns[0]}', 'a shared prompt')
        how = f'{_shared("/".join(columns))}, token ids as they are'
        prompt, sides = Ids(a[:cut]), (Ids(a[cut:]), Ids(b[cut:]))
        return records.pair(row, where, prompt, sides, how, worse=columns[1])

    return read


def _check_mask(mask: Any, where: str, column: str, ids: Ids) -> None:
    if mask is not None and (not isinstance(mask, list) or mask != [1] * len(ids)):
        fail(where, column, 'something else', f'{len(ids)} ones, one for each id: cut padding off')


def _several(row: Row, where: str, chat: bool) -> Read:
    prompt, read_prompt = records.prompt(row['prompt'], where, chat)
    given = records.listed(row['completions'], where, 'completions')
    read = [records.answer(a, where, f'completions[{i}]', prompt) for i, a in enumerate(given)]
    return records.several(row, where, prompt, read, f'prompt ({read_prompt}), completions')


def _ranked(row: Row, where: str, chat: bool) -> Read:
    """NeMo: completions are objects with a rank each."""
    prompt, read_prompt = records.prompt(row['context'], where, chat, 'context')
    given = _objects(row, where, ('rank', 'completion'))
    read = [
        records.answer(x['completion'], where, f'completions[{i}].completion', prompt)
        for i, x in enumerate(given)
    ]
    row = {'ranks': [x['rank'] for x in given]}
    how = f'context ({read_prompt}), completions with ranks'
    return records.several(row, where, prompt, read, how)


def _objects(row: Row, where: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    given = records.listed(row['completions'], where, 'completions')
    for i, entry in enumerate(given):
        if not isinstance(entry, dict):
            fail(where, f'completions[{i}]', kind(entry), f'an object with {" and ".join(keys)}')
        if missing := [key for key in keys if key not in entry]:
            fail(where, f'completions[{i}]', f'no {missing[0]!r}', f'{" and ".join(keys)}')
    return given


def _ultrafeedback(row: Row, where: str, chat: bool) -> Read:
    """Completions are objects with a response and, of each aspect, a rating in words."""
    prompt, _ = records.prompt(row['instruction'], where, True, 'instruction')
    given = _objects(row, where, ('response', 'annotations'))
    read, ratings = [], []
    for i, entry in enumerate(given):
        column = f'completions[{i}]'
        read.append(records.answer(entry['response'], where, f'{column}.response', prompt))
        notes = entry['annotations']
        if not isinstance(notes, dict) or not all(isinstance(x, dict) for x in notes.values()):
            fail(where, f'{column}.annotations', kind(notes), 'an object of objects with Rating')
        ratings.append(
            {k: _grade(x.get('Rating'), where, f'{column}.{k}') for k, x in notes.items()}
        )
    row = {'ratings': ratings}
    return records.several(row, where, prompt, read, 'instruction (one user turn), completions')


def _grade(value: Any, where: str, column: str) -> float | None:
    """A number written as text; 'N/A' is missing."""
    if value is None or value == 'N/A':
        return None
    try:
        return float(records.text(value, where, column))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        fail(where, column, 'a text that is no number', "a number or 'N/A'")


def _stepwise(row: Row, where: str, chat: bool) -> Read:
    fail(
        where, 'labels', 'a label for each step (process supervision)',
        'whole answers to compare: a reward model scores an answer, not its steps',
    )  # fmt: skip


def _system(row: Row, where: str) -> list[Message]:
    said = row.get('system')
    return [{'role': 'system', 'content': records.text(said, where, 'system')}] if said else []


def _alpaca(row: Row, where: str, chat: bool) -> Read:
    """LLaMA-Factory: the user's turn is the instruction and, on lines of its own, the input."""
    if row.get('history'):
        fail(where, 'history', 'earlier turns', 'none, or all turns as messages in prompt')
    asked = [records.text(row['instruction'], where, 'instruction')]
    if row.get('input') is not None:
        asked.append(records.text(row['input'], where, 'input'))
    row = {**row, 'input': '\n'.join(filter(None, asked))}
    if not row['input']:
        fail(where, 'instruction', 'an empty string', 'text')
    how = 'system/instruction/input (turns), chosen/rejected (assistant replies)'
    return _axolotl(row, where, chat)._replace(how=how)


def _axolotl(row: Row, where: str, chat: bool) -> Read:
    asked, _ = records.prompt(row['input'], where, True, 'input')
    prompt = (*_system(row, where), *asked)
    sides = [records.answer(row[c], where, c, prompt)[0] for c in ('chosen', 'rejected')]
    how = 'system/input (turns), chosen/rejected (assistant replies)'
    return records.pair(row, where, prompt, sides, how, worse='rejected')


def _beside_messages(row: Row, where: str, chat: bool) -> Read:
    """Answers to `messages`, or whole conversations of which `messages` repeats the chosen one."""
    talk = records.messages(row['messages'], where, 'messages')
    asked = row.get('prompt')
    if isinstance(row['chosen'], list) and row['chosen'] == row['messages']:
        read = _conversations('chosen', 'rejected')(row, where, chat)
        said = [list(read.record.messages), *(m['content'] for m in talk)]
        if asked is not None and asked not in said:
            fail(where, 'prompt', 'another prompt than in messages', 'one of its turns')
        return read
    if asked is not None:
        fail(where, 'messages', 'something else than chosen', 'the same (or name the layout)')
    prompt, _ = records.prompt(list(talk), where, chat, 'messages')
    sides = [records.answer(row[c], where, c, prompt)[0] for c in ('chosen', 'rejected')]
    how = 'messages, chosen/rejected (assistant replies)'
    return records.pair(row, where, prompt, sides, how, worse='rejected')


def _sharegpt(row: Row, where: str, chat: bool) -> Read:
    talk = [*_system(row, where), *records.messages(row['conversations'], where, 'conversations')]
    prompt, _ = records.prompt(talk, where, chat, 'conversations')
    sides = [records.answer(row[c], where, c, prompt)[0] for c in ('chosen', 'rejected')]
    how = 'system/conversations (messages), chosen/rejected (assistant replies)'
    return records.pair(row, where, prompt, sides, how, worse='rejected')


def _swift(row: Row, where: str, chat: bool) -> Read:
    turns = records.messages(row['messages'], where, 'messages')
    prompt, chosen = _last(turns, where, 'messages')
    rejected, _ = records.answer(row['rejected_response'], where, 'rejected_response', prompt)
    how = 'messages (the last assistant turn is chosen), rejected_response'
    return records.pair(row, where, prompt, (chosen, rejected), how, worse='rejected_response')


def _last(
    turns: Sequence[Message], where: str, column: str, *, empty: bool = False
) -> tuple[Prompt, Answer]:
    """The conversation up to its last assistant turn, and that."""
    if len(turns) < 2 or turns[-1]['role'] != 'assistant':
        fail(where, column, 'no answer at the end', 'a prompt and an assistant turn')
    prompt, _ = records.prompt(list(turns[:-1]), where, False)
    return prompt, records.answer([turns[-1]], where, column, prompt, empty=empty)[0]


def _conversation(column: str) -> Reader:
    def read(row: Row, where: str, chat: bool) -> Read:
        turns = [*_system(row, where), *records.messages(row[column], where, column)]
        prompt, answer = _last(turns, where, column, empty=row.get('ratings') is not None)
        how = f'{column} (the last assistant turn is the answer)'
        return records.one(row, where, prompt, answer, how)

    return read


def _turns(question: str, reply: str) -> Reader:
    """Of a question and its reply, which are turns even when they are strings.

    What was rated may be empty: its ratings say so.
    """

    def read(row: Row, where: str, chat: bool) -> Read:
        prompt, how = records.prompt(row[question], where, True, question)
        answer, _ = records.answer(row[reply], where, reply, prompt, empty=True)
        how = f'{question} ({how}), {reply} (assistant reply)'
        return records.one(row, where, prompt, answer, how)

    return read


def _completion(row: Row, where: str, chat: bool) -> Read:
    prompt, read_prompt = records.prompt(row['prompt'], where, chat)
    answer, read = records.answer(row['completion'], where, 'completion', prompt, empty=True)
    return records.one(row, where, prompt, answer, f'prompt ({read_prompt}), completion ({read})')


def _helpsteer(row: Row, where: str, chat: bool) -> Read:
    row = {**row, 'ratings': {name: row[name] for name in _HELPSTEER.split()}}
    return _turns('prompt', 'response')(row, where, chat)


def _layout(
    name: str, kind: Kind, read: Reader, required: str, *, optional: str = '', free: str = '',
    refused: str = '', told: str | None = None,
) -> Layout:  # fmt: skip
    sets = [frozenset(names.split()) for names in (required, optional, free, refused)]
    sets.append(frozenset((_SAID if told is None else told).split()).difference(*sets))
    return Layout(name, kind, read, *sets)


def _annotated(name: str, between: str) -> Layout:
    """Names of its columns have this between their words."""
    mean, *others = (
        column.replace(' ', between)
        for column in (annotations.MEAN, annotations.STD, *annotations.SCORES, annotations.JUDGE)
    )
    plain = _layout(name, 'pair', annotations.read, 'chosen rejected')
    return plain._replace(required=plain.required | {mean}, free=frozenset(others))


# Refused columns carry part of the conversation, or say that the others mean something else.
_SAID = (
    'system input context question query instruction prompt history messages conversations '
    'chosen rejected'
)
_ASKS = 'system input context question query instruction history'
_TURNS = 'system rejected_response rejected_messages completions'
_MEDIA = 'images videos audios rejected_images rejected_videos rejected_audios rejected_tools'
_HELPSTEER = 'helpfulness correctness coherence complexity verbosity'
_PAIR = {'optional': 'margin', 'free': f'tools {" ".join(map(" ".join, records.SCORES))}'}
_IDS = {'optional': 'margin', 'free': 'chosen_attention_mask rejected_attention_mask'}
_ONE = {'free': 'ratings tools'}
_MANY = {'optional': 'ranks', 'free': 'ratings tools'}

LAYOUTS = (
    _layout('pair', 'pair', _explicit, 'prompt chosen rejected', **_PAIR, refused='system input'),
    _layout('implicit prompt', 'pair', _implicit, 'chosen rejected', **_PAIR, refused=_ASKS),
    _layout('candidates', 'candidates', _several, 'prompt completions', **_MANY,
            refused='system labels'),
    _layout('conversation', 'answer', _conversation('messages'), 'messages', **_ONE,
            refused=_TURNS),
    _layout('swift response', 'pair', _swift, 'messages rejected_response', **_PAIR,
            refused=_MEDIA),
    _layout('swift messages', 'pair', _conversations('messages', 'rejected_messages'),
            'messages rejected_messages', **_PAIR, refused=_MEDIA),
    _layout('axolotl', 'pair', _axolotl, 'input chosen rejected', optional='margin', free='system',
            refused='instruction query question prompt context history messages'),
    _layout('axolotl chat', 'pair', _beside_messages, 'messages chosen rejected', **_PAIR,
            refused=f'{_MEDIA} {_ASKS}'),
    _layout('conversations beside messages', 'pair', _beside_messages,
            'prompt messages chosen rejected', **_PAIR),
    _layout('alpaca', 'pair', _alpaca, 'instruction chosen rejected', optional='margin',
            free='system input history', refused='query question prompt context messages'),
    _layout('sharegpt', 'answer', _conversation('conversations'), 'conversations',
            free='system ratings tools', refused=_MEDIA),
    _layout('sharegpt pair', 'pair', _sharegpt, 'conversations chosen rejected',
            optional='margin', free='system tools', refused=_MEDIA),
    _layout('nemo', 'candidates', _ranked, 'context completions', free='tools'),
    _layout('rendered', 'pair', _rendered, 'text_chosen text_rejected', optional='margin',
            told=''),
    _layout('token ids', 'pair', _token_ids('_ids'), 'chosen_ids rejected_ids', **_IDS,
            refused='prompt_ids', told=''),
    _layout('token ids, old names', 'pair', _token_ids('_input_ids'),
            'chosen_input_ids rejected_input_ids', **_IDS, refused='prompt_input_ids', told=''),
    _layout('rated answer', 'answer', _turns('question', 'answer'), 'question answer ratings'),
    _layout('rated response', 'answer', _turns('prompt', 'response'), 'prompt response ratings'),
    _layout('rated completion', 'answer', _completion, 'prompt completion ratings'),
    _layout('helpsteer', 'answer', _helpsteer, f'prompt response {_HELPSTEER}'),
    _layout('ultrafeedback', 'candidates', _ultrafeedback, 'instruction completions'),
    _annotated('strength', ' '),
    _annotated('strength, underscored', '_'),
    _layout('stepwise', 'candidates', _stepwise, 'prompt completions labels'),
)  # fmt: skip
