"""A loaded reward model that scores conversations."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from jaxrm.data import Answer, Message, Preference
from jaxrm.reward import RewardModel

Conversation = Sequence[Message] | str

CANDIDATES = 16  # answers of one prompt that share a record; more are spread over several
PACK = 8192  # tokens of a pack, when there is that much to score


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
        where = [f'conversation {i}' for i in range(len(conversations))]
        records = [_record(c, w) for c, w in zip(conversations, where, strict=True)]
        scores = self.score_records(records, where=where, **options)
        return np.array([s for (s,) in scores], np.float32)

    def score_records(
        self,
        records: Sequence[Preference],
        *,
        max_length: int | None = None,
        overlong: str = 'error',
        where: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """float32 [M] for every record, all its responses; ranks play no part.

        Each distinct (prompt, answer) is scored once and looked up, so equal texts have equal
        scores. A row longer than `max_length` tokens (the model's own limit by default) is a
        DataError, or cut at the left of the prompt with overlong='left'.
        """
        where = where or [f'record {i}' for i in range(len(records))]
        groups, place, names = _distinct(records, where)
        limit = max_length or self.model.backbone.config.max_position
        encoded = tokens.encode(
            groups, self.tokenizer, max_length=limit, overlong=overlong, where=names
        ).tokens
        shape, packs = _shape(encoded, self.model.backbone.config.D, self.mesh)
        score_c = evaluate.candidate_scores(
            self.compiled, self.params, encoded, shape, mesh=self.mesh, packs=packs
        )
        found = evaluate.by_record(score_c, encoded)
        return [np.array([found[g][m] for g, m in at], np.float32) for at in place]


def _record(conversation: Conversation, where: str) -> Preference:
    if isinstance(conversation, str):
        return Preference('', (conversation,))
    (record,) = data.preferences([(where, {'messages': list(conversation)})]).records
    return record


def _key(value: Any) -> Any:
    """Messages as something hashable."""
    if isinstance(value, dict):
        return tuple(sorted((k, _key(v)) for k, v in value.items()))
    return tuple(map(_key, value)) if isinstance(value, list | tuple) else value


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
    parts = sharding.data_parallel(mesh)
    total, length = len(encoded.ids), packing.row_lengths(encoded)
    if total > PACK * parts:
        return shapes.fit(encoded, size=PACK, width=width), parts
    n, c = len(encoded.prompt), len(encoded.length)
    rows = ((_power(c), _power(length.max(initial=1))),)
    return packing.Shape(_power(total), rows, _power(n), CANDIDATES), parts


def load(path: str | Path, *, dtype: str | None = None, mesh: Mesh | None = None) -> Scorer:
    """The reward model of a folder or hub id in the HF layout.

    Computes in `dtype`, by default the one its tensors are stored in; scores are float32. Raises
    ValueError when the checkpoint is not a whole reward model.
    """
    mesh = mesh or sharding.make_mesh()
    found = checkpoint.load_pretrained(path, kind='reward', dtype=dtype)
    compute = jnp.dtype(found.dtype)
    family = backbones.family(found.model_type)
    model = RewardModel(
        family.Backbone(found.config, dtype=compute, attention=attention.default(compute)),
        heads.Scalar(),
    )
    params = sharding.place({'backbone': found.backbone, 'head': found.head}, mesh)
    return Scorer(model, params, found.tokenizer, mesh, jax.jit(model.score))
