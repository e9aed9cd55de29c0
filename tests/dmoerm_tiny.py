"""A DMoERM in small, for its tests: a decoder that has read nothing, and flags of the phases."""

import hashlib
import json

import jax

from experiments import common, dmoerm_base, dmoerm_experts, dmoerm_mixture, dmoerm_router
from jaxrm import checkpoint, heads, reward
from jaxrm.backbones.layers import Decoder
from jaxrm.datasets import synthetic

POINTS = {'facts': ['politeness', 'confidence'], 'persona': ['verbosity', 'persona']}
RANK, D = 4, 16
PHASES = (dmoerm_router, dmoerm_base, dmoerm_experts, dmoerm_mixture)


def decoder(folder):
    """Writes the decoder into the folder, and gives its path."""
    records = synthetic.preferences(50, seed=0)
    tokenizer = common.train_tokenizer(common.texts(records), 300)
    config = common.tiny(len(tokenizer), width=D, layers=2)
    rm = reward.RewardModel(Decoder(config), heads.LanguageModel(config.V, tied=True))
    params = {'backbone': rm.init_backbone(jax.random.key(0)), 'head': {}}
    like = checkpoint.Pretrained('llama', config, tokenizer)
    checkpoint.export(folder / 'model', params, like, head_kind='lm_head')
    return str(folder / 'model')


def flags(decoder, folder):
    """Of all four phases."""
    (folder / 'points.json').write_text(json.dumps(POINTS))
    same = {'output_dir': folder / 'dmoerm', 'pairs': 90, 'test_pairs': 24, 'max_length': 400}
    start = {**same, 'model_name_or_path': decoder, 'num_train_epochs': 1}
    router = {**start, 'num_train_epochs': 4, 'capabilities': folder / 'points.json'}
    return [
        dmoerm_router.Config(**router, eval_steps=4),
        dmoerm_base.Config(**start),
        dmoerm_experts.Config(**same, lora_r=RANK, lora_alpha=2 * RANK),
        dmoerm_mixture.Config(**same, max_steps=20, train_batch_size=16),
    ]


def files(folder):
    """A hash of every file but those to go on from."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob('*'))
        if p.is_file() and 'checkpoints' not in p.parts
    }
