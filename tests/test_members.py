"""Members of one program: each is as it would be alone, and nothing shared is copied."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain
import pytest
import train_tiny

from jaxrm import (
    flops,
    heads,
    logs,
    lora,
    members,
    packing,
    resume,
    reward,
    sharding,
    train,
)
from jaxrm.backbones.layers import Decoder

E, STEPS, P = 3, 5, 2
SHAPE = train_tiny.SHAPE
# A large eps keeps rounding from turning into steps.
TX = train.adamw(train.schedule(0.01, 8), weight_decay=0.1, max_grad_norm=0.5, eps=1e-3)
# Of so many times one's temporary memory. By vmap a CPU misses the aim of 1.05: its compiler turns
# batches of matrices around. It is 1.13 to 1.15 at 512 tokens (experiments/members_cost.py).
ROOM = {'scan': 1.05, 'vmap': 1.25}
TOKENS = plain.random_tokens([2, 3, 2, 2] * 5)
ONE = sharding.make_mesh(devices=jax.devices()[:1])
SLOW = [pytest.param(*part, marks=pytest.mark.slow) for part in ((False, 'scan'), (True, 'vmap'))]
PARTS = [(False, 'vmap'), (True, 'scan'), *SLOW]


@functools.cache
def model(layers):
    """(objective, frozen, trainable): one layer, since each of these programs is compiled."""
    rm, _, frozen, trainable = train_tiny.model(dataclasses.replace(plain.TINY, L=layers))
    return train.preference(rm.score), frozen, trainable


def starts(full, count=E, layers=1):
    """Trees that differ in every leaf, and what stays."""
    _, frozen, like = model(layers)
    if full:
        like, frozen = {'head': like['head'], **frozen}, {}
    return [plain.random_tree(like, e, 0.5) for e in range(count)], frozen


def sources(count=E, packs=P):
    base = packing.Batches(TOKENS, SHAPE, packs, seed=3)
    return [base.reordered(10 + e) for e in range(count)]


def begin(full, how, count=E, layers=1, packs=P, mesh=ONE):
    """(state, frozen, batches, key), the arguments of the step; `how` None is one alone."""
    trees, frozen = starts(full, count if how else 1, layers)
    of, key = sources(len(trees), packs), members.keys(range(len(trees)))
    if how is None:
        return train.start(trees[0], TX, mesh), frozen, of[0], key[0]
    batches = members.Batches(of, [STEPS] * count)
    return members.start(members.stack(trees), TX, mesh), frozen, batches, key


def step_of(how, layers=1):
    """The step as a function of four arguments."""
    options = {'objective': model(layers)[0], 'tx': TX}
    if how is None:
        return functools.partial(train.step, **options)
    return functools.partial(members.step, how=how, **options)


@functools.cache
def program(full, how, count=E, layers=1):
    """The step, compiled ahead of time: for arrays of other shapes it would raise."""
    state, frozen, batches, key = begin(full, how, count, layers)
    batch = sharding.place_batch(batches(0), ONE)
    with jax.set_mesh(ONE):
        update = train.jitted(state, ONE, step=step_of(how, layers))
        return update.lower(state, sharding.place(frozen, ONE), batch, key).compile()


def run(update, state, frozen, batches, key, mesh=ONE, steps=STEPS):
    """(metrics [..., steps] by name, state) of so many updates."""
    said, frozen = [], sharding.place(frozen, mesh)
    for i in range(steps):
        with jax.set_mesh(mesh):
            state, metrics = update(state, frozen, sharding.place_batch(batches(i), mesh), key)
        said.append(metrics)
    return {name: np.stack([m[name] for m in said], axis=-1) for name in said[0]}, state


@functools.cache
def alone(full, count=E, layers=1):
    """(metrics, state) of each member in a run of its own."""
    trees, frozen = starts(full, count, layers)
    update = program(full, None, layers=layers)
    return [
        run(update, train.start(w, TX, ONE), frozen, of, key)
        for w, of, key in zip(trees, sources(count), members.keys(range(count)), strict=True)
    ]


def assert_as_alone(full, how, count=E, layers=1):
    said, state = run(program(full, how, count, layers), *begin(full, how, count, layers))
    assert np.ptp(said['loss'], axis=0).min() > 1e-2  # members do differ
    for e, (want, at_end) in enumerate(alone(full, count, layers)):
        assert said.keys() - want.keys() == {'active'}
        for name in want:
            np.testing.assert_allclose(said[name][e], want[name], rtol=1e-5, atol=1e-5)
        got = members.select(state.trainable, e)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(at_end.trainable), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
    assert int(state.step) == STEPS
    counts = [x.tolist() for x in jax.tree.leaves(state.opt) if x.ndim == 1]
    assert counts == [[STEPS] * count] * 2  # of the moments and the schedule


@pytest.mark.parametrize(('full', 'how'), PARTS)
def test_each_member_is_as_in_a_run_of_its_own(full, how):
    assert_as_alone(full, how)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['vmap', 'scan'])
@pytest.mark.parametrize('full', [False, True])
def test_ten_members_are_as_in_runs_of_their_own(full, how):
    assert_as_alone(full, how, 10, 3)
    one, ten = (program(full, h, n, 3).memory_analysis() for h, n in ((None, E), (how, 10)))
    assert ten.temp_size_in_bytes <= 10 * one.temp_size_in_bytes * ROOM[how]


def nbytes(*arrays):
    return sum(x.nbytes for x in jax.tree.leaves(arrays))


@pytest.mark.parametrize(('full', 'how'), PARTS)
def test_arguments_are_one_backbone_and_a_state_and_a_batch_each(full, how):
    state, frozen, *_ = begin(full, None)
    one, all_of = (program(full, h).memory_analysis() for h in (None, how))
    own = nbytes(state.trainable, state.opt)
    batch = one.argument_size_in_bytes - nbytes(frozen, state)  # what is read of it, and the key
    assert 0 < batch < nbytes(sources(1)[0](0)) + 9
    want = nbytes(frozen, state.step) + E * (own + batch) + E * P  # and who is active
    assert all_of.argument_size_in_bytes == want
    assert all_of.alias_size_in_bytes == nbytes(state.step) + E * own  # donated


@pytest.mark.parametrize(('full', 'how'), PARTS)
def test_work_and_memory_are_those_of_so_many_steps(full, how):
    def count(how):
        state, frozen, batches, key = begin(full, how)
        return flops.count(step_of(how), state, frozen, batches(0), key)

    assert count(how) == E * count(None) > 0
    one, all_of = (program(full, h).memory_analysis().temp_size_in_bytes for h in (None, how))
    assert all_of <= E * one * ROOM[how]


def shapes_in(jaxpr):
    """The shapes of all values in a jaxpr, those of its inner ones included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in flops.inner(equation):
            yield from shapes_in(inner)


def copies_of(base, fn, *args):
    """Shapes in fn(*args) of E matrices of the base, whole or of one layer, in any order."""
    shapes = [x.shape for x in jax.tree.leaves(base)]
    shapes += [shape[1:] for shape in shapes if len(shape) == 3]
    copy = {tuple(sorted((E, *shape))) for shape in shapes if len(shape) > 1}
    found = {tuple(s) for s in shapes_in(jax.make_jaxpr(fn)(*args).jaxpr)}
    return {s for s in found if tuple(sorted(s)) in copy}


@pytest.mark.parametrize('how', ['vmap', pytest.param('scan', marks=pytest.mark.slow)])
def test_no_member_has_a_copy_of_the_base(how):
    config = dataclasses.replace(plain.TINY, L=6, D=22, F=26, H=14)  # sizes like no other
    rm = reward.RewardModel(Decoder(config), heads.Scalar())
    batch, keys = members.Batches(sources())(0), members.keys(range(E))
    base = jax.eval_shape(rm.init_backbone, keys[0])
    make = lambda key: {'lora': lora.init(base, key, rank=2), 'head': rm.init_head(key, 22)}  # noqa: E731
    mine = jax.eval_shape(jax.vmap(make), keys)
    objective = train.preference(rm.score)

    def trained(mine, base):
        state = train.State(jnp.zeros((), jnp.int32), mine, jax.vmap(TX.init)(mine))
        options = {'how': how, 'objective': objective, 'tx': TX}
        return members.step(state, {'backbone': base}, batch, keys, **options)

    def copied(mine, base):
        """What it would be like."""
        each = jax.tree.map(lambda x: jnp.broadcast_to(x, (E, *x.shape)), base)
        whole = {**mine, 'backbone': each}
        return jax.vmap(objective, in_axes=(0, 1, 0))(whole, batch.of, keys)

    assert copies_of(base, trained, mine, base) == set()
    found = copies_of(base, copied, mine, base)
    assert {(E, *x.shape) for x in jax.tree.leaves(base) if len(x.shape) > 2} <= found


@pytest.mark.parametrize('how', ['vmap', 'scan'])
def test_members_have_masks_of_their_own_as_they_would_alone(how):
    def objective(params, x_PND, key):
        keep = jax.random.bernoulli(key, 0.5, (*x_PND.shape[:2], 1))
        rewards = x_PND @ params['head']['kernel']
        return jnp.where(keep, rewards, 0).mean(), {'count': jnp.int32(1)}

    options = {'objective': objective, 'tx': optax.sgd(0.1)}
    w, x = {'head': {'kernel': jnp.ones((4, 1))}}, jnp.arange(32.0).reshape(1, 8, 4)
    state = members.start(members.stack([w] * E), options['tx'], ONE)
    key, batch = members.keys(range(E)), jnp.stack([x] * E, axis=1)
    _, said = members.step(state, {}, batch, key, how=how, **options)
    one = train.start(w, options['tx'], ONE)
    want = [train.step(one, {}, x, k, **options)[1]['loss'] for k in key]
    np.testing.assert_allclose(said['loss'], want, rtol=1e-6)
    assert len(set(map(float, want))) == E


# Batches


def test_a_members_order_is_its_own_and_a_permutation_of_the_same_packs():
    base = packing.Batches(TOKENS, SHAPE, 1, seed=3, epochs=2)
    plans = [base, *(base.reordered(e) for e in (0, 1, 1))]
    steps = {len(b) for b in plans}
    seen = [[b(i).record_PB.tobytes() for i in range(len(b))] for b in plans]
    (steps,) = steps
    each = steps // 2
    assert each * 2 == steps
    for own in seen:
        assert sorted(own[:each]) == sorted(seen[0][:each])
        assert sorted(own[each:]) == sorted(seen[0][each:])
    assert seen[0] != seen[1] != seen[2] == seen[3]
    again = packing.Batches(TOKENS, SHAPE, 1, seed=3, epochs=2).reordered(1)
    assert again(steps - 1).record_PB.tobytes() == seen[2][-1]  # of i alone
    assert base.reordered(1).counts(steps)[-1].tolist() == base.counts(steps)[-1].tolist()


def test_members_with_labels_of_their_own():
    rng = np.random.default_rng(0)
    other = TOKENS._replace(
        rank=TOKENS.rank[::-1].copy(),
        margin=rng.normal(size=len(TOKENS.margin)).astype(np.float32),
        smoothing=rng.uniform(size=len(TOKENS.smoothing)).astype(np.float32),
    )
    base = packing.Batches(TOKENS, SHAPE, 2, seed=3)
    batch, active_PE = members.Batches([base.reordered(0), base.reordered(0, other)])(1)
    np.testing.assert_array_equal(batch.ids_PN[:, 0], batch.ids_PN[:, 1])
    own = base.reordered(0)(1)
    for name in ('rank_PBM', 'margin_PBM', 'smoothing_PB', 'read', 'slot'):
        first = jax.tree.map(lambda x: x[:, 0], getattr(batch, name))
        jax.tree.map(np.testing.assert_array_equal, first, getattr(own, name))
    for p, b in zip(*np.nonzero(own.record_PB >= 0), strict=True):
        r = own.record_PB[p, b]
        at = slice(TOKENS.first[r], TOKENS.first[r + 1])
        n = at.stop - at.start
        np.testing.assert_array_equal(batch.rank_PBM[p, 1, b, :n], other.rank[at])
        np.testing.assert_array_equal(batch.margin_PBM[p, 1, b, :n], other.margin[at])
        assert batch.smoothing_PB[p, 1, b] == other.smoothing[r]
    assert active_PE is None
    with pytest.raises(ValueError, match='their length is not that of the packs'):
        base.reordered(0, TOKENS._replace(length=TOKENS.length + 1))


def test_a_member_without_batches_left_is_frozen_bit_for_bit():
    """Experts of other data, of which the second has two batches and then none."""
    trees, frozen = starts(False)
    parts = [packing.Batches(plain.random_tokens([2] * n, seed=n), SHAPE, P, seed=0, epochs=1)
             for n in (40, 20, 60)]  # fmt: skip
    steps = [5, 2, 4]
    assert all(len(part) >= n for part, n in zip(parts, steps, strict=True))
    batches, key = members.Batches(parts, steps), members.keys(range(E))
    assert len(batches) == 5
    update = program(False, 'vmap')
    state = members.start(members.stack(trees), TX, ONE)
    at = {}
    for i in range(len(batches)):
        said, state = run(update, state, frozen, lambda _, i=i: batches(i), key, steps=1)
        at[i] = jax.tree.map(np.asarray, state)
        active = [i < n for n in steps]
        assert said['active'][:, 0].tolist() == active
        assert np.isfinite(said['loss'][:, 0]).tolist() == active
        assert (said['count'][:, 0] > 0).tolist() == active
    for e, n in enumerate(steps):
        own = [members.select(at[i][1:], e) for i in range(5)]
        for i in range(n, 5):
            jax.tree.map(np.testing.assert_array_equal, own[i], own[n - 1])
        _, want = run(program(False, None), train.start(trees[e], TX, ONE), frozen, parts[e],
                      key[e], steps=n)  # fmt: skip
        for x, y in zip(jax.tree.leaves(own[-1][0]), jax.tree.leaves(want.trainable), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-4)
        assert own[-1][1][1][0].count == n
    assert int(state.step) == 5


# The loop around it


def test_fit_log_and_restart(tmp_path, monkeypatch):
    """One compilation, lines of means and spreads, and a restart with the same bits."""
    compiled, jitted = [], train.jitted
    monkeypatch.setattr(train, 'jitted', lambda *args, **o: note(jitted(*args, **o)))

    def note(update):
        compiled.append(update)
        return update

    def go(upto):
        state, frozen, batches, key = begin(False, 'vmap')
        state = resume.restore(tmp_path / 'saved', state, run={'a': 1})
        log = logs.Log(tmp_path, steps=STEPS, start=int(state.step), logging_steps=2)
        saver = resume.Saver(
            tmp_path / 'saved', steps=upto, every=upto, run={'a': 1}, before=log.flush
        )
        with log, saver:
            return train.fit(
                state, frozen, batches, key, objective=model(1)[0], tx=TX, mesh=ONE, steps=upto,
                step=functools.partial(members.step, how='vmap'), hooks=[(1, log), (1, saver)],
            )  # fmt: skip

    go(2)
    found = go(STEPS)
    assert [update._cache_size() for update in compiled] == [1, 1]
    said, state = run(program(False, 'vmap'), *begin(False, 'vmap'))
    jax.tree.map(np.testing.assert_array_equal, found, state)
    lines = logs.read(tmp_path / 'metrics.jsonl')
    assert [line['step'] for line in lines] == [1, 2, 3, 4, 5]
    for name in ('loss', 'accuracy', 'grad_norm', 'count'):
        both = [[line[name], line[f'{name}_std']] for line in lines]
        want = np.stack([said[name].mean(0), said[name].std(0)], axis=-1)
        np.testing.assert_allclose(both, want, rtol=1e-5, atol=1e-7)
    assert [line['active'] for line in lines] == [1] * STEPS


MESH = sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize('full', [False, True])
def test_members_are_not_split(full):
    state, *_ = begin(full, 'scan', layers=3, mesh=MESH)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    where = {sharding.leaf_name(path): tuple(x.sharding.spec) for path, x in leaves}
    assert all(not spec or spec[0] is None for spec in where.values())
    part = 'trainable/backbone/layers/q/kernel' if full else 'trainable/lora/layers/q/b'
    assert where[part] == (None, None, 'fsdp' if full else None, 'tensor')
    moments = [spec for name, spec in where.items() if name.endswith('layers/q/kernel')]
    assert len(moments) == (3 if full else 0)


@pytest.mark.slow
@pytest.mark.parametrize('how', ['vmap', 'scan'])
@pytest.mark.parametrize('full', [False, True])
def test_a_mesh_changes_nothing(full, how):
    """Packs over four parts, weights split and shared out."""
    found = []
    for mesh in (MESH, ONE):
        state, *rest = begin(full, how, layers=3, packs=4, mesh=mesh)
        update = train.jitted(state, mesh, step=step_of(how, 3))
        found.append(run(update, state, *rest, mesh=mesh, steps=2)[0])
    for name, want in found[1].items():
        np.testing.assert_allclose(found[0][name], want, rtol=1e-4, atol=1e-5, err_msg=name)
