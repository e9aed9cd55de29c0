"""A loaded reward model that scores conversations."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
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
    fused,
    heads,
    marker,
    packing,
    shapes,
    sharding,
    tokens,
    tree,
)
from jaxrm.backbones import attention
from jaxrm.data import Answer, DataError, Message, Preference
from jaxrm.explain import Explanation
from jaxrm.regress import Scale
from jaxrm.reward import RewardModel

Conversation = Sequence[Message] | str

CANDIDATES = 16  # answers of one prompt that share a record; more are spread over several
PACK = 8192  # tokens of a pack, when there is that much to score
DTYPES = ('float32', 'bfloat16', 'float16')
GATES = ('structure', 'marker')


class Prepared(NamedTuple):
    """Records as token trees without repeats, and where each response given is among them."""

    tokens: tokens.Tokens | None  # None when there is no response at all
    place: list[list[tuple[int, int]]]  # (row of `tokens`, candidate)
    where: Sequence[str]

    def lengths(self) -> list[np.ndarray]:
        """int [M] of every record: the tokens of its answers."""
        if self.tokens is None:
            return [np.zeros(0, int) for _ in self.place]
        found = evaluate.by_record(evaluate.lengths(self.tokens), self.tokens)
        return [np.array([found[g][m] for g, m in at], int) for at in self.place]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A reward model in memory: `score` for conversations, `score_records` for preferences."""

    model: RewardModel
    params: tree.Tree
    tokenizer: Any
    mesh: Mesh
    compiled: Callable[..., jax.Array]
    pooling: str | None = None  # as in tokens.encode, when `prepare` is not told
    pad_id: int | None = None  # of config.json, by default the tokenizer's
    objectives: tuple[str, ...] = ()  # of a gated model
    scales: tuple[Scale | None, ...] = ()

    def with_tokenizer(self, tokenizer: Any) -> 'Scorer':
        """The same model, reading what this tokenizer makes of texts."""
        return dataclasses.replace(self, tokenizer=tokenizer)

    def score(self, conversations: Sequence[Conversation], **options: Any) -> np.ndarray:
        """float32 [n], the reward of the last turn of each conversation.

        A conversation is a list of {'role', 'content'} that ends with the assistant's answer, or a
        string, which no chat template touches. Options as in `score_records`. Raises DataError
        naming the conversation that cannot be scored.
        """
        scores = self.score_prepared(self._conversations(conversations, options))
        return np.array([s for (s,) in scores], np.float32)

    def explain(self, conversations: Sequence[Conversation], **options: Any) -> list[Explanation]:
        """The score of each conversation by a gated model, taken apart; options as in `score`.

        Raises ValueError for a model without a gate.
        """
        if not isinstance(self.model.head, heads.Gated):
            kind = type(self.model.head).__name__
            raise ValueError(f'head: found {kind}, expected Gated: one number explains nothing')
        ready = self._conversations(conversations, options)
        return [
            Explanation(
                float(found.score_M[0]),
                self.objectives,
                self.scales,
                rate_J=found.rate_MJ[0],
                weight_J=found.weight_MJ[0],
                coefficient_J=found.coefficient_MJ[0],
            )
            for found in self.found(self._taken_apart, ready)
        ]

    def _conversations(
        self, conversations: Sequence[Conversation], options: Mapping[str, Any]
    ) -> Prepared:
        records, where = parsed(conversations)
        return self.prepare(records, where=where, **options)

    @functools.cached_property
    def _taken_apart(self) -> Callable[..., heads.Parts]:
        """(params, pack) -> Parts, each with M answers."""

        def parts(params: tree.Tree, pack: packing.Pack) -> heads.Parts:
            found = self.model.parts(params, pack)
            wide = lambda x_J: jnp.broadcast_to(x_J, found.rate_MJ.shape)  # noqa: E731
            return found._replace(
                weight_MJ=wide(found.weight_MJ), coefficient_MJ=wide(found.coefficient_MJ)
            )

        return jax.jit(parts)

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
        pooling: str | None = None,
        gate: str = 'structure',
        where: Sequence[str] | None = None,
    ) -> Prepared:
        """What `score_prepared` takes: everything that can be wrong with the records is found here.

        A row longer than `max_length` tokens (the model's own limit by default) is a DataError, or
        cut at the left of the prompt with overlong='left'. `pooling` says which token is read where
        the model's pad token stands in a text, by default what its jaxrm.json says; without either
        that is a DataError. A gated model reads its gate at the token that closes the last user
        turn, found by the structure of the messages, or as the released code does with
        gate='marker' (see `marker`). `where` names the records in errors.
        """
        where = where or [f'record {i}' for i in range(len(records))]
        by_marker = self._by_marker(gate, records, where)
        if by_marker:  # an answer may have the last marker: each is a record of its own
            records = marker.rendered(records, self.tokenizer, where)
        groups, place, names = _distinct(records, where, 1 if by_marker else CANDIDATES)
        if not groups:
            return Prepared(None, place, where)
        limit = self.model.backbone.config.max_position if max_length is None else max_length
        encoded = tokens.encode(
            groups,
            self.tokenizer,
            max_length=limit,
            overlong=overlong,
            pooling=pooling or self.pooling,
            pad_id=self.pad_id,
            where=names,
        ).tokens
        if by_marker:
            encoded = marker.moved(encoded, marker.ids(self.tokenizer), names)
        return Prepared(encoded, place, where)

    def _by_marker(self, gate: str, records: Sequence[Preference], where: Sequence[str]) -> bool:
        """Whether gates are to be searched; refuses records whose messages do not show them."""
        if gate not in GATES:
            raise ValueError(f'gate: found {gate!r}, expected one of {GATES}')
        gated = isinstance(self.model.head, heads.Gated)
        if gate == 'marker' and not gated:
            raise ValueError("gate: found 'marker', but this model has no gate")
        if gated and gate == 'structure':
            try:
                marker.check_turns(records, where)
            except DataError as error:
                more = "gate='marker' looks for it in texts of a chat template and in ids"
                raise DataError(f'{error}; {more}') from None
        return gate == 'marker'

    def score_prepared(self, ready: Prepared) -> list[np.ndarray]:
        """As `score_records`."""
        return self.found(self.compiled, ready)

    def found(self, compiled: Callable[..., Any], ready: Prepared) -> list[Any]:
        """What `compiled` gives for the responses of every record: [M], or trees of [M, ...]."""
        if ready.tokens is None:
            return [np.zeros(0, np.float32) for _ in ready.place]
        shape, packs = _shape(ready.tokens, self.model.backbone.config.D, self.mesh)
        found = evaluate.candidate_scores(
            compiled, self.params, ready.tokens, shape, mesh=self.mesh, packs=packs
        )
        out = []
        for at, where in zip(ready.place, ready.where, strict=True):
            candidate_M = np.array([ready.tokens.first[g] + m for g, m in at], int)
            of_M = jax.tree.map(lambda x_c: x_c[candidate_M], found)  # noqa: B023
            for x_M in jax.tree.leaves(of_M):
                if not np.isfinite(x_M).all():
                    raise ValueError(f'{where}: found a score of {x_M.sum()}, expected a number')
            out.append(of_M)
        return out


def parsed(conversations: Sequence[Conversation]) -> tuple[list[Preference], list[str]]:
    """Conversations as records of one answer, and what errors call them."""
    if isinstance(conversations, str):
        raise DataError('conversations: found a string, expected a list of conversations')
    where = [f'conversation {i}' for i in range(len(conversations))]
    records = [_record(c, w) for c, w in zip(conversations, where, strict=True)]
    return records, where


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
    records: Sequence[Preference], where: Sequence[str], most: int = CANDIDATES
) -> tuple[list[Preference], list[list[tuple[int, int]]], list[str]]:
    """Records without repeats of at most so many responses, and where each response given is."""
    groups: list[tuple[Preference, list[Answer]]] = []
    names: list[str] = []
    open_group: dict[Any, int] = {}
    found: dict[Any, tuple[int, int]] = {}
    place = []
    for record, name in zip(records, where, strict=True):
        asked = Preference(record.messages, (), tools=record.tools, rendered=record.rendered)
        prompt, at = _key(asked), []
        for response in record.responses:
            key = prompt, _key(response)
            if key not in found:
                g = open_group.get(prompt)
                if g is None or len(groups[g][1]) == most:
                    g = open_group[prompt] = len(groups)
                    groups.append((asked, []))
                    names.append(name)
                found[key] = g, len(groups[g][1])
                groups[g][1].append(response)
            at.append(found[key])
        place.append(at)
    return [asked._replace(responses=tuple(r)) for asked, r in groups], place, names


def _power(n: int) -> int:
    return 1 << (max(int(n), 16) - 1).bit_length()


def _shape(encoded: tokens.Tokens, width: int, mesh: Mesh) -> tuple[packing.Shape, int]:
    """A pack shape and P; small sets get sizes in powers of two, so that few programs exist."""
    parts, total = sharding.data_parallel(mesh), len(encoded.ids)
    if total > PACK * parts:
        return shapes.fit(encoded, size=PACK, width=width), parts
    rows = _rows(packing.row_lengths(encoded), attention.row_multiple())
    return packing.Shape(_power(total), rows, _power(len(encoded.prompt)), CANDIDATES), parts


def _rows(length_c: np.ndarray, least: int = 16) -> tuple[tuple[int, int], ...]:
    """Row classes that hold any rows of about as many, as long and as long in all.

    A class is for rows of more than a quarter of its length, and there cannot be more than so many;
    one class does where lengths are alike, and a long row among short ones does not pad them.
    Lengths are powers of two, from `least` on.
    """
    count, longest, room = map(_power, (len(length_c), length_c.max(), length_c.sum()))
    rows: list[tuple[int, int]] = []
    length = 4 * longest
    while not rows or rows[0][0] < count:
        length = max(length // 4, least)
        rows.insert(0, (count if length == least else min(count, 4 * room // length), length))
    return tuple(rows)


def load(
    path: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Scorer:
    """The reward model of a folder or hub id in the HF layout.

    With `base`, `path` is a LoRA adapter on that model, which may be a language model when the
    adapter has a head; the base that an adapter names by itself is never looked for. Computes in
    `dtype`, by default the one the tensors (the base's) are stored in; scores are float32. Raises
    ValueError when the checkpoint is not a whole reward model with its tokenizer.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f'dtype: found {dtype!r}, expected one of {DTYPES}')
    mesh = mesh or sharding.make_mesh()
    if base is None:
        found, adapter = checkpoint.load_pretrained(path, kind='reward', dtype=dtype), None
    else:
        found, adapter = checkpoint.load_adapted(path, base, dtype=dtype)
    if found.tokenizer is None:
        raise ValueError(f'{path}: found no tokenizer, expected tokenizer.json beside the weights')
    config = found.config
    sharding.check_heads(mesh, num_attention_heads=config.Q, num_key_value_heads=config.K)
    compute = jnp.dtype(found.dtype)
    if found.gate is not None and found.tokenizer.chat_template:
        marker.check_template(found.tokenizer)
    family = backbones.family(found.model_type)
    of_head = {**(found.head or {}), **({'gate': found.gate} if found.gate else {})}
    model = RewardModel(
        family.Backbone(found.config, compute, attention.default(compute, found.config, mesh)),
        heads.of(str(found.head_kind), found.config, of_head, temperature=found.temperature),
        adapter.scale if adapter else 1.0,
    )
    params = found.params
    if adapter:
        params['lora'] = adapter.lora
    params, score = fused.place(params, mesh), jax.jit(model.score)
    pooling = (found.bundle or {}).get('pooling')
    return Scorer(
        model,
        params,
        found.tokenizer,
        mesh,
        score,
        pooling,
        _pad_id(found.hf_config),
        found.objectives,
        found.scales,
    )


def _pad_id(config: Mapping[str, Any]) -> int | None:
    """The pad token's id that transformers pools by, if config.json has one."""
    return (config.get('text_config') or config).get('pad_token_id', config.get('pad_token_id'))
