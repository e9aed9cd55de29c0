"""A loaded reward model that scores conversations."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrm import (
    backbones,
    checkpoint,
    data,
    evaluate,
    heads,
    packing,
    shapes,
    sharding,
    tokens,
    tree,
)
from jaxrm.backbones import attention
from jaxrm.data import Answer, DataError, Message, Preference
from jaxrm.reward import RewardModel

Conversation = Sequence[Message] | str

CANDIDATES = 16  # answers of one prompt that share a record; more are spread over several
PACK = 8192  # tokens of a pack, when there is that much to score
DTYPES = ('float32', 'bfloat16', 'float16')


class Prepared(NamedTuple):
    """Records as token trees without repeats, and where each response given is among them."""

    tokens: tokens.Tokens | None  # None when there is no response at all
    place: list[list[tuple[int, int]]]  # (row of `tokens`, candidate)
    where: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A reward model in memory: `score` for conversations, `score_records` for preferences."""

    model: RewardModel
    params: tree.Tree
    tokenizer: Any
    mesh: Mesh
    compiled: Callable[..., jax.Array]

    def score(self, conversations: Sequence[Conversation], **options: Any) -> np.ndarray:
        """float32 [n], the reward of the last turn of each conversation.

        A conversation is a list of {'role', 'content'} that ends with the assistant's answer, or a
        string, which no chat template touches. Options as in `score_records`. Raises DataError
        naming the conversation that cannot be scored.
        """
        if isinstance(conversations, str):
            raise DataError('conversations: found a string, expected a list of conversations')
        where = [f'conversation {i}' for i in range(len(conversations))]
        records = [_record(c, w) for c, w in zip(conversations, where, strict=True)]
        scores = self.score_records(records, where=where, **options)
        return np.array([s for (s,) in scores], np.float32)

    def score_records(self, records: Sequence[Preference], **options: Any) -> list[np.ndarray]:
        """float32 [M] for every record, all its responses; ranks play no part.

        Each distinct (prompt, answer) is scored once and looked up, so equal texts have equal
        scores. Options as in `prepare`. Raises ValueError for a score that is not finite.
        """
        return self.score_prepared(self.prepare(records, **options))

    def prepare(
        self,
        records: Sequence[Preference],
        *,
        max_length: int | None = None,
        overlong: str = 'error',
        where: Sequence[str] | None = None,
    ) -> Prepared:
        """What `score_prepared` takes: everything that can be wrong with the records is found here.

        A row longer than `max_length` tokens (the model's own limit by default) is a DataError, or
        cut at the left of the prompt with overlong='left'. `where` names the records in errors.
        """
        where = where or [f'record {i}' for i in range(len(records))]
        groups, place, names = _distinct(records, where)
        if not groups:
            return Prepared(None, place, where)
        limit = self.model.backbone.config.max_position if max_length is None else max_length
        encoded = tokens.encode(
            groups, self.tokenizer, max_length=limit, overlong=overlong, where=names
        )
        return Prepared(encoded.tokens, place, where)

    def score_prepared(self, ready: Prepared) -> list[np.ndarray]:
        """As `score_records`."""
        if ready.tokens is None:
            return [np.zeros(0, np.float32) for _ in ready.place]
        shape, packs = _shape(ready.tokens, self.model.backbone.config.D, self.mesh)
        score_c = evaluate.candidate_scores(
            self.compiled, self.params, ready.tokens, shape, mesh=self.mesh, packs=packs
        )
        found = evaluate.by_record(score_c, ready.tokens)
        scores = [np.array([found[g][m] for g, m in at], np.float32) for at in ready.place]
        for score_M, where in zip(scores, ready.where, strict=True):
            if not np.isfinite(score_M).all():
                raise ValueError(f'{where}: found a score of {score_M.sum()}, expected a number')
        return scores


def _record(conversation: Conversation, where: str) -> Preference:
    if isinstance(conversation, str):
        row = {'prompt': conversation, 'completions': [conversation]}  # for the checks of a text
        data.preferences([(where, row)])
        return Preference('', (conversation,))
    messages = list(conversation) if isinstance(conversation, Sequence) else conversation
    (record,) = data.preferences([(where, {'messages': messages})]).records
    return record


def _key(value: Any) -> str:
    """Messages as text; True and 1, which a template may show apart, stay apart."""
    return json.dumps(value, default=repr)


def _distinct(
    records: Sequence[Preference], where: Sequence[str]
) -> tuple[list[Preference], list[list[tuple[int, int]]], list[str]]:
    """Records without repeats, and where each response given is: (record, candidate)."""
    groups: list[tuple[Any, list[Answer]]] = []
    names: list[str] = []
    open_group: dict[Any, int] = {}
    found: dict[Any, tuple[int, int]] = {}
    place = []
    for record, name in zip(records, where, strict=True):
        prompt, at = _key(record.messages), []
        for response in record.responses:
            key = prompt, _key(response)
            if key not in found:
                g = open_group.get(prompt)
                if g is None or len(groups[g][1]) == CANDIDATES:
                    g = open_group[prompt] = len(groups)
                    groups.append((record.messages, []))
                    names.append(name)
                found[key] = g, len(groups[g][1])
                groups[g][1].append(response)
            at.append(found[key])
        place.append(at)
    return [Preference(m, tuple(r)) for m, r in groups], place, names


def _power(n: int) -> int:
    return 1 << (max(int(n), 16) - 1).bit_length()


def _shape(encoded: tokens.Tokens, width: int, mesh: Mesh) -> tuple[packing.Shape, int]:
    """A pack shape and P; small sets get sizes in powers of two, so that few programs exist."""
    parts, total = sharding.data_parallel(mesh), len(encoded.ids)
    if total > PACK * parts:
        return shapes.fit(encoded, size=PACK, width=width), parts
    rows = _rows(packing.row_lengths(encoded))
    return packing.Shape(_power(total), rows, _power(len(encoded.prompt)), CANDIDATES), parts


def _rows(length_c: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Row classes that hold any rows of about as many, as long and as long in all.

    A class is for rows of more than a quarter of its length, and there cannot be more than so many;
    one class does where lengths are alike, and a long row among short ones does not pad them.
    """
    count, longest, room = map(_power, (len(length_c), length_c.max(), length_c.sum()))
    rows: list[tuple[int, int]] = []
    length = 4 * longest
    while not rows or rows[0][0] < count:
        length = max(length // 4, 16)
        rows.insert(0, (count if length == 16 else min(count, 4 * room // length), length))
    return tuple(rows)


def load(path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None) -> Scorer:
    """The reward model of a folder or hub id in the HF layout.

    Computes in `dtype`, by default the one its tensors are stored in; scores are float32. Raises
    ValueError when the checkpoint is not a whole reward model with its tokenizer.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f'dtype: found {dtype!r}, expected one of {DTYPES}')
    mesh = mesh or sharding.make_mesh()
    found = checkpoint.load_pretrained(path, kind='reward', dtype=dtype)
    if found.tokenizer is None:
        raise ValueError(f'{path}: found no tokenizer, expected tokenizer.json beside the weights')
    compute = jnp.dtype(found.dtype)
    family = backbones.family(found.model_type)
    model = RewardModel(
        family.Backbone(found.config, dtype=compute, attention=attention.default(compute)),
        heads.Scalar(),
    )
    params = sharding.place({'backbone': found.backbone, 'head': found.head}, mesh)
    return Scorer(model, params, found.tokenizer, mesh, jax.jit(model.score))
