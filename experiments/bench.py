"""What the benchmarks share: length profiles, real shapes, padded batches, fair timing.

Needs nothing beyond jaxrm's core, so that it runs wherever JAX, flax and optax are.

Letters: T tokens, N stream tokens, R rows, S row length, M candidates, n records.
"""

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm import costs, fused, heads, lora, losses, packing, reward, shapes, train, tree
from jaxrm.backbones.layers import Config, Decoder, Kind, Rope
from jaxrm.tokens import Tokens

# Lengths


class Profile(NamedTuple):
    """Gamma-distributed lengths: (mean, spread) of prompts and of answers' own tokens."""

    prompt: tuple[float, float]
    answer: tuple[float, float]
    candidates: int
    size: int  # tokens of a pack
    records: int


PROFILES = {
    'hh': Profile((150, 100), (70, 50), 2, 4096, 2048),
    'ultrafeedback': Profile((160, 100), (300, 150), 2, 8192, 2048),
    'ultrafeedback-4': Profile((160, 100), (300, 150), 4, 8192, 2048),
    'best-of-16': Profile((500, 150), (200, 80), 16, 32768, 512),
    'tldr': Profile((360, 80), (35, 12), 2, 8192, 2048),
    'helpsteer': Profile((634, 300), (100, 60), 2, 16384, 2048),  # 6.34 prompts an answer
}
ProfileName = Literal[tuple(PROFILES)]  # of flags: another name is refused where they are read


def gamma(rng: np.random.Generator, mean_spread: tuple[float, float], size: int) -> np.ndarray:
    """int64 [size], at least 1."""
    mean, spread = mean_spread
    shape = (mean / spread) ** 2
    return np.maximum(1, rng.gamma(shape, mean / shape, size).round()).astype(np.int64)


def trees(prompt_n: np.ndarray, own_nM: np.ndarray, *, vocabulary: int, seed: int = 0) -> Tokens:
    """Records of these lengths with random ids, the first candidate best."""
    n, M = own_nM.shape
    total = prompt_n + own_nM.sum(1)
    rng = np.random.default_rng([seed, 1])
    return Tokens(
        ids=rng.integers(0, vocabulary, total.sum(), dtype=np.int32),
        start=np.append(0, np.cumsum(total)),
        prompt=prompt_n.astype(np.int32),
        gate=(prompt_n - 1).astype(np.int32),
        first=np.arange(n + 1) * M,
        length=own_nM.ravel().astype(np.int32),
        rank=np.tile(np.arange(M), n).astype(np.int32),
        margin=np.zeros(n * M, np.float32),
        rating=np.zeros((n * M, 0), np.float32),
        smoothing=np.zeros(n, np.float32),
        group=np.full(n, -1, np.int32),
        record=np.arange(n),
        candidate=np.tile(np.arange(M), n).astype(np.int32),
    )


def data(profile: Profile, *, vocabulary: int, seed: int = 0) -> Tokens:
    """The records of a profile."""
    rng = np.random.default_rng(seed)
    prompt = gamma(rng, profile.prompt, profile.records)
    own = gamma(rng, profile.answer, profile.records * profile.candidates)
    return trees(prompt, own.reshape(len(prompt), -1), vocabulary=vocabulary, seed=seed)


def rows(t: Tokens) -> list[tuple[list[int], list[int]]]:
    """The token ids of each pair's chosen and rejected row."""
    out = []
    for i in range(len(t.prompt)):
        ids = t.ids[t.start[i] : t.start[i + 1]]
        prompt, ends = ids[: t.prompt[i]], np.cumsum(t.length[t.first[i] : t.first[i + 1]])
        own = np.split(ids[t.prompt[i] :], ends[:-1])
        order = np.argsort(t.rank[t.first[i] : t.first[i + 1]], kind='stable')
        out.append(tuple(np.concatenate([prompt, own[m]]).tolist() for m in order))
    return out


# Models


_LLAMA3 = (Kind(rope=Rope(500_000.0)),)
MODELS = {
    'llama-3-8b': Config(V=128256, D=4096, F=14336, L=32, Q=32, K=8, H=128, kinds=_LLAMA3),
    'llama-3.2-1b': Config(
        V=128256, D=2048, F=8192, L=16, Q=32, K=8, H=64, tied=True, kinds=_LLAMA3
    ),
    'tiny': Config(V=512, D=64, F=128, L=3, Q=4, K=2, H=16),
}
ModelName = Literal[tuple(MODELS)]


def model(c: Config, dtype: Any, attention: Any, remat: str = 'none') -> reward.RewardModel:
    """A scalar reward model of these sizes."""
    return reward.RewardModel(Decoder(c, dtype, attention, remat), heads.Scalar(), 2.0)


def parameters(c: Config, rank: int = 16, dtype: Any = jnp.float32) -> tree.Tree:
    """Shapes of a backbone in `dtype`, of an adapter on all its linears, and of a head."""
    rm = model(c, dtype, None)
    key = jax.eval_shape(lambda: jax.random.key(0))
    backbone = jax.eval_shape(rm.init_backbone, key)
    adapter = jax.eval_shape(lambda: lora.init(backbone, jax.random.key(0), rank=rank))
    backbone = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), backbone)
    return {
        'backbone': backbone,
        'lora': adapter,
        'head': {'kernel': jax.ShapeDtypeStruct((c.D, 1), jnp.float32)},
    }


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _normal(
    key: jax.Array, scale: float, shape: tuple[int, ...], dtype: Any, stacked: bool
) -> jax.Array:
    """Of layers one by one: random bits take several times the memory of what is made of them."""
    if stacked:
        keys = jax.random.split(key, shape[0])
        return jax.lax.map(lambda k: _normal(k, scale, shape[1:], dtype, False), keys)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)


def drawn(shapes: tree.Tree, seed: int = 0) -> tree.Tree:
    """Random values for every leaf, made on the device: norms about 1, matrices by their width.

    Leaves may be those of a fused backbone. What differs in shape is compiled at the same time.
    """
    key = jax.random.key(seed)
    leaves = {n: (x.shape, x.dtype, 'layers' in n) for n, x in tree.flatten(shapes).items()}
    lower = functools.partial(_normal.lower, key, 1.0)
    with ThreadPoolExecutor(8) as pool:
        jobs = {of: pool.submit(lower(*of).compile) for of in set(leaves.values())}
        made = {of: job.result() for of, job in jobs.items()}

    def draw(name: str, of: Any) -> jax.Array:
        x = made[of](jax.random.fold_in(key, hash_of(name)), _scale(name, of[0]))
        return 1 + x if name.endswith('scale') else x

    return tree.unflatten({name: draw(name, of) for name, of in leaves.items()})


def _scale(name: str, shape: tuple[int, ...]) -> float:
    """The spread of a leaf's values."""
    if name.endswith('scale'):
        return 0.1
    wide = name.split('/')[-2] in fused.NAMES.values()
    return 0.01 if name.endswith('/b') else shape[-3 if wide else -2] ** -0.5


def hash_of(text: str) -> int:
    """The same number for the same text in every process."""
    return int.from_bytes(text.encode(), 'little') % (2**31 - 1)


def shapes_of(values: Any) -> Any:
    """Arrays as shapes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), values)


# Batches of pairs, a row each, padded to their longest


def pair_objective(score: Callable[..., jax.Array]) -> train.Objective:
    """`train.preference` of rows of one candidate each, in pairs: [2B, 1] scores."""

    def pairs(x: jax.Array) -> jax.Array:
        return x.reshape(-1, 2, *x.shape[3:])

    def objective(params: tree.Tree, pack: packing.Pack, key: jax.Array) -> Any:
        score_BM = score(params, pack).reshape(-1, 2)
        loss_B = losses.bradley_terry(
            score_BM,
            pairs(pack.rank_PBM),
            margin_BM=pairs(pack.margin_PBM),
            smoothing_B=jnp.zeros(len(score_BM)),
        )
        count = jnp.int32(len(score_BM))
        return loss_B.mean(), {'count': count}

    return objective


def packed(
    t: Tokens, size: int, width: int = 4096, multiple: int = 128
) -> tuple[packing.Shape, list[np.ndarray]]:
    """The pack shape that the library chooses, and all packs of an epoch, by records."""
    shape = shapes.fit(t, size=size, width=width, multiple=multiple)
    order = np.random.default_rng(0).permutation(len(t.prompt))
    return shape, packing.plan(t, shape, order=order)


def mean_size(t: Tokens, records: int) -> int:
    """Tokens of so many records in the mean."""
    return int(np.diff(t.start).mean() * records)


def longest(t: Tokens, records: np.ndarray) -> int:
    """The longest row of some records."""
    row_nM = packing.row_lengths(t).reshape(len(t.prompt), -1)
    return int(row_nM[records].max())


def of_rows(rows: Sequence[tuple[int, int]]) -> costs.Load:
    """The load of rows of a candidate each, (how many, padded to what length)."""
    count, slots = sum(r for r, _ in rows), sum(r * s for r, s in rows)
    return costs.Load(slots, tuple(rows), 2 * count, 2 * slots, count)


def padded(t: Tokens, batch: int, multiple: int = 1, seed: int = 0) -> list[tuple[int, int]]:
    """(rows, length) of random batches of all records, each padded to its longest row."""
    order = np.random.default_rng(seed).permutation(len(t.prompt))
    M = int(np.diff(t.first)[0])
    parts = np.split(order, range(batch, len(order), batch))
    return [(M * len(part), -(-longest(t, part) // multiple) * multiple) for part in parts]


# Timing


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 3,
    until: float | None = None,
    least: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each call, by round; they take turns, so that others' work falls on all.

    After `least` rounds it ends at the time `until` (of time.monotonic).
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(warmup + rounds):
        if until is not None and i >= warmup + least and time.monotonic() > until:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            spent[name].append(time.perf_counter() - start)
    return {name: seconds[warmup:] for name, seconds in spent.items()}


def timed(fn: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and the seconds it took."""
    start = time.perf_counter()
    return fn(), time.perf_counter() - start


def why(error: Exception) -> dict[str, str]:
    """{'failed': ...}, in a line."""
    return {'failed': f'{type(error).__name__}: {" ".join(str(error).split())[:500]}'}


def kept(makers: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each gives, and {'failed': why} of those that give nothing."""
    found, failed = {}, {}
    for name, maker in makers.items():
        try:
            found[name] = maker()
        except Exception as error:  # the others are worth having without it
            failed[name] = why(error)
    return found, failed


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, mid, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(mid), float(low), float(high)


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles of a / b, round by round."""
    return spread(np.divide(a, b))


def said(found: tuple[float, float, float], digits: int = 2) -> str:
    """'1.50 (1.45 to 1.52)'."""
    mid, low, high = (f'{x:.{digits}f}' for x in found)
    return f'{mid} ({low} to {high})'


def machine() -> dict[str, Any]:
    """What ran it."""
    device = jax.devices()[0]
    return {
        'jax': jax.__version__,
        'python': platform.python_version(),
        'backend': jax.default_backend(),
        'device': device.device_kind,
        'devices': jax.device_count(),
        'cpus': len(os.sched_getaffinity(0)),
        'xla_flags': os.environ.get('XLA_FLAGS', ''),
    }


def write(path: Path, value: Any) -> None:
    """A result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    part.write_text(json.dumps(value, indent=1) + '\n')
    part.replace(path)
