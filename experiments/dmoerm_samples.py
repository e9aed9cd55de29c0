"""Best-of-n on the synthetic world, by the models of the DMoERM experiment.

Answers are of a policy on its way to the shifted one, and their gold is the world's.

Letters: S seeds, K members, C categories, B prompts, N samples of each, c answers.
"""

from typing import Any

import numpy as np

from experiments import dmoerm, dmoerm_arms
from jaxrm import bestofn, members, tokens
from jaxrm.data import Preference
from jaxrm.datasets import synthetic

Array = np.ndarray
SHARED = 16  # answers of a prompt in one record


def sizes(samples: int) -> tuple[int, ...]:
    """1, 2, 4 and so on up to all."""
    return (*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples)


def sampled(w: Any, policy: float) -> tuple[tokens.Tokens, Array, Array]:
    """Answers, `prompts` x `samples` of each category in turn; their gold [B, N]; category [B]."""
    c, records, gold = w.c, [], []
    for name in c.categories:
        made = synthetic.preferences(c.prompts, seed=0, split='test', candidates=c.samples,
                                     policy=policy, labels='none', categories=(name,))  # fmt: skip
        for record in made:
            gold.append([synthetic.gold(record.messages, str(r)).reward for r in record.responses])
            records += [
                Preference(record.messages, record.responses[i : i + SHARED], group=name)
                for i in range(0, c.samples, SHARED)
            ]
    found = tokens.encode(records, w.tokenizer).tokens
    return found, np.array(gold), np.repeat(np.arange(len(c.categories)), c.prompts)


def proxies(w: Any, singles: Any, alone: Any, inner: Any, some: tokens.Tokens, of_B: Array) -> dict:
    """[S, B, N] scores by every proxy; those of one category judge its own prompts alone."""
    S, C, N = len(w.c.seeds), len(w.c.categories), w.c.samples
    shape = dmoerm.shape_of(some, w.rm.backbone.config.D, 8)
    found = dmoerm_arms.scores(w, singles, some, shape).reshape(S, w.c.members, -1)
    out = {'single': found[:, 0]}
    for name, of in (('mean', members.mean), ('WCO', members.wco), ('UWO', members.uwo)):
        out[name] = np.stack([of(members.centred(x_Kc)) for x_Kc in found])
    own = {'no inner layer': np.zeros((S, len(of_B), N)), 'DMoERM': np.zeros((S, len(of_B), N))}
    score_Gc = dmoerm_arms.scores(w, alone, some, shape).reshape(S, C, len(of_B), N)
    for k in range(C):
        mine = np.flatnonzero(some.group == k)
        part = tokens.select(some, mine)
        for s in range(S):
            own['no inner layer'][s, of_B == k] = score_Gc[s, k][of_B == k]
            said = dmoerm_arms.says(w, inner, s * C + k, part, shape)
            own['DMoERM'][s, of_B == k] = said.score_c.reshape(-1, N)
    return {k: x.reshape(S, -1, N) for k, x in {**out, **own}.items()}


def curves(w: Any, singles: Any, alone: Any, inner: Any, policy: float) -> dict[str, Any]:
    """[S, B, n] gold of what each picks, and the proxy's own value in its standard deviations."""
    some, gold_BN, of_B = sampled(w, policy)
    ns = sizes(w.c.samples)
    out = {}
    for name, score_SBN in proxies(w, singles, alone, inner, some, of_B).items():
        scaled = score_SBN - score_SBN.mean(2, keepdims=True)
        scaled /= scaled.std((1, 2), keepdims=True)
        gold = np.stack([bestofn.best(x_BN, gold_BN, ns) for x_BN in scaled])
        proxy = np.stack([bestofn.best(x_BN, x_BN, ns) for x_BN in scaled])
        out[name] = {'gold': gold.round(4).tolist(), 'proxy': proxy.mean((0, 1)).tolist()}
    oracle = bestofn.best(gold_BN, gold_BN, ns).mean(0)
    return {'n': ns, 'kl': [bestofn.kl(n) for n in ns], 'curves': out, 'oracle': oracle.tolist(),
            'std of gold': float(gold_BN.std(1).mean())}  # fmt: skip
