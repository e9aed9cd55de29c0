"""Packs against one row per candidate: exact scores, features and gradients, and what they see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from jaxrm import heads, lora, losses, packing, reward, tokens, tree
from jaxrm.backbones.layers import Decoder

C = plain.TINY
# One shape for all data, so that everything here is compiled once; unshared records fit, too.
SHAPE = packing.Shape(tokens=64, rows=((6, 8), (6, 16)), prompts=6, candidates=4)
P, ROWS, RECORDS = 4, 20, 8
OUTSIDE = 36  # an id that no record holds
RM = reward.RewardModel(Decoder(C), heads.Scalar(), lora_scale=0.5)


@functools.cache
def shapes():
    pack = packing.fill(plain.random_tokens([1]), [np.arange(1)], SHAPE)
    return jax.eval_shape(RM.backbone.init, jax.random.key(0), pack)['params']


@functools.cache
def parameters():
    adapter = lora.init(shapes(), jax.random.key(0), rank=2)
    return {
        'backbone': plain.random_tree(shapes()),
        'lora': plain.random_tree(adapter, 1, 0.5),
        'head': plain.random_tree({'kernel': np.zeros((C.D, 1))}, 2),
    }


def data(candidates, seed):
    return plain.random_tokens(candidates, seed=seed, vocabulary=OUTSIDE)


def packed(t, order=None, packs=None):
    if packs is None:
        packs = packing.plan(t, SHAPE, order=np.arange(len(t.prompt)) if order is None else order)
    return packing.fill(t, packs, SHAPE, count=P)


def forward(params, pack):
    """Scores and features, by the program that also gives gradients: compiling takes long."""
    return packed_gradients(params, pack, np.zeros(pack.rank_PBM.shape))[2]


def by_record(pack, values):
    """{record: value} of values [B, ...]."""
    return {
        int(i): np.asarray(v) for i, v in zip(pack.record_PB.ravel(), values, strict=True) if i >= 0
    }


def total(score_BM, prompt_BD, rank_BM, weight_BM):
    """A number in which every candidate and every prompt counts, and Bradley-Terry besides."""
    direction = np.random.default_rng(3).normal(size=(1, C.D)) / 4
    gate_B = jnp.tanh((prompt_BD * direction).sum(-1)) * jnp.abs(weight_BM).sum(1)
    own_BM = jnp.tanh(score_BM) * weight_BM
    return losses.bradley_terry(score_BM, rank_BM).sum() + own_BM.sum() + gate_B.sum()


@jax.jit
def packed_gradients(params, pack, weight_PBM):
    def loss(params):
        z = RM.features(params, pack)
        score_BM = RM.head.apply({'params': params['head']}, z.answer_BMD)
        merge = lambda x: x.reshape(-1, 4)  # noqa: E731
        value = total(score_BM, z.prompt_BD, merge(pack.rank_PBM), merge(weight_PBM))
        return value, (score_BM, *z)

    (value, seen), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return value, gradients, seen


@jax.jit
def padded_gradients(params, pack, at_BM, rank_BM, weight_BM):
    """The same from one row per candidate; at_BM says which row holds which."""

    def loss(params):
        z = RM.features(params, pack)
        score_R = RM.head.apply({'params': params['head']}, z.answer_BMD)[:, 0]
        value = total(score_R[at_BM], z.prompt_BD[at_BM[:, 0]], rank_BM, weight_BM)
        return value, (score_R, z.answer_BMD[:, 0], z.prompt_BD)

    (value, seen), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return value, gradients, seen


def both(t, pack):
    """(value, gradients, (scores, answers, prompts)) of the pack and of one row per candidate."""
    n, rng = len(t.prompt), np.random.default_rng(5)
    at_BM, rank_BM = np.zeros((RECORDS, 4), int), np.full((RECORDS, 4), -1)
    weight_BM, weight_PBM = np.zeros((RECORDS, 4)), np.zeros(pack.rank_PBM.shape)
    for i in range(n):
        M = t.first[i + 1] - t.first[i]
        at_BM[i, :M] = t.first[i] + np.arange(M)
        rank_BM[i, :M] = t.rank[t.first[i] : t.first[i + 1]]
        weight_BM[i, :M] = rng.normal(size=M)
    for p, b in np.argwhere(pack.record_PB >= 0):
        weight_PBM[p, b] = weight_BM[pack.record_PB[p, b]]
    rows = packing.padded(t, np.arange(n), (ROWS, 16))
    want = padded_gradients(parameters(), rows, at_BM, rank_BM, weight_BM)
    return packed_gradients(parameters(), pack, weight_PBM), want


def assert_gradients_close(got, want, relative=1e-5):
    got, want = tree.flatten(got), tree.flatten(want)
    for name, x in want.items():
        own = float(jnp.abs(x).max())
        assert own > 0, name
        np.testing.assert_allclose(got[name] / own, x / own, rtol=0, atol=relative, err_msg=name)


CASES = [
    [1, 1, 1],
    [2, 2, 2, 2],
    [3, 3, 3],
    [4, 4, 4, 4],
    [4, 1, 2, 0, 3, 2],
    [0, 2, 0, 1],
    [2],
]


def assert_exact(t, pack):
    (value, gradients, seen), (want, want_gradients, wanted) = both(t, pack)
    assert {x.dtype for x in seen} == {jnp.dtype('float32')}
    score, answer, prompt = (by_record(pack, x) for x in seen)
    assert sorted(score) == list(range(len(t.prompt)))
    for i in score:
        c = slice(t.first[i], t.first[i + 1])
        M = c.stop - c.start
        np.testing.assert_allclose(score[i][:M], wanted[0][c], atol=1e-5)
        np.testing.assert_allclose(answer[i][:M], wanted[1][c], atol=1e-5)
        np.testing.assert_allclose(prompt[i], wanted[2][c.start], atol=1e-5)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert_gradients_close(gradients, want_gradients)


@pytest.mark.parametrize('seed', range(len(CASES)))
def test_packs_equal_one_row_per_candidate(seed):
    t = data(CASES[seed], seed)
    if seed == 4:  # absent and unranked candidates
        rank = t.rank.copy()
        rank[t.first[0] + 1], rank[t.first[4] : t.first[5]] = -1, 0
        t = t._replace(rank=rank)
    assert_exact(t, packed(t))


def test_features_are_the_states_of_the_closing_and_the_last_token():
    t, w = data(CASES[4], 4), parameters()
    pack = packed(t)
    score, answer, prompt = (by_record(pack, x) for x in forward(w, pack))
    rows = [(i, m, ids) for i in range(6) for m, ids in enumerate(plain.rows(t, i))]
    padded = np.array([[*ids, *[0] * (16 - len(ids))] for _, _, ids in rows])
    adapter = lora.scaled(w['lora'], RM.lora_scale)
    states = jax.jit(jax.vmap(lambda ids: plain.states(w['backbone'], ids, C, adapter)))(padded)
    for (i, m, ids), h in zip(rows, np.asarray(states), strict=True):
        np.testing.assert_allclose(answer[i][m], h[len(ids) - 1], atol=1e-5)
        np.testing.assert_allclose(prompt[i], h[t.gate[i]], atol=1e-5)
        reward = h[len(ids) - 1].astype(np.float64) @ w['head']['kernel'][:, 0]
        np.testing.assert_allclose(score[i][m], reward, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(100, 140))
def test_random_packs_equal_one_row_per_candidate(seed):
    rng = np.random.default_rng(seed)
    t = data(rng.integers(0, 5, 5), seed)
    assert_exact(t, packed(t, order=rng.permutation(5)))


@pytest.mark.parametrize('candidates', [[4, 1, 2, 0, 3], [2, 3, 2]])
def test_a_repeated_prompt_changes_nothing(candidates):
    t = data(candidates, 1)
    assert_exact(t, packed(tokens.unshare(t)))


def test_a_score_does_not_depend_on_neighbours_order_or_shape():
    t = data([2, 3, 1, 2, 4], 7)
    want = by_record(packed(t), forward(parameters(), packed(t))[0])
    # alone in the pack, behind and before the same neighbours, in another pack
    for packs in ([[3]], [[3, 0]], [[0, 3]], [[1], [], [2, 3]]):
        pack = packed(t, packs=[np.array(p, np.int64) for p in packs])
        got = by_record(pack, forward(parameters(), pack)[0])
        np.testing.assert_allclose(got[3][:2], want[3][:2], atol=1e-5)
    wide = packing.Shape(tokens=100, rows=((14, 24),), prompts=7, candidates=5)
    pack = packing.fill(t, [np.array([4, 3, 1])], wide)
    got = by_record(pack, jax.jit(RM.score)(parameters(), pack))
    for i in (1, 3, 4):
        M = t.first[i + 1] - t.first[i]
        np.testing.assert_allclose(got[i][:M], want[i][:M], atol=1e-5)


def test_a_score_is_bitwise_the_same_in_the_same_row():
    t = data([2, 2, 2], 8)
    long = np.where(np.arange(6) < 2, 6, 1)  # record 0 has the longest rows, hence the first ones
    total = t.prompt[[0, 0, 0]] + [12, 2, 2]
    ids = np.random.default_rng(0).integers(0, OUTSIDE, total.sum())
    t = t._replace(
        ids=ids.astype(np.int32),
        start=np.append(0, np.cumsum(total)),
        prompt=t.prompt[[0, 0, 0]],
        gate=t.gate[[0, 0, 0]],
        length=long.astype(np.int32),
    )
    score = []
    for mates in ([], [1], [2], [1, 2]):
        pack = packed(t, packs=[np.array([0, *mates])])
        score.append(by_record(pack, forward(parameters(), pack)[0])[0])
    assert len({s[:2].tobytes() for s in score}) == 1


def test_what_stands_on_padding_does_not_matter():
    t = data([2, 3, 1, 2], 9)
    pack = packed(t)
    padding = pack.back_PN == sum(s[0].size for s in pack.slot)
    assert padding.any()
    dirty = pack._replace(ids_PN=np.where(padding, OUTSIDE, pack.ids_PN).astype(np.int32))
    scores = [by_record(x, forward(parameters(), x)[0]) for x in (pack, dirty)]
    for i, M in enumerate([2, 3, 1, 2]):
        np.testing.assert_array_equal(scores[0][i][:M], scores[1][i][:M])
    weight = np.where(pack.rank_PBM >= 0, 1.0, 0.0)
    gradients = [packed_gradients(parameters(), x, weight)[1]['backbone'] for x in (pack, dirty)]
    assert not np.asarray(gradients[1]['embed']['embedding'][OUTSIDE]).any()
    jax.tree.map(np.testing.assert_array_equal, *gradients)


def ancestors(t, pack):
    """[N, N] bool for pack 0: token n sees token k, by the definition of a row."""
    sees = np.zeros((SHAPE.tokens, SHAPE.tokens), bool)
    rows = [row for slot in pack.slot for row in slot[0]]
    for b in np.flatnonzero(pack.record_PB[0] >= 0):
        for m, ids in enumerate(plain.rows(t, pack.record_PB[0, b])):
            at = rows[pack.row_PBM[0, b, m]][: len(ids)]
            for k in range(len(ids)):
                sees[at[k], at[: k + 1]] = True
    return sees


def test_a_state_depends_on_its_own_row_up_to_itself_and_on_nothing_else():
    t = data([2, 0, 4, 1], 11)
    N = SHAPE.tokens
    pack = packing.fill(t, [np.arange(4)], SHAPE)
    pack = pack._replace(ids_PN=np.arange(N, dtype=np.int32)[None])  # an id for every place
    model = Decoder(dataclasses.replace(C, V=N, L=2))
    weights = plain.random_tree(jax.eval_shape(model.init, jax.random.key(0), pack)['params'])
    direction = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, C.D)), jnp.float32)

    def states(table):
        variables = {'params': weights | {'embed': {'embedding': table}}}
        every, chosen = model.apply(variables, pack, read='all'), model.apply(variables, pack)
        return (every * direction).sum(-1)[0], (chosen * direction[None]).sum(-1)[0]

    jacobians = jax.jit(jax.jacrev(states))(weights['embed']['embedding'])
    moves, moves_chosen = (np.abs(x).sum(-1) > 0 for x in jacobians)
    sees = ancestors(t, pack)
    real = sees.any(1)
    np.testing.assert_array_equal(moves[real], sees[real])
    assert not moves[~real][:, real].any()
    used = np.unique(
        [pack.row_PBM[0, b, m] for b in range(4) for m in range(max(1, [2, 0, 4, 1][b]))]
    )
    read = np.concatenate(pack.read, 1)[0]
    for row in used:
        for k in range(2):
            np.testing.assert_array_equal(moves_chosen[row, k], sees[read[row, k]])


# Dropout. In this model, dimension 0 of the residual stream is large and constant, and branch k
# (attention, MLP of each layer in turn) adds the same amount 4**k * STEP to all the others, so
# that the masks of all six branches can be read from the final state like digits.
BIG, STEP, RATE = 1e7, 1.0, 0.5


def digits_model():
    zero = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes())
    zero = tree.map_named(lambda n, x: x + ('norm' in n), zero)
    zero['embed']['embedding'][:, 0] = BIG
    root = C.D**0.5  # what the norm makes of dimension 0
    for layer in range(C.L):
        w, i = (zero['layers'], layer) if layer < C.L - 1 else (zero['top'], ...)
        w['v']['kernel'][i, 0, 0] = 1 / root
        w['o']['kernel'][i, 0, 1:] = STEP * 4 ** (2 * layer)  # query head 0 attends to v head 0
        w['gate']['kernel'][i, 0, 0] = 20 / root
        w['up']['kernel'][i, 0, 0] = 1 / root
        w['down']['kernel'][i, 0, 1:] = STEP * 4 ** (2 * layer + 1) / 20
    return zero


@functools.cache
def masks(seed, rate=RATE):
    """[k, P, N, D - 1] 0 or 2 = 1/(1 - RATE): what each branch's output was multiplied with."""
    t = tokens.unshare(data([2, 3, 1, 2], 9))
    pack = packed(t)
    states = dropped(digits_model(), pack, jax.random.key(seed))
    sums = np.round(np.asarray(states[..., 1:] / states[..., :1], np.float64) * BIG / STEP)
    out = []
    for _ in range(2 * C.L):
        out.append(sums % 4)
        sums = sums // 4
    assert not sums.any()
    return pack, np.stack(out)


@jax.jit
def dropped(backbone, pack, key):
    params = {'backbone': backbone, 'head': {}}
    return RM.states(params, pack, read='all', dropout=RATE, key=key)


def test_dropout_masks_differ_by_layer_branch_and_token():
    pack, mask = masks(0)
    real = pack.back_PN < sum(s[0].size for s in pack.slot)
    mask = mask[:, real]
    assert set(np.unique(mask)) == {0.0, 1 / (1 - RATE)}
    kept = (mask > 0).mean((1, 2))
    np.testing.assert_allclose(kept, 1 - RATE, atol=4 * (0.25 / mask[0].size) ** 0.5)
    for a in range(len(mask)):
        for b in range(a):
            assert 0.3 < (mask[a] == mask[b]).mean() < 0.7
    whole = mask.transpose(1, 0, 2).reshape(real.sum(), -1)
    assert len(np.unique(whole, axis=0)) == real.sum()


def test_dropout_views_of_a_repeated_prompt_are_apart():
    pack, mask = masks(0)
    firsts = np.argwhere((pack.pos_PN == 0) & (pack.back_PN < sum(s[0].size for s in pack.slot)))
    assert len(firsts) == 8  # of each candidate's own copy
    views = mask[:, firsts[:, 0], firsts[:, 1]].transpose(1, 0, 2).reshape(8, -1)
    assert len(np.unique(views, axis=0)) == 8


def test_dropout_follows_its_key_and_is_off_by_default():
    _, first = masks(0)
    _, other = masks(1)
    np.testing.assert_array_equal(masks.__wrapped__(0)[1], first)
    assert 0.3 < (first == other).mean() < 0.7
    pack = packed(data([2, 3], 1))
    text = str(jax.make_jaxpr(RM.score)(parameters(), pack))
    assert 'random' not in text
    assert 'threefry' not in text
    one = functools.partial(RM.score, dropout=0.5, key=jax.random.key(0))
    assert 'random' in str(jax.make_jaxpr(one)(parameters(), pack))
    with pytest.raises(Exception, match=r'(?i)key'):
        jax.eval_shape(functools.partial(RM.score, dropout=0.5), parameters(), pack)


def test_bfloat16_is_finite_and_scores_are_float32():
    pack = packed(data([4, 1, 2, 0, 3], 1))
    half = reward.RewardModel(Decoder(C, dtype=jnp.bfloat16), heads.Scalar(), lora_scale=0.5)

    def pulled(params):
        learning = {k: params[k] for k in ('lora', 'head')}
        score, pull = jax.vjp(lambda w: half.score(params | w, pack), learning)
        return score, pull(jnp.ones_like(score))[0]

    score, gradients = jax.jit(pulled)(parameters())
    assert score.dtype == jnp.float32
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((score, gradients)))
    want = forward(parameters(), pack)[0]
    assert 0 < np.abs(score - want).max() < 0.15 * np.abs(want).max()


@functools.cache
def without_adapter():
    return jax.jit(RM.score)


def test_adapters_equal_folded_weights():
    pack = packed(data([4, 1, 2, 0, 3], 1))
    w = parameters()
    got = forward(w, pack)[0]
    folded = {'backbone': lora.fold(w['backbone'], w['lora'], 0.5), 'head': w['head']}
    want = without_adapter()(folded, pack)
    np.testing.assert_allclose(got, want, atol=1e-5)
    base = without_adapter()({'backbone': w['backbone'], 'head': w['head']}, pack)
    assert np.abs(base - got).max() > 0.05  # the adapter does something
    unfolded = lora.fold(folded['backbone'], w['lora'], -0.5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), unfolded, w['backbone'])


def test_a_zero_b_is_the_base_exactly():
    pack = packed(data([4, 1, 2, 0, 3], 1))
    w = parameters()
    fresh = lora.init(w['backbone'], jax.random.key(0), rank=2)
    got = forward(w | {'lora': fresh}, pack)[0]
    base = without_adapter()({'backbone': w['backbone'], 'head': w['head']}, pack)
    np.testing.assert_array_equal(got, base)


def test_lora_scale_multiplies_the_adapter():
    pack = packed(data([2, 3], 1))
    w = parameters()
    other = reward.RewardModel(RM.backbone, RM.head, lora_scale=2.0)
    want = forward(w | {'lora': lora.scaled(w['lora'], 4.0)}, pack)[0]
    np.testing.assert_allclose(jax.jit(other.score)(w, pack), want, atol=1e-5)


def test_init_head():
    head = RM.init_head(jax.random.key(0), 16)
    assert {n: x.shape for n, x in tree.flatten(head).items()} == {'kernel': (16, 1)}
