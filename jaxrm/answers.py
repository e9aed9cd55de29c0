"""What of a generated text is the answer: a number, or a program.

`number`, and of `code` the fence "```python" and the stops, are rules of DogeRM's evaluation
(arXiv 2407.01470, by its released code). Ours are: other tags of fences, a program taken whole
that an earlier problem's fence would cut there, and what counts as a number in `gold`.
"""

import math
import re

NUMBER = re.compile(r'-?(?:\d[\d,]*\.?\d*|\.\d+)')
PHRASE = 'The answer is'
FENCE = re.compile(r'```(?:[ \t]*[\w+-]+[ \t]*(?=\n))?')  # with its tag, if it has one
PYTHON = re.compile(r'```[ \t]*(?:python3?|py)\b', re.IGNORECASE)
# Where the harness that runs MBPP ends a program.
STOPS = ('\nclass', '\nassert', '\n"""', '\nprint', '\nif', '\n<|/', '\n```')


def number(text: str) -> float | None:
    """The first number behind the last "The answer is", else the last number there is.

    Commas between digits mean nothing. None without a number.
    """
    head, phrase, tail = text.rpartition(PHRASE)
    found = [x for x in map(_value, NUMBER.findall(tail if phrase else text)) if x is not None]
    if not found:
        return None
    return found[0] if phrase else found[-1]


def _value(text: str) -> float | None:
    try:
        return float(text.replace(',', '').rstrip('.'))
    except ValueError:
        return None


def gold(solution: str) -> float:
    """The number behind '#### ' of a GSM8K solution; ValueError without one."""
    _, mark, tail = solution.rpartition('####')
    found = _value(tail.strip()) if mark else None
    if found is None or not math.isfinite(found):
        raise ValueError(f"solution: found {solution[-40:]!r}, expected one ending in '#### n'")
    return found


def same(found: float | None, expected: float) -> bool:
    """Whether an answer is right, as numbers; none is wrong."""
    return found is not None and found == expected


def code(text: str) -> str:
    """The program in a reply: behind a fence, if there is one, up to the first stop.

    The first fence of Python, else the first.
    """
    if fence := PYTHON.search(text) or FENCE.search(text):
        text = text[fence.end() :]
    ends = [at for at in map(text.find, STOPS) if at >= 0]
    return text[: min(ends, default=len(text))]
