"""Processes that take turns, each timing its own loop: both ends of the pipe between them.

Needs the standard library alone, since one side of a comparison may have none of the other's.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence


class Turns:
    """Waits for a number of units, counts them down, says how long they took, and waits again."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), 'w')
        sys.stdout = sys.stderr  # what libraries print
        self.more: dict = {}  # of the next turn

    def wait(self) -> int:
        """The units to make; ends the process with the input."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # from the depths of somebody's loop
        self.left = self.asked = int(line)
        self.done = 0.0
        self.start = time.perf_counter(), time.process_time()
        return self.asked

    def tick(self, done: float = 1, units: int = 1) -> None:
        """So many more units are made, which are worth `done`."""
        self.left -= units
        self.done += done
        if self.left > 0:
            return
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        said = {'seconds': wall, 'cpu': cpu, 'done': self.done, **self.more}
        self.out.write(json.dumps(said) + '\n')
        self.out.flush()
        self.more = {}
        self.wait()


class Side:
    """A process that makes a number of units when it is told to, and times them."""

    def __init__(self, name: str, command: Sequence[str], environ: Mapping[str, str]):
        pipe = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
        self.name = name
        self.process = subprocess.Popen(list(command), env=dict(environ), **pipe)

    def turn(self, units: int) -> dict:
        """{'seconds', 'cpu', 'done'}, and what else it says of them."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f'{units}\n')
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f'{self.name}: the process ended with {self.process.wait()}')
        return json.loads(line)

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def take_turns(
    sides: Sequence[Side], units: int, rounds: int, check: Callable[[dict], object]
) -> dict[str, list[dict]]:
    """What each side says of each turn, and ends them.

    The first turn, which compiles, is left out: `check` is given what all said of it, by name.
    """
    try:
        check({one.name: one.turn(units) for one in sides})
        out: dict[str, list[dict]] = {one.name: [] for one in sides}
        for _ in range(rounds):
            for one in sides:
                out[one.name].append(one.turn(units))
    finally:
        for one in sides:
            one.close()
    return out
