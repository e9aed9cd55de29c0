"""Mixes a language model into a reward model, at a share that validation pairs choose (DogeRM).

Run:     python -m experiments.dogerm_sweep --model_name_or_path RM --language_model LM \
             --dataset_validation validation.jsonl --dataset_test test.jsonl \
             --dataset_other chat.jsonl
Cost:    a pass over all pairs for each share
Expect:  the share, accuracy there beside the unmerged model, and curves.png

Both models have to come of one pretrained model (arXiv 2407.01470). The share is that of the
language model's weights; the head stays the reward model's. Where vocabularies differ, rows are
matched by their tokens. Test pairs play no part in the choice, and no prompt may be in both files;
`dataset_other` are files of which the curve shows what the merge costs elsewhere. No checkpoint is
written: `jaxrm merge` makes one of the share.
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments import common, dogerm
from experiments.dmoerm_phases import check_apart
from jaxrm import data, evaluate, sweep
from jaxrm.data import Preference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model_name_or_path: str  # of a reward model: a folder or hub id
    language_model: str  # of the domain, or anything with such a backbone
    dataset_validation: str
    dataset_test: str
    dataset_other: tuple[str, ...] = ()
    output_dir: Path = Path('runs/dogerm_sweep')
    shares: int = 21  # from 0 to 1
    layout: str | None = None
    chat: bool = False  # plain strings become a user and an assistant turn
    max_length: int | None = None  # longer pairs lose the left of their prompt; else the model's
    test_pairs: int | None = None  # at most so many of each file


def pairs(c: Config, name: str) -> list[Preference]:
    """The records of a file that have an order."""
    found = data.load(name, layout=c.layout, chat=c.chat)
    common.console.print(found.mapping)
    records = [record for record in found.records if len(set(record.ranks or ())) > 1]
    if not records:
        raise ValueError(f'{name}: found no pair with a better answer')
    return records[: c.test_pairs]


def report(c: Config, found: dict[str, dogerm.Swept], test: list[Preference]) -> dict[str, Any]:
    """The choice, and all curves."""
    of = dogerm.shares(c.shares)
    choice = sweep.choose(of, found['validation'].right_Kn, found['test'].right_Kn,
                          prompts=evaluate.prompts(test))  # fmt: skip
    says = {
        'share': f'{choice.share:g}', 'accuracy': choice.test, 'unmerged': choice.unmerged,
        'above unmerged': choice.gain,
        'best share of the test pairs': f'{choice.best:g}, {100 * choice.gap:.1f} points more',
    }  # fmt: skip
    common.table('chosen on validation pairs', {k: [v] for k, v in says.items()}, ['test pairs'])
    rows = {
        f'{share:g}': [x for s in found.values() for x in (f'{s.right_Kn[k].mean():.3f}',
                       f'{s.mean_K[k]:+.2f} ({s.std_K[k]:.2f})')]
        for k, share in enumerate(of)
    }  # fmt: skip
    columns = [x for name in found for x in (name, 'reward (deviation)')]
    common.table('accuracy by share', rows, columns, paste=True)
    curves = {
        name: {'accuracy': s.right_Kn.mean(1).tolist(), 'mean': s.mean_K.tolist(),
               'std': s.std_K.tolist()}
        for name, s in found.items()
    }  # fmt: skip
    gain = {'difference': choice.gain.difference, 'p_value': choice.gain.p_value}
    return {**choice._asdict(), 'gain': gain, 'shares': of, 'curves': curves}


def main(c: Config) -> None:
    """Score, choose, report."""
    validation, test = (pairs(c, name) for name in (c.dataset_validation, c.dataset_test))
    check_apart(validation, test, 'dataset_validation')
    sets = {'validation': validation, 'test': test}
    sets |= {Path(name).name.partition('.')[0]: pairs(c, name) for name in c.dataset_other}
    of, at = dogerm.mixed(c.model_name_or_path, c.language_model), dogerm.shares(c.shares)
    found = {
        name: dogerm.records_swept(of, records, at, max_length=c.max_length)
        for name, records in sets.items()
    }
    result = report(c, found, test)
    lines = {name: s.right_Kn.mean(1)[None] for name, s in found.items()}
    drift = {name: s.mean_K[None] for name, s in found.items()}
    dogerm.picture({'pairs': lines}, at, c.output_dir / 'curves.png')
    dogerm.picture({'rewards': drift}, at, c.output_dir / 'drift.png', y='mean reward')
    common.write_json(c.output_dir / 'result.json', result)


if __name__ == '__main__':
    common.launch(Config, main)
