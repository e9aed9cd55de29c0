"""Rounds of reward model and policy: does MetaRM keep up with a policy that moves away from it?

Run:     python -m experiments.pretrain
         python -m experiments.metarm_rounds               # what is missing, then the tables
         python -m experiments.metarm_rounds --only_table  # from experiments/results/metarm
Cost:    about half an hour on two CPU cores, after the first line
Expect:  the table of rounds in BENCHMARKS.md

The policy is a softmax over a pool of answers to each prompt, from the training distribution to
answers far from it, and begins near the former. A round draws sets from the latest policy, trains a
reward model anew on the same pairs with these sets, and improves the policy by its rewards. Every
seed is a loop of its own. What answers are worth is known; perplexity is the pretrained decoder's.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import common, separation, shifted, stored
from jaxrm import (
    evaluate,
    heads,
    losses,
    meta,
    packing,
    reward,
    rounds,
    shapes,
    sharding,
    tokens,
)
from jaxrm.data import Preference
from jaxrm.datasets import synthetic

RESULTS = Path(__file__).parent / 'results' / 'metarm'
Array = np.ndarray
KNOBS = (0.0, 0.25, 0.5, 0.75, 1.0)
VARIANTS = {'vanilla': 0.0, 'published': 0.1, 'keep theta prime': 0.01, 'joint': 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(shifted.Learning):
    rounds: int = 4
    prompts: int = 200
    pool: int = 20  # answers to a prompt, as many from each of five policies
    begins: float = 4.0  # the first policy gives an answer exp(-this x its distance) weight
    temperature: float = 0.5  # of an improvement, in standard deviations of the pool's rewards
    variants: tuple[str, ...] = ()  # by default all
    results: Path = RESULTS
    only_table: bool = False


def pool_of(c: Config) -> tuple[list[Preference], Array]:
    """Prompts with the answers that may be given, and how far [n, M] each is from the pairs'."""
    each, found = c.pool // len(KNOBS), []
    for knob in KNOBS:
        of: dict[str, Any] = {'seed': 2, 'labels': 'none', 'policy': knob}
        found.append(synthetic.preferences(c.prompts, candidates=2 * each, **of))
    out, far = [], []
    for same in zip(*found, strict=True):
        kept: dict[Any, float] = {}
        for knob, record in zip(KNOBS, same, strict=True):
            new = [answer for answer in record.responses if answer not in kept][:each]
            kept |= dict.fromkeys(new, knob)
        out.append(same[0]._replace(responses=tuple(kept), ratings=None))
        far.append(list(kept.values()))
    return out, np.array(far)


def surprise(s: shifted.Start, records: list[Preference]) -> tuple[Array, Array]:
    """[c] -log p of each answer by the pretrained decoder, and its tokens."""
    rm = reward.RewardModel(s.rm.backbone, heads.LanguageModel(s.rm.backbone.config.V, tied=True))

    @jax.jit
    def likelihood(params: Any, pack: packing.Pack) -> jax.Array:
        nll_PN, _ = losses.next_token(rm.logits(params, pack), pack.ids_PN, pack.pos_PN)
        owner_PN = (pack.pos_PN == 0).cumsum(1) - 1  # of records with one row each
        return losses.log_probability(nll_PN, owner_PN, pack.rank_PBM.shape[1]).reshape(-1, 1)

    def through(of: tokens.Tokens) -> tuple[Array, Array]:
        shape = shapes.fit(of, size=4096, width=s.rm.backbone.config.D, multiple=16)
        options: dict[str, Any] = {'mesh': s.mesh, 'packs': sharding.data_parallel(s.mesh)}
        params = {'backbone': s.backbone, 'head': {}}
        found = evaluate.candidate_scores(likelihood, params, of, shape, **options)
        return found, packing.row_lengths(of)

    whole = [r._replace(responses=(answer,)) for r in records for answer in r.responses]
    prompts = [r._replace(responses=()) for r in records]
    (said, length), (asked, before) = (
        through(shifted.encoded(x, s.tokenizer)) for x in (whole, prompts)
    )
    count = [len(r.responses) for r in records]
    return np.repeat(asked, count) - said, length - np.repeat(before, count)


def drawn(
    c: Config, s: shifted.Start, pool: list[Preference], policies: list[rounds.Policy], done: int
) -> tuple[list[packing.Batches], list[tokens.Tokens], list[Array]]:
    """Sets of every member's policy: batches, their tokens, and what the answers are worth.

    Raises ValueError for a policy that is not that of after `done` rounds.
    """
    records: list[Preference] = []
    for policy, seed in zip(policies, c.seeds, strict=True):
        found = rounds.sample(policy, pool, c.candidates, seed=seed)
        rounds.check_fresh(found, done)
        records += found
    whole = meta.unlabelled(shifted.encoded(records, s.tokenizer))
    shape = shifted.batches(whole, c.set_batch_size, s.rm.backbone.config.D, s.mesh).shape
    member_n, packs = whole.record // len(pool), sharding.data_parallel(s.mesh)
    own = [tokens.select(whole, np.flatnonzero(member_n == e)) for e in range(len(c.seeds))]
    of = [packing.Batches(x, shape, packs, seed=seed) for x, seed in zip(own, c.seeds, strict=True)]
    return of, own, [shifted.gold(records, x) for x in own]


def knows(s: shifted.Start, params_E: Any, own: list[tokens.Tokens], worth: list[Array]) -> Array:
    """[E] accuracy of each member on its own sets, of which it saw no label."""
    out = []
    for e, (of, gold_c) in enumerate(zip(own, worth, strict=True)):
        one_E = jax.tree.map(lambda x, e=e: x[e : e + 1], params_E)
        score_c = shifted.scores(s, one_E, of)[0]
        rank, gold, score = (evaluate.by_record(x, of) for x in (of.rank, gold_c, score_c))
        better = [(g > g[:, None]).sum(1) for g in gold]  # how many are better than each
        order = [np.where(r < 0, -1, b) for r, b in zip(rank, better, strict=True)]
        out.append(np.nanmean(evaluate.pairs(order, score).accuracy))
    return np.array(out)


def expected(policies: list[rounds.Policy], x_EnM: Any) -> Array:
    """[E, n] mean of a value of the answers, each member's by its own policy."""
    each = np.broadcast_to(x_EnM, (len(policies), *policies[0].log_nM.shape))
    return np.stack([rounds.expected(p, x) for p, x in zip(policies, each, strict=True)])


def loop(c: Config, s: shifted.Start, variant: str) -> dict[str, Any]:
    """A cell: all rounds of one kind of step, for all members."""
    began, (pool, far_nM) = time.time(), pool_of(c)
    of = shifted.encoded(pool, s.tokenizer)
    gold_nM, nll_nM, length_nM = (
        x.reshape(far_nM.shape) for x in (shifted.gold(pool, of), *surprise(s, pool))
    )
    policies = [rounds.begin(np.exp(-c.begins * far_nM)) for _ in c.seeds]
    rows: list[dict[str, Any]] = []

    def judge(**more: Any) -> None:
        bits_E, length_E = (expected(policies, x).mean(1) for x in (nll_nM, length_nM))
        row = {
            'gold': expected(policies, gold_nM),
            'distance': expected(policies, far_nM).mean(1),
            'kl': np.stack([rounds.divergence(p) for p in policies]).mean(1),
            'perplexity': np.exp(bits_E / length_E),
            **more,
        }
        rows.append({name: shifted.rounded(x) for name, x in row.items()})

    judge(gain=np.zeros((len(c.seeds), len(pool))))
    for done in range(c.rounds):
        sets, own, worth = drawn(c, s, pool, policies, done)
        params_E = shifted.learn(c, s, variant, VARIANTS[variant], sets)
        score_Ec = shifted.scores(s, params_E, of)
        reward_EnM = (score_Ec / score_Ec.std(1, keepdims=True)).reshape(-1, *far_nM.shape)
        was_En = expected(policies, reward_EnM)
        each = zip(policies, reward_EnM, strict=True)
        policies = [rounds.improve(p, z, temperature=c.temperature) for p, z in each]
        now_En = expected(policies, reward_EnM)
        accuracy = knows(s, params_E, own, worth)
        judge(gain=now_En - was_En, proxy=now_En.mean(1), accuracy=accuracy)
        common.console.print(f'{variant}: round {len(rows) - 1}, {time.time() - began:.0f} s')
    return {'rounds': rows, 'seconds': round(time.time() - began, 1)}


# Tables


def path(c: Config, variant: str) -> Path:
    return c.results / f'rounds-{variant.replace(" ", "_")}.json'


def read(c: Config) -> dict[str, list[dict[str, Any]]]:
    """The rounds of every variant that there is."""
    found = {v: stored.read(path(c, v), stored.flags(c)) for v in c.variants or VARIANTS}
    return {variant: cell['rounds'] for variant, cell in found.items() if cell}


def mean(name: str, x_E: Any) -> float:
    """Over seeds; of perplexities the geometric mean."""
    return float(np.exp(np.mean(np.log(x_E))) if name == 'perplexity' else np.mean(x_E))


def table(c: Config) -> None:
    """What the policies of each round are like, and where they turned."""
    rows, names = {}, ('proxy', 'kl', 'perplexity', 'distance', 'accuracy')
    every = read(c)
    for variant, found in every.items():
        for r, row in enumerate(found):
            gold_En = np.array(row['gold'])
            before = [found[r - 1]] if r else []
            vanilla = (
                [every['vanilla'][r]] if r and variant != 'vanilla' and 'vanilla' in every else []
            )
            gaps = [
                separation.points(gold_En - np.array(of[0]['gold'])) if of else ''
                for of in (before, vanilla)
            ]
            means = [f'{mean(name, row[name]):.3f}' if name in row else '' for name in names]
            rows[f'{variant}, round {r}'] = [f'{gold_En.mean():.3f}', *gaps, *means]
    columns = ['gold', 'x 100, over the round before', 'over vanilla', *names]
    common.table(f'rounds, {len(c.seeds)} seeds', rows, columns, paste=True)
    for variant, found in read(c).items():
        gold_REn, gain_REn = (np.array([row[k] for row in found]) for k in ('gold', 'gain'))
        turns = [rounds.turning_point(gold_REn[:, e], gain_REn[:, e]) for e in range(len(c.seeds))]
        said = ', '.join(str(turn.round) if turn else 'none' for turn in turns)
        common.console.print(f'{variant}: gold falls while the proxy rises in round {said}')


def picture(c: Config) -> None:
    """Gold and proxy reward, divergence, perplexity and accuracy by round."""
    panels: dict[str, dict[str, Any]] = {}
    for variant, found in read(c).items():
        for name in ('gold', 'proxy', 'kl', 'perplexity', 'accuracy'):
            have = [(r, row[name]) for r, row in enumerate(found) if name in row]
            value_RE = [np.mean(x, 1) if np.ndim(x) > 1 else x for _, x in have]
            panels.setdefault(name, {})[variant] = ([r for r, _ in have], np.array(value_RE))
    shifted.lines(panels, c.results / 'rounds.png', xlabel='round')


def main(c: Config) -> None:
    """Run what is missing, then print and draw."""
    todo = [v for v in c.variants or VARIANTS if not c.only_table and not path(c, v).exists()]
    s = shifted.start(c) if todo else None
    for variant in todo:
        made = loop(c, s, variant)
        common.write_json(path(c, variant), {'flags': stored.flags(c), **made})
    table(c)
    picture(c)


if __name__ == '__main__':
    common.launch(Config, main)
