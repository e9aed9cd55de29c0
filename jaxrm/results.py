"""The results of an evaluation: sets with their scores, what is said of them, and the folder.

results.json has everything, examples.jsonl a line a record, the pictures what they show; a set read
as RewardBench also has upstream's files.
"""

import itertools
import json
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from jaxrm import (
    autoj,
    data,
    evaluate,
    intervals,
    report,
    rewardbench,
    scorer,
    statistics,
    tokens,
    version,
)
from jaxrm.data import DataError, Preference
from jaxrm.intervals import Comparison
from jaxrm.statistics import Summary

RESULTS, EXAMPLES = 'results.json', 'examples.jsonl'
RULES = {'rewardbench': 1, 'rewardbench-2': 2}  # and 'autoj', which has no scores of its own
SUFFIXES = ('.jsonl', '.jsonl.gz', '.json', '.parquet')
UNIT = 'tokens'  # of lengths, those of the chat template around the answer included

Scores = Sequence[np.ndarray]


class Set(NamedTuple):
    """Records to evaluate on; `bench` when they are those of a published benchmark."""

    name: str
    source: str
    mapping: str
    records: Sequence[Preference]
    where: Sequence[str]
    bench: rewardbench.Bench | None = None
    legacy: bool = False  # its weights as first published


class Model(NamedTuple):
    """One model's scores of a set, and what is said of them."""

    scores: Scores
    whole: Summary
    subsets: dict[str, Summary | None]  # None where no record has an ordered pair
    rules: dict[str, Any] | None


class Result(NamedTuple):
    """A set, the lengths of its answers, the model, and the one it is compared with."""

    set: Set
    lengths: Scores
    model: Model
    baseline: Model | None = None
    difference: Comparison | None = None
    differences: Mapping[str, Comparison] = {}


# Reading


def read(
    sources: Sequence[str],
    *,
    split: str | None = None,
    layout: str | None = None,
    chat: bool = False,
    rules: str | None = None,
    extra_subsets: Sequence[str] = (),
    legacy: bool = False,
) -> list[Set]:
    """The records of files and hub data sets; `rules` is a key of RULES, or 'autoj'.

    `legacy` takes RewardBench's weights of XSTest as first published.

    Raises DataError for what cannot be evaluated, such as answers without an order.
    """
    if not sources:
        raise ValueError('data: found none, expected at least one file or hub data set')
    if legacy and rules != 'rewardbench':
        raise ValueError(f'legacy: found it with rules {rules!r}, expected it with rewardbench')
    sets: list[Set] = []
    for source in sources:
        name = _name(source)
        if other := next((s for s in sets if s.name == name), None):
            raise ValueError(f'{source}: found {name!r} again, as of {other.source}')
        if rules is not None:
            if layout or chat:
                raise ValueError(f'{rules}: reads its own columns, expected no --layout or --chat')
            if rules == 'autoj':
                sets.append(_autoj(name, source, split))
                continue
            bench = _benchmark(name, source, split, rules, extra_subsets)
            sets.append(bench._replace(legacy=legacy))
            continue
        found = data.load(source, split=split, layout=layout, chat=chat)
        _check_order(found.records, source)
        sets.append(Set(name, source, found.mapping, found.records, found.where))
    return sets


def _name(source: str) -> str:
    """What files and tables call it: the last part without its suffix."""
    suffix = max((s for s in SUFFIXES if source.endswith(s)), key=len, default='')
    return Path(source).name.removesuffix(suffix)


def _benchmark(name: str, source: str, split: str | None, rules: str, extra: Sequence[str]) -> Set:
    bench = rewardbench.load(source, split=split, extra=extra)
    if bench.version != RULES[rules]:
        raise DataError(f'{source}: found version {bench.version}, expected that of {rules!r}')
    mapping = f'RewardBench {bench.version} from {source}: {len(bench.records)} records'
    return Set(name, source, mapping, bench.records, bench.where, bench)


def _autoj(name: str, source: str, split: str | None) -> Set:
    """Pairs whose groups, Code, Math and Other, are rows of the table."""
    bench = autoj.load(source, split=split)
    mapping = f'Auto-J from {source}: {autoj.describe(bench)}'
    return Set(name, source, mapping, bench.records, bench.where)


def _check_order(records: Sequence[Preference], source: str) -> None:
    if not len(statistics.ordered(evaluate.ranks(records)).record):
        raise DataError(
            f'{source}: found no answer that is better than another, but evaluation needs an '
            'order: chosen and rejected, or completions with ranks or ratings'
        )


# Saying


def about(rm: scorer.Scorer) -> dict[str, Any]:
    """What of a loaded model decides on its scores, beside its weights."""
    config, tokenizer = rm.model.backbone.config, rm.tokenizer
    template = tokens.template_hash(tokenizer) if tokenizer.chat_template else None
    dtype = np.dtype(rm.model.backbone.dtype).name
    return {'template': template, 'compute_dtype': dtype, 'max_position': config.max_position}


def result(set: Set, lengths: Scores, scores: Scores, baseline: Scores | None = None) -> Result:
    """What is said of a set, overall and by subset."""
    model = _model(set, lengths, scores)
    if baseline is None:
        return Result(set, lengths, model)
    other, prompts = _model(set, lengths, baseline), evaluate.prompts(set.records)
    right = [evaluate.pairs(evaluate.ranks(set.records), s).accuracy for s in (scores, baseline)]

    def compare(index: np.ndarray) -> Comparison:
        return intervals.compare(*(x[index] for x in right), prompts=[prompts[i] for i in index])

    by_subset = {name: compare(at) for name, at in _subsets(set) if model.subsets[name]}
    whole = compare(np.arange(len(set.records)))
    return Result(set, lengths, model, other, whole, by_subset)


def _subsets(set: Set) -> Iterator[tuple[str, np.ndarray]]:
    """Names of the groups and the indices of their records."""
    group_n = np.array([record.group or '' for record in set.records], object)
    for name in dict.fromkeys(r.group for r in set.records if r.group):
        yield name, np.flatnonzero(group_n == name)


def _model(set: Set, lengths: Scores, scores: Scores) -> Model:
    ranks, prompts = evaluate.ranks(set.records), evaluate.prompts(set.records)

    def summary(index: Sequence[int] | np.ndarray) -> Summary | None:
        pick = lambda values: [values[i] for i in index]  # noqa: E731
        if not len(statistics.ordered(pick(ranks)).record):
            return None
        names: list[Hashable] = pick(prompts)
        return statistics.summary(pick(ranks), pick(scores), lengths=pick(lengths), prompts=names)

    whole = summary(range(len(ranks)))
    assert whole is not None  # as `read` has checked
    rules = rewardbench.evaluate(set.bench, scores, legacy=set.legacy) if set.bench else None
    return Model(scores, whole, {name: summary(at) for name, at in _subsets(set)}, rules)


# Showing

COLUMNS = (
    *('records', 'prompts', 'accuracy\n[95 %]', 'ties', 'margin', 'reward', 'ECE', 'Brier'),
    *('longer\nwins', 'right if\nlonger', 'if\nshorter', 'length\nSpearman'),
)
COMPARED = ('baseline', 'difference\n[95 %]', 'p')


def tables(results: Sequence[Result]) -> list[Table]:
    """What to print: accuracy and what goes with it, and the numbers of a benchmark's rules."""
    return [_table(results), *_rules_table(results)]


def _empty(title: str) -> Table:
    return Table(title=title, title_justify='left', box=SIMPLE_HEAD, padding=0, pad_edge=False)


def _table(results: Sequence[Result]) -> Table:
    """A row for every set and subset."""
    out = _empty('pair accuracy and what goes with it')
    for name in ('', *COLUMNS, *(COMPARED if results[0].baseline else ())):
        out.add_column(name, justify='right' if name else 'left', no_wrap=True)
    for found in results:
        other, whole = found.baseline, found.model.whole
        out.add_row(found.set.name, *_row(whole, other and other.whole, found.difference))
        for name, summary in _apart(found.model).items():
            base, gap = other and other.subsets[name], found.differences.get(name)
            out.add_row(f'  {name}', *(_row(summary, base, gap) if summary else ['no order']))
        out.add_section()
    return out


def _apart(model: Model) -> dict[str, Summary | None]:
    """The subsets, unless the only one is everything."""
    only = next(iter(model.subsets.values()), None) if len(model.subsets) == 1 else None
    return {} if only and only.records == model.whole.records else model.subsets


def _row(x: Summary, baseline: Summary | None, gap: Comparison | None) -> list[str]:
    length, bins = x.length, x.calibration
    assert length is not None
    numbers = [
        str(x.records),
        str(x.prompts),
        str(x.accuracy),
        f'{x.ties:.3f}',
        f'{x.margin.mean:.3f}',
    ]
    numbers += [f'{x.mean_reward:.2f} ± {x.std_reward:.2f}', f'{bins.ece:.3f}', f'{bins.brier:.3f}']
    numbers += [f'{length.longer_wins:.3f}', f'{length.longer.mean:.3f}']
    numbers += [f'{length.shorter.mean:.3f}', f'{length.spearman:.3f}']
    if baseline and gap:
        numbers += [f'{baseline.accuracy.mean:.3f}', str(gap.difference), f'{gap.p_value:.2g}']
    return numbers


def _rules_table(results: Sequence[Result]) -> list[Table]:
    out = _empty('by the rules of the benchmark')
    for name in ('', 'model', *(['baseline'] if results[0].baseline else [])):
        out.add_column(name, justify='right' if name else 'left')
    for found in results:
        models = [m for m in (found.model, found.baseline) if m and m.rules]
        values = [dict(rewardbench.table(m.rules or {})) for m in models]
        for name in values[0] if values else ():
            out.add_row(name, *(f'{value[name]:.4f}' for value in values))
        out.add_section()
    return [out] if out.row_count else []


# Writing


def write(
    folder: Path,
    results: Sequence[Result],
    about: Mapping[str, Any],
    *,
    render: rewardbench.Render | None = None,
    pictures: bool = True,
) -> None:
    """Everything into an empty folder; `about` says what was evaluated and how.

    `render` makes the text of a conversation that RewardBench's files show.
    """
    sets = {found.set.name: _described(found) for found in results}
    whole = {'jaxrm': version.__version__, **about, 'length_unit': UNIT, 'sets': sets}
    text = json.dumps(_plain(whole), indent=1, allow_nan=False)
    (folder / RESULTS).write_text(text + '\n', encoding='utf-8')
    with open(folder / EXAMPLES, 'w', encoding='utf-8') as file:
        for line in itertools.chain(*map(_examples, results)):
            file.write(json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + '\n')
    _write_upstream(folder / 'rewardbench', results, about, render)
    if pictures:
        _pictures(folder, results)


def _write_upstream(
    folder: Path, results: Sequence[Result], about: Mapping[str, Any], render: Any
) -> None:
    """RewardBench's own files, in a folder for each set that has its rules."""
    model, template = str(about['model']), about.get('chat_template')
    name = model if re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', model) else f'local/{Path(model).name}'
    said = {'chat_template': Path(template).name if template else 'tokenizer'}
    for found in results:
        if bench := found.set.bench:
            scores, into = found.model.scores, folder / found.set.name
            rewardbench.write(into, bench, scores, name, render=render, **said)


def _pictures(folder: Path, results: Sequence[Result]) -> None:
    """subsets.png of all sets, and of each set its scores, reliability and scores by length."""
    rows = []
    for found in results:
        start = f'{found.set.name}: ' if len(results) > 1 else ''
        rows.append((found.set.name, found.model.whole))
        rows += [(start + name, x) for name, x in _apart(found.model).items() if x]
        _of_set(folder, found)
    report.subsets([(k, x.accuracy, x.records) for k, x in rows], folder / 'subsets.png')


def _sides(found: Result) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Lengths and scores of the best answers and of all others."""
    rank = np.concatenate([np.asarray(r) for r in evaluate.ranks(found.set.records)])
    score, length = (np.concatenate(x) for x in (found.model.scores, found.lengths))
    masks = {'chosen': rank == 0, 'rejected': rank > 0}
    return {side: (length[mask], score[mask]) for side, mask in masks.items()}


def _of_set(folder: Path, found: Result) -> None:
    name, whole, sides = found.set.name, found.model.whole, _sides(found)
    report.histogram({k: y for k, (_, y) in sides.items()}, folder / f'scores-{name}.png')
    report.reliability(whole.calibration, folder / f'reliability-{name}.png')
    assert whole.length is not None
    title = f'Pearson {whole.length.pearson:.2f}, Spearman {whole.length.spearman:.2f}'
    report.against_length(
        sides, folder / f'length-{name}.png', unit=f'{UNIT} of the answer', title=title
    )


def _described(found: Result) -> dict[str, Any]:
    said: dict[str, Any] = {
        'source': found.set.source,
        'columns': found.set.mapping,
        'fingerprint': data.fingerprint(found.set.records),
        **_said(found.model),
    }
    if found.baseline:
        said['baseline'] = _said(found.baseline)
        said['model_minus_baseline'] = {'all': found.difference, 'subsets': found.differences}
    return said


def _said(model: Model) -> dict[str, Any]:
    said = {'all': model.whole, 'subsets': model.subsets}
    return said if model.rules is None else {**said, 'rules': model.rules}


def _examples(found: Result) -> Iterator[dict[str, Any]]:
    """One record: its place, ranks, scores, and its own accuracy, ties and margin."""
    ranks = evaluate.ranks(found.set.records)
    pairs = evaluate.pairs(ranks, found.model.scores)
    for i, record in enumerate(found.set.records):
        line: dict[str, Any] = {'set': found.set.name, 'where': found.set.where[i]}
        line['id'] = record.id
        line |= {'subset': record.group, 'ranks': ranks[i], 'scores': found.model.scores[i]}
        line |= {'baseline_scores': found.baseline.scores[i]} if found.baseline else {}
        yield line | {'lengths': found.lengths[i], **{k: v[i] for k, v in pairs._asdict().items()}}


def _plain(value: Any) -> Any:
    """The value as JSON has it: named tuples as objects, and null for what is no number."""
    if hasattr(value, '_asdict'):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):  # the shortest decimals that give a float32 back
        value = float(str(value)) if isinstance(value, np.floating) else value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
