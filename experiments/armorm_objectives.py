"""ArmoRM, second phase: every objective by ridge regression, and what of them is only length.

Run:     python -m experiments.armorm_objectives     # with the flags of armorm_features, after it
Cost:    seconds: a sum over the features and an eigendecomposition for each set of rated rows
Expect:  of the tiny decoder of the synthetic world, most of the variance of what lies in the words
         (completeness, verbosity) and little of what lies between prompt and answer (relevance)

Each objective has its own penalty, chosen on a fifth of the prompts (the public script holds out a
fifth of the answers, so that a prompt may be on both sides); a missing rating takes no part. Writes
head.safetensors (the regression and the transform) and result.json into output_dir. A rating that
is not in (0, 1) needs a --rating_scales; the raters' scales are stored with the head.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from experiments import armorm, common, scales
from jaxrm import processes, tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(armorm.Data):
    output_dir: Path = Path('runs/armorm/objectives')
    debias: bool = True  # else the transform is the identity


def main(c: Config) -> None:
    """Fit, say how good the fit is, write."""
    if common.finished(c):
        return
    found = armorm.sets(c, armorm.tokenizer(c), ('ratings', 'reference'))
    kept = scales.stored(c, found['ratings'].objectives)
    fitted = armorm.objectives(c, found['ratings'], found['reference'], debias=c.debias)
    result = table(fitted)
    ends = {name: [scale.low, scale.high] for name, scale in kept.items()}
    processes.alone(lambda: write(c.output_dir / 'head.safetensors', fitted))
    flags = common.identity(c)
    made = {'names': fitted.names, 'objectives': result, 'scales': ends, 'flags': flags}
    made['model'] = armorm.model(c)
    common.write_json(c.output_dir / 'result.json', made)


def table(o: armorm.Objectives) -> dict[str, Any]:
    """Prints and returns the penalty, the errors where it was chosen, and the use of length."""
    least_J = o.fitted.mse_JA.min(1)
    columns = {
        'rated': o.count_J,
        'alpha': o.fitted.alpha_J,
        'mse': least_J,
        'mse of the mean': o.fitted.variance_J,
        'explained': 1 - least_J / o.fitted.variance_J,
        'penalty': o.penalty_J,
        'with verbosity': o.before_J,
        'after': o.after_J,
    }
    rows = {
        name: {k: float(x_J[j]) for k, x_J in columns.items()} for j, name in enumerate(o.names)
    }
    shown = ('rated', 'alpha', 'explained', 'penalty', 'with verbosity', 'after')
    cells = {name: [f'{row[k]:.4g}' for k in shown] for name, row in rows.items()}
    common.table('objectives, on the prompts that chose the penalties', cells, shown)
    finite = lambda x: x if np.isfinite(x) else None  # noqa: E731
    return {name: {k: finite(x) for k, x in row.items()} for name, row in rows.items()}


def write(path: Path, o: armorm.Objectives) -> None:
    """The head of a gated model, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix('.part')
    save_file(tree.flatten(o.head), part)
    part.replace(path)


if __name__ == '__main__':
    common.launch(Config, main)
