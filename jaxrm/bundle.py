"""What stands beside the weights of a checkpoint: its tokenizer, and `jaxrm.json`.

`jaxrm.json` holds the kind of head, the pooling rule, a hash of the chat template, and provenance;
of a gated model also the names of its objectives and the scales they were rated on.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from jaxrm import hf, hf_heads, tokens
from jaxrm.backbones.layers import Config
from jaxrm.regress import Scale

FILE = 'jaxrm.json'


def read_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None when there is none; never touches the network."""
    if not any(folder.glob('tokenizer*')):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f'{folder}: the tokenizer cannot be read: {error}') from error
    for key in ('is_local', 'local_files_only', 'trust_remote_code'):
        tokenizer.init_kwargs.pop(key, None)  # how it was loaded is not part of it
    return tokenizer


def check_vocabulary(where: Path | str, tokenizer: Any, config: Config) -> None:
    """Raises ValueError when the tokenizer has an id that the embedding has not."""
    if tokenizer is None:
        return
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= config.V:
        raise ValueError(f'{where}: token {token!r} has id {last}, expected less than {config.V}')


def _says(head: str | None, tokenizer: Any) -> dict[str, Any]:
    template = tokens.template_hash(tokenizer) if _has_template(tokenizer) else None
    return {'version': 1, 'head': head, 'pooling': 'last', 'template': template}


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, 'chat_template', None))


def read(folder: Path, head: str | None, tokenizer: Any) -> dict[str, Any] | None:
    """jaxrm.json, if there is one; raises ValueError when it does not fit the rest.

    Without a head, what it says of the head does not matter.
    """
    if not (folder / FILE).exists():
        return None
    found = hf.read_json(folder / FILE)
    for key, want in _says(head, tokenizer).items():
        if found.get(key) != want and not (key == 'head' and head is None):
            raise ValueError(f'{folder / FILE}: {key} is {found.get(key)!r}, expected {want!r}')
    return found


def make(
    head: str | None, tokenizer: Any, provenance: Mapping[str, Any] | None, old: Any
) -> dict[str, Any]:
    """A new jaxrm.json; provenance is that of the old one, if there is one, unless given."""
    if provenance is None:
        provenance = (old or {}).get('provenance', {})
    return {**_says(head, tokenizer), 'provenance': dict(provenance)}


def objectives(
    folder: Path, found: Mapping[str, Any] | None, count: int
) -> tuple[tuple[str, ...], tuple[Scale | None, ...]]:
    """The names of a gated model's objectives, and the scales of those whose scale is known.

    Without jaxrm.json, 19 objectives are ArmoRM's. Raises ValueError when it does not fit.
    """
    if found is None:
        published = count == len(hf_heads.OBJECTIVES)
        numbered = tuple(f'objective {j}' for j in range(count))
        return (hf_heads.OBJECTIVES, hf_heads.SCALES) if published else (numbered, (None,) * count)
    names, scales = (_listed(found, key, folder) for key in ('objectives', 'scales'))
    if len({n for n in names if isinstance(n, str)}) != count or len(names) != count:
        expected = f'expected {count} different names'
        raise ValueError(f'{folder / FILE}: objectives is {names}, {expected}')
    if len(scales) != count or not all(map(_is_scale, scales)):
        expected = f'expected {count} of [low, high] or null'
        raise ValueError(f'{folder / FILE}: scales is {scales}, {expected}')
    return tuple(names), tuple(s and Scale(*s) for s in scales)


def _listed(found: Mapping[str, Any], key: str, folder: Path) -> list[Any]:
    if not isinstance(value := found.get(key), list):
        raise ValueError(f'{folder / FILE}: {key} is {value!r}, expected a list')
    return value


def _is_scale(value: Any) -> bool:
    if value is None:
        return True
    numbers = isinstance(value, list) and all(type(x) in (int, float) for x in value)
    return numbers and len(value) == 2 and -math.inf < value[0] < value[1] < math.inf


def ratings(names: Sequence[str], scales: Sequence[Scale | None]) -> dict[str, Any]:
    """What jaxrm.json says of a gated model's objectives; no scales are as good as unknown ones."""
    scales = scales or (None,) * len(names)
    if len(set(names)) != len(scales) or len(names) != len(scales):
        raise ValueError(
            f'objectives: found {tuple(names)} and {len(scales)} scales, expected different names '
            'and as many scales'
        )
    return {'objectives': list(names), 'scales': [s and [s.low, s.high] for s in scales]}
