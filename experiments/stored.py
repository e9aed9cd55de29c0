"""Finished cells of an experiment: one JSON file each, which says of which flags it is."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import devices

# Flags that no number depends on, or that say which cells there are.
ASIDE = {'output_dir', 'results', 'only_table', 'cells', 'variants', *devices.ASIDE}


def flags(c: Any) -> dict[str, Any]:
    """Those of a Config that every cell depends on, as JSON has them."""
    given = {k: v for k, v in dataclasses.asdict(c).items() if k not in ASIDE}
    return json.loads(json.dumps(given))


def read(path: Path, flags: Mapping[str, Any]) -> dict[str, Any] | None:
    """A cell, None where it is not; ValueError for one of other flags."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    for name in sorted(found['flags'].keys() | flags.keys()):
        was, now = found['flags'].get(name), flags.get(name)
        if was != now:
            raise ValueError(f'{path}: is of a run with {name} {was!r}, not {now!r}')
    return found
