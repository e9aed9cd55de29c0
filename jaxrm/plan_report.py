"""A plan as values of JSON, and as the text that says the same numbers."""

from collections.abc import Iterator
from typing import Any

from jaxrm import costs, plan

Found = dict[str, Any]
METHODS: dict[costs.Learns, str] = {'adapter': 'lora', 'everything': 'full', 'nothing': 'score'}


def _run(found: plan.Estimate) -> Found:
    run = found.run
    return {
        'fits': found.fits,
        'tokens': run.tokens,
        'mesh': run.mesh._asdict(),
        'remat': run.method.remat,
        'total': found.total,
        'memory': run.machine.chip.memory,
        'seconds': found.bound,
        'limit': found.limit,
        'tokens_per_second': run.tokens * run.method.members / found.bound,
    }


def of(model: str, best: plan.Estimate, most: plan.Estimate | None) -> Found:
    """The plan of a run; `most` is that of the largest token budget."""
    run = best.run
    return {
        'model': model,
        'method': METHODS[run.method.learns],
        'machine': run.machine.name,
        'chips': run.machine.chips,
        'parameters': costs.elements(costs.backbone_leaves(run.config)),
        'adapter': costs.elements(costs.adapter_leaves(run.config, run.method)),
        'members': run.method.members,
        **_run(best),
        'pack': run.shape._asdict(),
        'bytes': best.held,
        'sent': [one._asdict() for one in best.sent],
        'sent_total': sum(one.bytes for one in best.sent),
        'flops': best.flops,
        'times': best.seconds,
        'largest': _run(most) if most else None,
        'compiled': None,
    }


def compiled(found: Found, measured: Found) -> Found:
    """The plan with what a compiler measured, and how far off the formulas are."""
    if not measured['fits']:
        return {**found, 'compiled': measured}
    held = found['bytes']
    arguments = held['weights'] + held['adapters'] + held['moments']
    temporary = held['gradients'] + held['activations'] + held['workspace']
    sent = sum(measured['sent'].values())
    ratios = {
        'arguments': measured['arguments'] / arguments,
        'temporary': measured['temporary'] / temporary,
        'total': (measured['arguments'] + measured['temporary']) / found['total'],
        'sent': sent / found['sent_total'] if found['sent_total'] else None,
    }
    return {**found, 'compiled': {**measured, 'sent_total': sent, 'measured_over_planned': ratios}}


# Text


def _bytes(n: float) -> str:
    return f'{n / 1e9:,.3f} GB' if n >= 1e6 else f'{n / 1e3:,.3f} kB'


def _seconds(x: float) -> str:
    return f'{x:,.3f} s' if x >= 1 else f'{x * 1e3:,.2f} ms'


def _mesh(sizes: dict[str, int]) -> str:
    return ' x '.join(f'{name} {n}' for name, n in sizes.items() if n > 1) or 'one chip'


def _line(run: Found) -> str:
    return (
        f'{run["tokens"]:,} tokens a step, mesh {_mesh(run["mesh"])}, remat {run["remat"]}: '
        f'{_bytes(run["total"])} a chip of {_bytes(run["memory"])}, of which {1 - plan.SHARE:.0%} '
        'stay free, '
        f'at the least {_seconds(run["seconds"])} a step ({run["limit"]})'
    )


def lines(found: Found) -> Iterator[str]:
    """What to print."""
    many = f', {found["members"]} members' if found['members'] > 1 else ''
    learning = f', adapter of {found["adapter"]:,}' if found['adapter'] else ''
    yield (
        f'{found["model"]} ({found["parameters"]:,} parameters{learning}), {found["method"]}{many}'
        f', on {found["machine"]} ({found["chips"]} chips)'
    )
    yield f'{"fits" if found["fits"] else "DOES NOT FIT"}: {_line(found)}'
    pack = found['pack']
    rows = ', '.join(f'{r} of {s}' for r, s in pack['rows'])
    yield f'pack of a data shard: {pack["tokens"]:,} tokens; rows {rows}'
    yield 'bytes of a chip:'
    for name, n in found['bytes'].items():
        yield f'  {name:<14}{_bytes(n):>14}'
    yield f'a chip sends {_bytes(found["sent_total"])} a step:'
    for one in found['sent']:
        yield f'  {one["what"]:<14}{_bytes(one["bytes"]):>14}  {one["kind"]}'
    yield f'a step takes {found["flops"] / 1e12:,.1f} TFLOP; at the least:'
    for name, x in found['times'].items():
        yield f'  {name:<14}{_seconds(x):>14}'
    yield f'  so at most {found["tokens_per_second"]:,.0f} tokens/s, limited by {found["limit"]}'
    most = found['largest']
    yield f'largest that fits: {_line(most)}' if most else 'largest that fits: none'
    if found['compiled']:
        yield from _compiled(found['compiled'])


def _compiled(said: Found) -> Iterator[str]:
    versions = f'libtpu {said["libtpu"]}, jax {said["jax"]}'
    if not said['fits']:
        yield f'the compiler ({versions}) refuses it: {said["why"]}'
        return
    ratio = said['measured_over_planned']
    times = lambda name: f'{ratio[name]:.2f} of the plan' if ratio[name] else 'none planned'  # noqa: E731
    yield f'compiled in {said["seconds"]} s ({versions}), and fits:'
    for name in ('arguments', 'temporary'):
        yield f'  {name:<14}{_bytes(said[name]):>14}  {times(name)}'
    yield f'  {"sent":<14}{_bytes(said["sent_total"]):>14}  {times("sent")}'
    for kind, n in said['sent'].items():
        yield f'    {kind:<20}{_bytes(n):>14}'
    yield f'  of the stream beyond embeddings: {_bytes(said["sent_stream"])}'
