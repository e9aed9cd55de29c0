"""A decoder that has read nothing, as a folder to start experiments from."""

import jax

from experiments import common
from jaxrm import checkpoint, heads, reward
from jaxrm.backbones.layers import Decoder
from jaxrm.datasets import synthetic


def save(folder, *, width=16, layers=1):
    """The path of its folder in this one; its tokenizer has 300 entries."""
    records = synthetic.preferences(50, seed=0)
    tokenizer = common.train_tokenizer(common.texts(records), 300)
    config = common.tiny(len(tokenizer), width=width, layers=layers)
    rm = reward.RewardModel(Decoder(config), heads.LanguageModel(config.V, tied=True))
    params = {'backbone': rm.init_backbone(jax.random.key(0)), 'head': {}}
    like = checkpoint.Pretrained('llama', config, tokenizer)
    checkpoint.export(folder / 'model', params, like, head_kind='lm_head')
    return str(folder / 'model')
