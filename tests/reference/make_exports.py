"""Export checkpoints with jaxrm for check_exports.py, and beside each what jaxrm computes with it.

Run (from the repository root, in jaxrm's environment):
    python tests/reference/make_exports.py DIR

DIR gets one folder a variant, and for each a <variant>.json: how to load it, rows of ids, and the
scores (or, for a language model, the mean negative log-likelihood of each row). Weights are
random; the reward models have had one gradient step, so that nothing is as it was drawn.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrm import checkpoint, heads, lora, tree
from jaxrm.backbones import llama
from jaxrm.reward import RewardModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torch_goldens import golden, load, packed, parts, scores, states  # noqa: E402

STEP = 0.1


def trained(base, params, trainable, scale=1.0):
    """params after one step of gradient descent on the score difference of two rows."""
    model, (pack, at) = (
        RewardModel(llama.Backbone(base.config), heads.Scalar(), scale),
        packed('seqcls'),
    )

    def loss(learned):
        score = model.score({**params, **learned}, pack)[:, 0]
        return -jax.nn.log_sigmoid(score[at[0]] - score[at[1]])

    grads = jax.jit(jax.grad(loss))({part: params[part] for part in trainable})
    new = {
        part: jax.tree.map(lambda p, g: p - STEP * g, params[part], grads[part]) for part in grads
    }
    return {**params, **new}


def adapted(base, rank, seed):
    """A trained adapter on every linear map, whose B is not zero, with a fresh head."""
    key = jax.random.key(seed)
    backbone = jax.tree.map(jnp.asarray, base.backbone)
    made = lora.init(backbone, key, rank=rank)
    noise = lambda name, x: x + 0.1 * jax.random.normal(key, x.shape) if name.endswith('/b') else x  # noqa: E731
    head = RewardModel(None, heads.Scalar()).init_head(key, base.config.D)
    params = {'backbone': backbone, 'lora': tree.map_named(noise, made), 'head': head}
    return trained(base, params, ('lora', 'head'), scale=0.5)


def record(folder, name, kind, values, base=None):
    ids = [row[row >= 0].tolist() for row in golden('seqcls')['ids_BS']]
    value = {'kind': kind, 'base': base, 'ids': ids, 'values': np.asarray(values).tolist()}
    (folder / f'{name}.json').write_text(json.dumps(value) + '\n')


def export_classifiers(folder, base):
    params = trained(base, parts(base), ('backbone', 'head'))
    for name, options in (('seqcls', {}), ('seqcls_sharded', {'max_shard_bytes': 50_000})):
        checkpoint.export(folder / name, params, base, overwrite=True, **options)
        record(folder, name, 'reward', scores(base, params, 'seqcls'))
    checkpoint.export(folder / 'seqcls_bf16', params, base, dtype=jnp.bfloat16, overwrite=True)
    narrow = checkpoint.load_pretrained(folder / 'seqcls_bf16', dtype='float32')
    record(folder, 'seqcls_bf16', 'reward', scores(narrow, parts(narrow), 'seqcls'))


def export_adapted(folder, base):
    params = adapted(base, rank=3, seed=1)
    values = scores(base, params, 'seqcls', 0.5)
    checkpoint.export(folder / 'folded', params, base, lora_scale=0.5, overwrite=True)
    record(folder, 'folded', 'reward', values)
    plain = {'backbone': base.backbone}
    checkpoint.export(folder / 'base', plain, base, head_kind='lm_head', overwrite=True)
    checkpoint.export_adapter(
        folder / 'adapter', params, base, lora_scale=0.5, base='base', overwrite=True
    )
    record(folder, 'adapter', 'adapter', values, base='base')


def export_causal(folder, name):
    base = load(name, 'causal_lm')
    head = heads.LanguageModel(base.config.V, tied=base.config.tied)
    case = golden('seqcls')
    logits = head.apply(
        {'params': base.head}, states(base, case), base.backbone['embed']['embedding']
    )
    log_p = np.asarray(jax.nn.log_softmax(logits))
    nll = [
        -log_p[i, np.arange(n - 1), case['ids_BS'][i, 1:n]].mean() if n > 1 else 0.0
        for i, n in enumerate(case['length_B'])
    ]
    checkpoint.export(folder / name, parts(base), base, head_kind='lm_head', overwrite=True)
    record(folder, name, 'causal_lm', nll)


def main():
    jax.config.update('jax_default_matmul_precision', 'highest')
    folder = Path(sys.argv[1])
    export_classifiers(folder, load('seqcls'))
    export_adapted(folder, load('causal_tied', 'backbone'))
    export_causal(folder, 'causal')
    export_causal(folder, 'causal_tied')


if __name__ == '__main__':
    main()
