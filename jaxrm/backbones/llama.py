"""Llama 2 and 3: `LlamaForSequenceClassification` and `LlamaForCausalLM` checkpoints."""

from typing import Any

from jaxrm.backbones.layers import Config, Decoder, RopeScaling

Backbone = Decoder

# (name in an HF checkpoint, leaf); {} is the layer. Kernels are stored transposed there.
NAMES = (
    ('model.embed_tokens.weight', 'embed/embedding'),
    ('model.layers.{}.input_layernorm.weight', '{}/attn_norm/scale'),
    ('model.layers.{}.self_attn.q_proj.weight', '{}/q/kernel'),
    ('model.layers.{}.self_attn.k_proj.weight', '{}/k/kernel'),
    ('model.layers.{}.self_attn.v_proj.weight', '{}/v/kernel'),
    ('model.layers.{}.self_attn.o_proj.weight', '{}/o/kernel'),
    ('model.layers.{}.post_attention_layernorm.weight', '{}/mlp_norm/scale'),
    ('model.layers.{}.mlp.gate_proj.weight', '{}/gate/kernel'),
    ('model.layers.{}.mlp.up_proj.weight', '{}/up/kernel'),
    ('model.layers.{}.mlp.down_proj.weight', '{}/down/kernel'),
    ('model.norm.weight', 'norm/scale'),
)

# What this implementation does, by config.json key; another value is refused.
FIXED = {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'pretraining_tp': 1}


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Config of a config.json, new (`rope_parameters`) or old (`rope_theta`, `rope_scaling`).

    Raises ValueError naming the key for a setting that this implementation does not have.
    """
    for key, value in FIXED.items():
        if hf.get(key, value) not in (value, None):
            raise ValueError(f'config.json: {key} is {hf[key]!r}, expected {value!r}')
    rope = {
        'rope_theta': hf.get('rope_theta', 10_000.0),
        **(hf.get('rope_scaling') or {}),
        **(hf.get('rope_parameters') or {}),
    }
    kind = rope.get('rope_type', rope.get('type', 'default'))
    if kind not in ('default', 'llama3'):
        raise ValueError(f"config.json: rope type {kind!r}, expected 'default' or 'llama3'")
    heads, width = hf['num_attention_heads'], hf['hidden_size']
    return Config(
        V=hf['vocab_size'],
        D=width,
        F=hf['intermediate_size'],
        L=hf['num_hidden_layers'],
        Q=heads,
        K=hf.get('num_key_value_heads') or heads,
        H=hf.get('head_dim') or width // heads,
        norm_eps=hf.get('rms_norm_eps', 1e-6),
        rope_theta=float(rope['rope_theta']),
        rope_scaling=_scaling(rope) if kind == 'llama3' else None,
        tied=bool(hf.get('tie_word_embeddings', False)),
        max_position=hf.get('max_position_embeddings', 2048),
    )


def _scaling(rope: dict[str, Any]) -> RopeScaling:
    keys = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
    missing = [k for k in keys if k not in rope]
    if missing:
        raise ValueError(f'config.json: rope type llama3 lacks {missing}')
    factor, low, high, original = (rope[k] for k in keys)
    return RopeScaling(float(factor), float(low), float(high), int(original))


def config_to_hf(c: Config) -> dict[str, Any]:
    """The config.json keys that follow from `c`."""
    rope: dict[str, Any] = {'rope_theta': c.rope_theta, 'rope_type': 'default'}
    if s := c.rope_scaling:
        rope |= {
            'rope_type': 'llama3',
            'factor': s.factor,
            'low_freq_factor': s.low_freq_factor,
            'high_freq_factor': s.high_freq_factor,
            'original_max_position_embeddings': s.original_max_position,
        }
    return {
        'model_type': 'llama',
        'vocab_size': c.V,
        'hidden_size': c.D,
        'intermediate_size': c.F,
        'num_hidden_layers': c.L,
        'num_attention_heads': c.Q,
        'num_key_value_heads': c.K,
        'head_dim': c.H,
        'rms_norm_eps': c.norm_eps,
        'rope_parameters': rope,
        'tie_word_embeddings': c.tied,
        'max_position_embeddings': c.max_position,
        **FIXED,
    }
