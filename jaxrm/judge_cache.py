"""Answers of a judge on disk, a line each, kept as they come: nothing that was answered is lost."""

import contextlib
import errno
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from jaxrm.files import DataError


class Reply(NamedTuple):
    """What was answered, and the tokens it took."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Cache:
    """Replies by key, in a JSON Lines file of one run at a time.

    A line is on disk before `add` returns. A last line that a crash cut short is removed; any other
    that cannot be read raises DataError, as does a file that another run has open.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            _lock(self._file, path)
            self._replies, self._end = _read(path)
            os.ftruncate(self._file, self._end)
        except BaseException:
            self.close()
            raise

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def get(self, key: str) -> Reply | None:
        """The reply, None if there is none."""
        return self._replies.get(key)

    def __len__(self) -> int:
        return len(self._replies)

    def add(self, key: str, reply: Reply) -> None:
        """Keeps a reply."""
        line = (json.dumps({'key': key, **reply._asdict()}) + '\n').encode()
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, 'the answer could not be written whole')
            os.fsync(self._file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)
        self._replies[key] = reply

    def close(self) -> None:
        """Lets another run have the file."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(f'{path}: another run has it open') from error


def read(path: Path) -> dict[str, Reply]:
    """The replies of a file that need not be there; touches nothing."""
    return _read(path)[0] if path.exists() else {}


def _read(path: Path) -> tuple[dict[str, Reply], int]:
    """The replies, and where the last whole line ends."""
    replies: dict[str, Reply] = {}
    end, data = 0, path.read_bytes()
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        found = _parsed(line)
        if found is not None:
            key, reply = found
            replies[key] = reply
        elif end + len(line) < len(data):
            raise DataError(f'{path}:{number}: found no reply, expected a line that this wrote')
        else:
            break
        end += len(line)
    return replies, end


def _parsed(line: bytes) -> tuple[str, Reply] | None:
    """None for a line that is not whole."""
    if not line.endswith(b'\n'):
        return None
    try:
        row = json.loads(line)
        key, text = row['key'], row['text']
        reply = Reply(text, int(row['prompt_tokens']), int(row['completion_tokens']))
    except (ValueError, TypeError, KeyError):
        return None
    return (key, reply) if isinstance(key, str) and isinstance(text, str) else None
