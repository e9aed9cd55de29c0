"""What a scored answer costs: one model, an ensemble, and DMoERM's experts one by one or together.

Run:     python -m experiments.dmoerm_cost
Cost:    two minutes on two CPU cores that have nothing else to do
Expect:  the table of costs of DMoERM in BENCHMARKS.md

Random weights and tokens: nothing here depends on what was learned. A call scores `prompts` x
`answers` answers; times are medians over `repeats` calls, memory is what the compiled program asks
for: its arguments (weights among them) and its temporary arrays. One by one is a call for each
expert and one of the MLP, in the memory of the largest. The router reads each prompt once, whatever
the number of its answers.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, dmoerm, scratch
from jaxrm import heads, lora, members, packing, reward, tokens
from jaxrm.backbones.layers import Decoder

LETTERS = 1000  # token ids
ONE_BY_ONE, MLP = 'DMoERM, one by one', 'the MLP'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    hidden_size: int = 256
    num_hidden_layers: int = 6
    experts: int = 5
    members: int = 5
    lora_r: int = 32
    prompts: int = 8
    answers: int = 4
    prompt_length: int = 96
    answer_length: int = 64
    repeats: int = 20


def batch(c: Config, answers: int) -> packing.Pack:
    """One pack of random records."""
    rng, n = np.random.default_rng(0), c.prompts
    count, own = max(answers, 1), c.answer_length * bool(answers)
    size = c.prompt_length + answers * c.answer_length
    candidates = n * count
    some = tokens.Tokens(
        ids=rng.integers(0, LETTERS, n * size).astype(np.int32),
        start=np.arange(n + 1) * size,
        prompt=np.full(n, c.prompt_length, np.int32),
        gate=np.full(n, c.prompt_length - 1, np.int32),
        first=np.arange(n + 1) * count,
        length=np.full(candidates, own, np.int32),
        rank=np.full(candidates, 0 if answers else -1, np.int32),
        margin=np.zeros(candidates, np.float32),
        rating=np.zeros((candidates, 0), np.float32),
        smoothing=np.zeros(n, np.float32),
        group=np.full(n, -1, np.int32),
        record=np.arange(n),
        candidate=np.tile(np.arange(count), n).astype(np.int32) if answers
        else np.full(n, -1, np.int32),
    )  # fmt: skip
    row = c.prompt_length + own
    shape = packing.Shape(n * size, ((candidates, row),), n, count)
    return packing.fill(some, [np.arange(n)], shape)


def programs(c: Config) -> dict[str, tuple[Callable[..., Any], list[tuple[Any, Any]]]]:
    """By name a function of (params, pack), and its calls in turn."""
    config = scratch.tiny(LETTERS, width=c.hidden_size, layers=c.num_hidden_layers)
    decoder, key = Decoder(config), jax.random.key(0)
    rm = reward.RewardModel(decoder, heads.Scalar())
    model, D = dmoerm.mixture_of(rm), c.hidden_size
    base = {'backbone': rm.init_backbone(key), 'head': rm.init_head(key, D)}
    expert_E = dmoerm.experts([base], c.experts, seeds=[0], rank=c.lora_r, targets=lora.QV)
    copies = lambda x: jnp.stack([x] * c.members)  # noqa: E731
    both = base['backbone'], batch(c, c.answers)
    whole = {'backbone': both[0], 'experts': expert_E,
             'head': model.init_head(key, c.experts, D)}  # fmt: skip
    router = reward.RewardModel(decoder, heads.Router(5))
    routing = {'backbone': both[0], 'head': router.init_head(key, D)}
    z = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                     jax.eval_shape(model.features, whole, both[1]))  # fmt: skip
    each = [{'backbone': both[0], **members.select(expert_E, e)} for e in range(c.experts)]
    return {
        'single': (rm.score, [(base, both[1])]),
        f'ensemble of {c.members}': (members.scored(rm.score),
                                     [(({}, jax.tree.map(copies, base)), both[1])]),
        'router': (router.score, [(routing, batch(c, 0))]),
        ONE_BY_ONE: (rm.features, [(one, both[1]) for one in each]),
        MLP: (model.rewards, [({'head': whole['head']}, z)]),
        'DMoERM, together': (model.score, [(whole, both[1])]),
    }  # fmt: skip


def measured(c: Config, fn: Callable[..., Any], calls: list[tuple[Any, Any]]) -> dict[str, float]:
    """Seconds of all calls, and bytes of one."""
    compiled = jax.jit(fn).lower(*calls[0]).compile()
    placed, times = jax.device_put(calls), []
    for _ in range(c.repeats + 2):
        begun = time.perf_counter()
        for params, pack in placed:
            jax.block_until_ready(compiled(params, pack))
        times.append(time.perf_counter() - begun)
    said = compiled.memory_analysis()
    return {'seconds': statistics.median(times[2:]), 'arguments': said.argument_size_in_bytes,
            'temporary': said.temp_size_in_bytes}  # fmt: skip


def main(c: Config) -> None:
    """Measure all, then print."""
    found = {name: measured(c, *of) for name, of in programs(c).items()}
    mlp, one = found.pop(MLP), found[ONE_BY_ONE]
    found[ONE_BY_ONE] = {k: max(x, mlp[k]) for k, x in one.items()}
    found[ONE_BY_ONE]['seconds'] = one['seconds'] + mlp['seconds']
    count, first = c.prompts * c.answers, found['single']['seconds']
    rows = {
        name: [f'{1e3 * x["seconds"] / count:.2f}', f'{x["seconds"] / first:.2f}',
               f'{x["arguments"] / 2**20:.1f}', f'{x["temporary"] / 2**20:.1f}']
        for name, x in found.items()
    }  # fmt: skip
    title = f'width {c.hidden_size}, {c.num_hidden_layers} layers, {c.experts} experts'
    columns = ['ms an answer', 'of single', 'arguments, MiB', 'temporary, MiB']
    common.table(title, rows, columns, paste=True)


if __name__ == '__main__':
    common.launch(Config, main)
