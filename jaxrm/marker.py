"""Where a gate reads: at the token that closes the last user turn.

The messages show which it is. The released gated models look for a marker among the token ids,
which is what a chat template writes from the end of the user's turn to the beginning of the
assistant's; the last one in the ids is taken, and special tokens are read wherever their names
stand, in what people wrote, too. For comparison with those models: an answer can move its gate.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrm import chat
from jaxrm.data import DataError, Ids, Preference
from jaxrm.tokens import Tokens

Array = Any  # numpy's on the host, jax's inside a program

QUESTION = {'role': 'user', 'content': 'QUESTION'}
ANSWER = {'role': 'assistant', 'content': 'ANSWER'}


def check_turns(records: Sequence[Preference], where: Sequence[str]) -> None:
    """Raises DataError naming the first record that has no user turn, which a gate reads."""
    for record, name in zip(records, where, strict=True):
        if isinstance(record.messages, str):
            found = 'plain text'
        elif isinstance(record.messages, Ids):
            found = 'token ids'
        elif any(message['role'] == 'user' for message in record.messages):
            continue
        else:
            found = 'no user turn'
        expected = 'expected messages with a user turn, at whose end the gate reads'
        raise DataError(f'{name}: found {found}, {expected}')


def check_template(tokenizer: Any) -> None:
    """Refuses a chat template by which the rows of a gated model would be read at other tokens.

    The row of a question and its answer must have the marker once. Where something closes the
    question, it must close the answer, too: it is what the released models read both at. A template
    that opens no turn for add_generation_prompt has no marker, and nothing to compare.
    """
    chat.check_template(tokenizer)
    if (text := _text(tokenizer)) is None:
        return
    found = _encoded(tokenizer, text)
    row = _encoded(tokenizer, tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False))
    times = sum(np.array_equal(row[i : i + len(found)], found) for i in range(len(row)))
    closing = tokenizer.apply_chat_template([QUESTION], tokenize=False).partition('QUESTION')[2]
    ends = any(np.array_equal(row[-k:], found[:k]) for k in range(1, len(found)))
    if times != 1 or (closing.strip() and not ends):
        how = '' if ends else ', and another end'
        raise ValueError(
            f'tokenizer: found {times} markers {found.tolist()} in a question and its answer{how}, '
            'expected one, and the turn of the answer closed as that of the question is'
        )


def ids(tokenizer: Any) -> np.ndarray:
    """int32, such as Llama 3's <|eot_id|><|start_header_id|>assistant<|end_header_id|>, line ends.

    Raises ValueError for a chat template that does not open the assistant's turn when asked to.
    """
    chat.check_template(tokenizer)
    if (text := _text(tokenizer)) is None:
        raise ValueError(
            'tokenizer: found a chat template that does not open a turn of the assistant for '
            'add_generation_prompt, expected one that does: it is part of the marker'
        )
    return _encoded(tokenizer, text)


def _text(tokenizer: Any) -> str | None:
    """The marker's, None where the chat template opens no turn of the assistant."""
    closed, opened = (
        tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=opens)
        for opens in (False, True)
    )
    opens = opened.startswith(closed) and opened != closed
    return opened.partition(QUESTION['content'])[2] if opens else None


def _encoded(tokenizer: Any, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)


def last(ids_BS: Array, marker: np.ndarray) -> tuple[Array, Array]:
    """(index_B, found_B): the first token of each row's last marker, and whether there is one.

    Arrays of numpy or of JAX, inside a program, too, where nothing can be raised: the index of a
    row without a marker is S, which is no token. Raises ValueError for an empty marker.
    """
    if not len(marker):
        raise ValueError('marker: found no ids, expected at least one')
    S, m = ids_BS.shape[-1], len(marker)
    starts = max(S - m + 1, 0)
    hit_BW = ids_BS[..., :starts] == marker[0]
    for k in range(1, m):
        hit_BW = hit_BW & (ids_BS[..., k : k + starts] == marker[k])
    after_B = (hit_BW * np.broadcast_to(np.arange(1, starts + 1), hit_BW.shape)).max(-1, initial=0)
    found_B = after_B > 0
    return after_B - 1 + (S + 1) * ~found_B, found_B


def rendered(records: Sequence[Preference], tokenizer: Any, where: Sequence[str]) -> list:
    """The records as whole texts of the chat template, without a prompt; others as they are."""
    return [_rendered(r, tokenizer, w) for r, w in zip(records, where, strict=True)]


def _rendered(record: Preference, tokenizer: Any, where: str) -> Preference:
    if isinstance(record.messages, str | Ids):
        return record
    texts = []
    for answer in record.responses:
        said = [{'role': 'assistant', 'content': answer}] if isinstance(answer, str) else answer
        turns = [*record.messages, *said]
        try:
            texts.append(tokenizer.apply_chat_template(turns, tools=record.tools, tokenize=False))
        except Exception as error:  # whatever a template does
            raise DataError(f'{where}: the chat template fails: {error}') from error
    return record._replace(messages='', responses=tuple(texts), tools=None, rendered=True)


def moved(tokens: Tokens, marker: np.ndarray, where: Sequence[str]) -> Tokens:
    """`tokens` of one candidate a record, each gate at the first token of the row's last marker.

    Raises DataError naming a row without one; `where` names the records that were encoded.
    """
    gate = np.empty_like(tokens.gate)
    for i, (begin, end) in enumerate(zip(tokens.start[:-1], tokens.start[1:], strict=True)):
        gate[i], found = last(tokens.ids[begin:end], marker)
        if not found:
            name, expected = where[tokens.record[i]], list(map(int, marker))
            raise DataError(f'{name}: found no marker of the prompt, expected the ids {expected}')
    return tokens._replace(gate=gate)
