"""Embedding tables of models with different tokenizers, row by row in one output vocabulary.

Rows are known by their tokens' strings. A model's table is rebuilt in the output vocabulary before
any merging; a token that the model lacks gets the row of the base if that has it, else that of its
only owner, else the mean of its owners. Of a reward model and a language model with weights that
are normalized, this leaves rows that one of them has as they are (DogeRM, arXiv 2407.01470).
"""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tokenizers import AddedToken, Tokenizer

Place = tuple[int, int]  # a model and a row of its table
ZERO, OWNERS, PADDING = -1, -2, -3  # in place of a model: zeros; means of owners; of the table


class Rows(NamedTuple):
    """Where one model's rows of the output vocabulary come from."""

    model_V: np.ndarray  # int32, a model's place, or one of the three above
    id_V: np.ndarray  # int32, its row there


class Plan(NamedTuple):
    """The output vocabulary, padding included, and each model's rows in it."""

    names: tuple[str, ...]  # of the models
    first: int  # the model whose vocabulary leads
    tokens: tuple[str, ...]  # by id, '' for padding and holes
    rows: tuple[Rows, ...]
    owners: Mapping[int, tuple[Place, ...]]  # {id: row of each owner}, where they are averaged


def plan(
    vocabularies: Sequence[Mapping[str, int]],
    sizes: Sequence[int],
    *,
    names: Sequence[str],
    first: int = 0,
    base: int | None = None,
    source: str = 'union',
    tokens: Mapping[str, Mapping[str, Any]] | None = None,
    pad_to_multiple_of: int | None = None,
) -> Plan:
    """The output vocabulary of models with these {token: id} and as many rows in their tables.

    `source` is 'union' (the tokens of model `first`, then what each other has more, by its ids),
    'base', or a name. `tokens` says of a token where models that lack it find its row, all models
    if 'force': {'source': name}, {'source': {'kind': 'zero'}} or {'source': {'kind': 'model_token',
    'model': name, 'token' or 'token_id': ...}}. There are as many rows as tokens, rounded up to the
    multiple, but without one not fewer than the leading model has; rows without a token are the
    leading model's where it has them, else the mean of a table. A token that no model has is a new
    one, if it has a source. Raises ValueError naming a model or token that is not there.
    """
    for name, ids, size in zip(names, vocabularies, sizes, strict=True):
        if ids and max(ids.values()) >= size:
            raise ValueError(f'{name}: found token id {max(ids.values())} of {size} rows')
    lead = first if source == 'union' else _lead(source, names, base)
    ordered = _ordered(vocabularies, lead, source == 'union')
    ordered += _new(tokens or {}, ordered)
    size = -(-len(ordered) // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
    size = size if pad_to_multiple_of else max(size, sizes[lead])
    ordered += [''] * (size - len(ordered))
    owners: dict[int, tuple[Place, ...]] = {}
    where: list[list[Place]] = [[] for _ in names]
    for i, token in enumerate(ordered):
        having = tuple((m, ids[token]) for m, ids in enumerate(vocabularies) if token in ids)
        said = (tokens or {}).get(token, {})
        if not token:
            found = (lead, i) if i < sizes[lead] else (PADDING, 0)
        elif 'source' in said:
            found = _said(token, said['source'], vocabularies, sizes, names)
        else:
            found = _default(having, base)
            owners |= {i: having} if found[0] == OWNERS else {}
        own = {} if said.get('force') or not token else dict(having)
        for m, rows in enumerate(where):
            rows.append((m, own[m]) if m in own else found)
    arrays = (np.array(rows, np.int32).reshape(-1, 2).T for rows in where)
    return Plan(tuple(names), lead, tuple(ordered), tuple(Rows(*x) for x in arrays), owners)


def _lead(source: str, names: Sequence[str], base: int | None) -> int:
    if source == 'base' and base is not None:
        return base
    if source not in names:
        raise ValueError(f"tokenizer: found source {source!r}, expected 'union' or a model")
    return list(names).index(source)


def _ordered(vocabularies: Sequence[Mapping[str, int]], lead: int, union: bool) -> list[str]:
    """Tokens by id in the output."""
    leading = vocabularies[lead]
    out = [''] * (max(leading.values(), default=-1) + 1)
    for token, i in leading.items():
        out[i] = token
    known = set(leading)
    for ids in vocabularies if union else ():
        more = sorted(ids.keys() - known, key=ids.__getitem__)
        out += more
        known |= set(more)
    return out


def _new(tokens: Mapping[str, Mapping[str, Any]], ordered: Sequence[str]) -> list[str]:
    """Tokens that a rule is given for and the vocabulary lacks; they need a row."""
    known = set(ordered)
    new = [token for token in tokens if token not in known]
    if lacking := [token for token in new if 'source' not in tokens[token]]:
        raise ValueError(f'tokens: {lacking[0]!r}: found no source, which a new token needs')
    return new


def _default(having: tuple[Place, ...], base: int | None) -> Place:
    """The row of a model that lacks a token which these have."""
    of_base = [pair for pair in having if pair[0] == base]
    if of_base or len(having) == 1:
        return (of_base or having)[0]
    return OWNERS, 0


def _said(
    token: str,
    source: str | Mapping[str, Any],
    vocabularies: Sequence[Mapping[str, int]],
    sizes: Sequence[int],
    names: Sequence[str],
) -> Place:
    """The row that a token's source names."""
    if isinstance(source, str):
        source = {'kind': 'model_token', 'model': source, 'token': token}
    if source['kind'] == 'zero':
        return ZERO, 0
    model = list(names).index(source['model'])
    i = source.get('token_id', vocabularies[model].get(source.get('token', '')))
    if i is None or not 0 <= i < sizes[model]:
        what = source.get('token', i)
        raise ValueError(f'tokens: {token!r}: found no {what!r} in {source["model"]}')
    return model, i


def by_id(vocabularies: Sequence[Mapping[str, int]], names: Sequence[str]) -> None:
    """Raises ValueError unless all have the same tokens at the same ids."""
    for name, ids in zip(names[1:], vocabularies[1:], strict=True):
        if odd := sorted(set(vocabularies[0].items()) ^ set(ids.items()), key=lambda x: x[::-1]):
            token = odd[0][0]
            found = f'{vocabularies[0].get(token)} in {names[0]}, {ids.get(token)} in {name}'
            raise ValueError(
                f'tokenizers: found {token!r} at {found}, and {len(odd)} such tokens, expected the '
                'same, or a tokenizer section that says which the result has'
            )


# Tables


def table(plan: Plan, model: int, tables: Sequence[Any]) -> Any:
    """[V, D] of one model in the output vocabulary, from the tables [.., D] of all of them.

    Of numpy or jax arrays, in their dtype, or float32 where those of the rows that it needs differ.
    """
    model_V, id_V = plan.rows[model]
    sources = [m for m in range(len(tables)) if m == model or (model_V == m).any()]
    of_owners = {m for pairs in _owned(plan, model).values() for m, _ in pairs}
    dtypes = {tables[m].dtype for m in {*sources, *of_owners}}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    own_V = np.where(model_V == model, id_V, 0)
    out = tables[model][own_V].astype(dtype)
    for m in set(sources) - {model}:
        at = np.flatnonzero(model_V == m)
        out = _put(out, at, tables[m][id_V[at]])
    out = _put(out, np.flatnonzero(model_V == ZERO), 0)
    for i, pairs in _owned(plan, model).items():
        mean = sum(tables[m][j].astype(np.float32) for m, j in pairs) / len(pairs)
        out = _put(out, np.array([i]), mean[None])
    if (padding := np.flatnonzero(model_V == PADDING)).size:
        mean = out[np.flatnonzero(plan.tokens)].astype(np.float32).mean(0, keepdims=True)
        out = _put(out, padding, mean)
    return out


def _owned(plan: Plan, model: int) -> dict[int, tuple[Place, ...]]:
    model_V = plan.rows[model].model_V
    return {i: pairs for i, pairs in plan.owners.items() if model_V[i] == OWNERS}


def _put(x: Any, at: np.ndarray, value: Any) -> Any:
    if not at.size:
        return x
    if isinstance(x, jax.Array):
        return x.at[at].set(value.astype(x.dtype) if hasattr(value, 'astype') else value)
    x[at] = value
    return x


# The tokenizer


def tokenizer(plan: Plan, tokenizers: Sequence[Any], *, like: int = 0) -> Any:
    """The output vocabulary's tokenizer, with the pad token and chat template of model `like`.

    The leading model's, and of others what they have more: tokens added to theirs are added, as
    special as they are there; ordinary ones get ids, but no text becomes them by merges of pieces.
    Raises ValueError where a tokenizer can not have the tokens at their ids.
    """
    made = copy.deepcopy(tokenizers[plan.first])
    known = made.get_vocab()
    new = [(i, token) for i, token in enumerate(plan.tokens) if token and token not in known]
    added = _added([token for _, token in new], tokenizers)
    if not all(added.values()):
        made._tokenizer = _with_ids(made.backend_tokenizer, dict(new), plan.names[plan.first])
    made.add_tokens([token for token in added.values() if token])
    made.chat_template = tokenizers[like].chat_template
    pad, found = tokenizers[like].pad_token, made.get_vocab()
    if pad is not None and pad not in found:
        raise ValueError(f'tokenizer: found no {pad!r}, the pad token of {plan.names[like]}')
    made.pad_token = pad
    if wrong := [t for i, t in enumerate(plan.tokens) if t and found.get(t) != i]:
        token, want = wrong[0], plan.tokens.index(wrong[0])
        raise ValueError(f'tokenizer: {token!r} would have id {found.get(token)}, expected {want}')
    return made


def _added(new: Sequence[str], tokenizers: Sequence[Any]) -> dict[str, AddedToken | None]:
    """Tokens as they were added to the first tokenizer that has them; None for ordinary ones.

    One that is in no tokenizer is special.
    """
    out: dict[str, AddedToken | None] = {}
    for tokenizer in tokenizers:
        ids, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        out |= {token: added.get(ids[token]) for token in new if token in ids and token not in out}
    nobodys = {token: AddedToken(token, special=True, normalized=False) for token in new}
    return nobodys | out


def _with_ids(backend: Tokenizer, new: Mapping[int, str], name: str) -> Tokenizer:
    """With more tokens, which are put into its model's vocabulary, as are those added before."""
    state = json.loads(backend.to_str())
    vocabulary = state['model'].get('vocab')
    if not isinstance(vocabulary, dict):
        kind = state['model'].get('type')
        raise ValueError(
            f'tokenizer: {name} has a {kind} model, to which no ordinary tokens can be added '
            f'({sorted(new.values())[:3]}, ...), expected a source other than union'
        )
    for i, token in sorted(new.items()):
        vocabulary[token] = i
    for token in state['added_tokens']:
        vocabulary.setdefault(token['content'], token['id'])
    return Tokenizer.from_str(json.dumps(state))


# Before the merge


def describe(plan: Plan) -> list[str]:
    """What happens to the rows, a line for the output and one for each model that lacks some."""
    count, lead = sum(map(bool, plan.tokens)), plan.names[plan.first]
    lines = [f'vocabulary: {len(plan.tokens)} rows, {count} of tokens, led by {lead}']
    for m, (name, rows) in enumerate(zip(plan.names, plan.rows, strict=True)):
        kinds = {i: int((rows.model_V == i).sum()) for i in np.unique(rows.model_V) if i != m}
        what = {ZERO: 'zero', OWNERS: 'the mean of their owners', PADDING: 'its mean'}
        said = [
            f'{n} {"is" if n == 1 else "are"} {what[i] if i < 0 else "those of " + plan.names[i]}'
            for i, n in kinds.items()
        ]
        lines += [f'rows that are not of {name}: {", ".join(said)}'] if said else []
    return lines
