"""Write the reference checkpoints and expected values under tests/goldens/llama.

Run (in the torch environment of README.md, from the repository root):
    python tests/reference/make_goldens.py

Made with torch 2.13.0 (CPU), transformers 5.23.0, peft 0.21.2, tokenizers 0.23.3 and
safetensors 0.8.0.
Every value is computed in float32, eager attention, one unpadded row at a time; beside the scores
stands a float64 forward pass written here in numpy, independent of torch, so that a tolerance has
a meaning.

    llama/<variant>/            a checkpoint folder as transformers (or peft) saves it
    llama/<variant>.npz         expected values over it
    llama/seqcls_grads.npz      gradient of -logsigmoid(score[0] - score[1]), by parameter name
    llama/tokens.json           token ids of a few conversations under seqcls' tokenizer
    llama/versions.json         versions, seed and the float32-float64 differences
"""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import peft
import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

SEED = 20
ROOT = Path(__file__).resolve().parents[1] / 'goldens' / 'llama'
LENGTHS = (48, 37, 29, 61, 8, 1)
SHOWN = (1, 4)  # rows whose states and logits are stored whole
SPECIAL = ('<|begin_of_text|>', '<|eot_id|>', '<|start_header_id|>', '<|end_header_id|>', '<|pad|>')
VOCABULARY = 307  # five special tokens, 256 bytes, 46 merges: odd, and no byte is lost
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
TEMPLATE = """\
{%- for message in messages %}
    {%- set head = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}
    {%- if loop.first %}{{- bos_token }}{%- endif %}
    {{- head + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
CORPUS = [
    'A careful answer names its assumptions and checks the result before it is given.',
    'The user asked a question about the weather; the assistant gave a short answer.',
    'If the two answers are equally good, the order of the answers should not matter.',
    'There are three rivers in the valley, and each of them runs into the same lake.',
    'Write the system message first, then the user message, then the assistant message.',
]
CONVERSATIONS = [
    [
        {'role': 'user', 'content': 'Which river is the longest?'},
        {'role': 'assistant', 'content': 'It depends on where it is measured from.'},
    ],
    [
        {'role': 'system', 'content': 'Answer in one word.'},
        {'role': 'user', 'content': '  Is 12345 odd?\n'},
        {'role': 'assistant', 'content': 'Yes.'},
    ],
    [
        {'role': 'user', 'content': 'Grüße, 世界 🙂'},
        {'role': 'assistant', 'content': "It's a greeting:\n\n\thello   world\u200b"},
        {'role': 'user', 'content': 'Thanks!'},
        {'role': 'assistant', 'content': ''},
    ],
]


# Tokenizer


def make_tokenizer():
    """A byte-level BPE with Llama 3's splitting rule, BOS on plain text, and a pad of its own."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bos = (SPECIAL[0], bpe.token_to_id(SPECIAL[0]))
    bpe.post_processor = processors.TemplateProcessing(
        single=f'{bos[0]} $A', pair=f'{bos[0]} $A {bos[0]} $B', special_tokens=[bos]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[4],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    assert len(tokenizer) == VOCABULARY
    return tokenizer


def write_tokens(tokenizer):
    """Ids of whole conversations, of their prompts, and of plain text."""
    cases = []
    for messages in CONVERSATIONS:
        whole = tokenizer.apply_chat_template(messages, return_dict=True)['input_ids']
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=True
        )['input_ids']
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        cases.append({'messages': messages, 'text': text, 'ids': whole, 'prompt_ids': prompt})
    plain = [{'text': t, 'ids': tokenizer(t)['input_ids']} for t in ('A river.', 'ÿ\x00 naïve')]
    lines = [
        f'"{key}": [\n' + ',\n'.join(json.dumps(x, ensure_ascii=False) for x in value) + '\n]'
        for key, value in (('conversations', cases), ('plain', plain))
    ]
    (ROOT / 'tokens.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')


# Models


def make_config(tokenizer, **settings):
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        # wave lengths 6.3, 16.7, 44, 118 of four frequencies: one stays (< 32/4), one is blended,
        # two are stretched by the factor (> 32/1)
        rope_parameters={
            'rope_type': 'llama3',
            'rope_theta': 50.0,
            'factor': 8.0,
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_max_position_embeddings': 32,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


@torch.no_grad()
def randomize(model, seed):
    """Weights that keep activations near one at every depth; norms scattered around one."""
    rng = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=rng)
        if name.endswith('norm.weight'):
            p.copy_(1 + 0.3 * noise)
        elif 'embed_tokens' in name:
            p.copy_(noise)
        else:
            sharper = 1.5 if 'q_proj' in name or 'k_proj' in name else 1.0
            p.copy_(sharper * noise / p.shape[1] ** 0.5)
    return model.eval()


def make_rows(tokenizer):
    """Random rows: BOS first, end of turn last, anything but pad between."""
    rng = np.random.default_rng(SEED)
    rows = [rng.integers(len(SPECIAL), VOCABULARY, n) for n in LENGTHS]
    for row in rows:
        row[0] = tokenizer.bos_token_id
        if len(row) > 1:
            row[-1] = tokenizer.eos_token_id
    return rows


def row_outputs(model, rows):
    """(logits of each row, states after the final norm of each row), one row at a time."""
    logits, states = [], []
    backbone = model.get_base_model().model if hasattr(model, 'get_base_model') else model.model
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor(row)[None]
            logits.append(model(input_ids=ids).logits[0].numpy())
            states.append(backbone(input_ids=ids).last_hidden_state[0].numpy())
    return logits, states


def gradients(model, rows):
    """Gradient of -logsigmoid(score of row 0 - score of row 1) by parameter name."""
    model.zero_grad()
    scores = [model(input_ids=torch.tensor(row)[None]).logits[0, 0] for row in rows[:2]]
    loss = -torch.nn.functional.logsigmoid(scores[0] - scores[1])
    loss.backward()
    grads = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    model.zero_grad()
    return {'loss': loss.detach().numpy(), **grads}


# Float64, in numpy


def rope_angles(config, length):
    """Angles [S, H/2] of the llama3 scaling, by its published rule."""
    rope, h = config.rope_parameters, config.head_dim
    freq = rope['rope_theta'] ** (-np.arange(0, h, 2) / h)
    wave = 2 * np.pi / freq
    n, low, high = (
        rope[k] for k in ('original_max_position_embeddings', 'low_freq_factor', 'high_freq_factor')
    )
    blend = np.clip((n / wave - low) / (high - low), 0, 1)
    freq = freq * (blend + (1 - blend) / rope['factor'])
    return np.arange(length)[:, None] * freq


def rotate(x, angles):
    """x [heads, S, H] turned by angles, halves convention."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def states64(weights, config, ids):
    """States after the final norm, float64; weights by transformers name."""
    w = {k: v.double().numpy() for k, v in weights.items()}
    s, heads, kv = len(ids), config.num_attention_heads, config.num_key_value_heads

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * w[name]

    def split(x, name, count):
        return (x @ w[name].T).reshape(s, count, -1).transpose(1, 0, 2)

    angles = rope_angles(config, s)
    x = w['model.embed_tokens.weight'][ids]
    for i in range(config.num_hidden_layers):
        p = f'model.layers.{i}.'
        y = norm(x, p + 'input_layernorm.weight')
        q = rotate(split(y, p + 'self_attn.q_proj.weight', heads), angles)
        k = rotate(split(y, p + 'self_attn.k_proj.weight', kv), angles).repeat(heads // kv, 0)
        v = split(y, p + 'self_attn.v_proj.weight', kv).repeat(heads // kv, 0)
        a = q @ k.transpose(0, 2, 1) / np.sqrt(config.head_dim)
        a = np.where(np.tri(s, dtype=bool), a, -np.inf)
        a = np.exp(a - a.max(-1, keepdims=True))
        a = (a / a.sum(-1, keepdims=True)) @ v
        x = x + a.transpose(1, 0, 2).reshape(s, -1) @ w[p + 'self_attn.o_proj.weight'].T
        y = norm(x, p + 'post_attention_layernorm.weight')
        gate = y @ w[p + 'mlp.gate_proj.weight'].T
        up = y @ w[p + 'mlp.up_proj.weight'].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[p + 'mlp.down_proj.weight'].T
    return norm(x, 'model.norm.weight')


def scores64(weights, config, rows):
    head = weights['score.weight'].double().numpy()[0]
    return np.array([states64(weights, config, row)[-1] @ head for row in rows])


# Writing


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def pad_rows(rows):
    return np.stack([np.pad(r, (0, max(LENGTHS) - len(r)), constant_values=-1) for r in rows])


def write_cases(name, rows, states, **values):
    """ids_BS is -1 where a row has ended; states_<row> are [S, D]."""
    shown = {f'states_{b}': states[b] for b in SHOWN}
    ids, lengths = pad_rows(rows).astype(np.int32), np.array(LENGTHS, np.int32)
    np.savez_compressed(ROOT / f'{name}.npz', ids_BS=ids, length_B=lengths, **shown, **values)


def write_scores(name, model, rows, weights, config):
    logits, states = row_outputs(model, rows)
    scores, exact = np.array([x[0] for x in logits]), scores64(weights, config, rows)
    write_cases(name, rows, states, score_B=scores, score64_B=exact)
    return {'difference': float(abs(scores - exact).max()), 'spread': float(exact.std())}


def write_causal(name, tokenizer, rows, tied):
    config = make_config(tokenizer, tie_word_embeddings=tied)
    model = randomize(LlamaForCausalLM(config), SEED + 1)
    save(model, name, tokenizer)
    model = load(LlamaForCausalLM, name)
    logits, states = row_outputs(model, rows)
    weights = model.state_dict()
    exact = [
        states64(weights, config, r) @ weights['lm_head.weight'].double().numpy().T for r in rows
    ]
    shown = {f'logits_{b}': logits[b] for b in SHOWN}
    write_cases(name, rows, states, nll=nll(logits, rows), nll64=nll(exact, rows), **shown)
    return {'difference': float(max(abs(a - b).max() for a, b in zip(logits, exact, strict=True)))}


def nll(logits, rows):
    """Mean over all predicted tokens of all rows, in float64."""
    total = [
        np.log(np.exp(x[:-1].astype(np.float64)).sum(-1)) - x[np.arange(len(r) - 1), r[1:]]
        for x, r in zip(logits, rows, strict=True)
    ]
    return np.concatenate(total).mean()


def save(model, name, tokenizer=None, **settings):
    model.save_pretrained(name, **settings)
    if tokenizer is not None:
        tokenizer.save_pretrained(name)


def load(kind, name, **settings):
    model = kind.from_pretrained(name, attn_implementation='eager', dtype=torch.float32, **settings)
    return model.eval()


def make_classifier(tokenizer, rows):
    """A classifier of one label whose scores over the rows have mean 0 and unit spread."""
    torch.manual_seed(SEED)
    config = make_config(tokenizer, num_labels=1, problem_type='regression')
    model = randomize(LlamaForSequenceClassification(config), SEED)
    with torch.no_grad():
        weights = model.state_dict()
        last = np.stack([states64(weights, config, row)[-1] for row in rows])
        target = np.linspace(-1.5, 1.5, len(rows))[[3, 0, 5, 1, 4, 2]]
        noise = model.score.weight.double().numpy()[0]
        noise -= last.T @ np.linalg.pinv(last.T) @ noise
        fit = np.linalg.pinv(last) @ (target / target.std())
        model.score.weight.copy_(torch.tensor(fit + noise * np.std(fit)))
    return model


OLD_CONFIG = {
    'architectures': ['LlamaForSequenceClassification'],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'bos_token_id': 0,
    'eos_token_id': 1,
    'hidden_act': 'silu',
    'hidden_size': 32,
    'id2label': {'0': 'LABEL_0'},
    'initializer_range': 0.02,
    'intermediate_size': 64,
    'label2id': {'LABEL_0': 0},
    'max_position_embeddings': 256,
    'mlp_bias': False,
    'model_type': 'llama',
    'num_attention_heads': 4,
    'num_hidden_layers': 3,
    'num_key_value_heads': 2,
    'pad_token_id': 4,
    'pretraining_tp': 1,
    'rms_norm_eps': 1e-05,
    'rope_scaling': {
        'factor': 8.0,
        'high_freq_factor': 4.0,
        'low_freq_factor': 1.0,
        'original_max_position_embeddings': 32,
        'rope_type': 'llama3',
    },
    'rope_theta': 50.0,
    'tie_word_embeddings': False,
    'torch_dtype': 'float32',
    'transformers_version': '4.43.3',
    'use_cache': True,
    'vocab_size': VOCABULARY,
}


def write_old_config(rows, expected):
    """seqcls' weights under a config.json of transformers 4.43; must still give seqcls' scores."""
    folder = ROOT / 'seqcls_old_config'
    folder.mkdir()
    shutil.copy(ROOT / 'seqcls' / 'model.safetensors', folder)
    text = json.dumps(OLD_CONFIG, indent=2, sort_keys=True) + '\n'
    (folder / 'config.json').write_text(text)
    logits, _ = row_outputs(load(LlamaForSequenceClassification, folder.name), rows)
    assert np.array_equal(np.array([x[0] for x in logits]), expected)


def write_peft(rows):
    """A LoRA adapter on q and v with a head of its own, over the seqcls folder."""
    base = load(LlamaForSequenceClassification, 'seqcls')
    settings = peft.LoraConfig(
        task_type='SEQ_CLS',
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=['q_proj', 'v_proj'],
        modules_to_save=['score'],
    )
    model = peft.get_peft_model(base, settings)
    rng = torch.Generator().manual_seed(SEED + 2)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=rng))
    model.save_pretrained('peft')
    (ROOT / 'peft' / 'README.md').unlink()
    written = ROOT / 'peft' / 'adapter_config.json'
    fields = json.loads(written.read_text())
    fields['target_modules'].sort()  # a set in peft: its order changes from run to run
    written.write_text(json.dumps(fields, indent=2, sort_keys=True))
    model = peft.PeftModel.from_pretrained(load(LlamaForSequenceClassification, 'seqcls'), 'peft')
    merged = load(LlamaForSequenceClassification, 'seqcls')
    merged = peft.PeftModel.from_pretrained(merged, 'peft').merge_and_unload()
    return write_scores('peft', model.eval(), rows, merged.state_dict(), merged.config)


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    os.chdir(ROOT)  # peft records the base's path as given: keep it relative
    tokenizer = make_tokenizer()
    rows = make_rows(tokenizer)
    write_tokens(tokenizer)
    save(make_classifier(tokenizer, rows), 'seqcls', tokenizer)
    model = load(LlamaForSequenceClassification, 'seqcls')
    save(model, 'seqcls_sharded', max_shard_size='50KB')
    checks = {'seqcls': write_scores('seqcls', model, rows, model.state_dict(), model.config)}
    np.savez_compressed(ROOT / 'seqcls_grads.npz', **gradients(model, rows))
    write_old_config(rows, np.load(ROOT / 'seqcls.npz')['score_B'])
    save(model.to(torch.bfloat16), 'seqcls_bf16', tokenizer)
    model = load(LlamaForSequenceClassification, 'seqcls_bf16')
    checks['seqcls_bf16'] = write_scores(
        'seqcls_bf16', model, rows, model.state_dict(), model.config
    )
    checks['causal'] = write_causal('causal', tokenizer, rows, tied=False)
    checks['causal_tied'] = write_causal('causal_tied', tokenizer, rows, tied=True)
    checks['peft'] = write_peft(rows)
    names = ('torch', 'transformers', 'peft', 'tokenizers', 'safetensors', 'numpy')
    versions = {name: version(name) for name in names}
    write_json(ROOT / 'versions.json', {'versions': versions, 'seed': SEED, 'checks': checks})
    for file in ROOT.rglob('*.safetensors'):
        file.chmod(0o644)


if __name__ == '__main__':
    main()
