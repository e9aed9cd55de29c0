"""Chat templates by name, in the published formats of the models they are called after."""

_GENERATION = "{% if add_generation_prompt %}{{ 'PROMPT' }}{% endif %}"


def _with_prompt(turns: str, prompt: str) -> str:
    return turns + _GENERATION.replace('PROMPT', prompt)


NAMED = {
    'alpaca': _with_prompt(
        "{% for m in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '### Instruction:\\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ '### Response:\\n' }}{% endif %}"
        "{{ m['content'] | trim }}{% endfor %}",
        '\\n\\n### Response:\\n',
    ),
    'chatml': _with_prompt(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] "
        "+ '<|im_end|>\\n' }}{% endfor %}",
        '<|im_start|>assistant\\n',
    ),
    'exaone': _with_prompt(
        "{% if messages[0]['role'] != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{% for m in messages %}{{ '[|' + m['role'] + '|]' + m['content'] }}"
        "{% if m['role'] != 'user' %}{{ '[|endofturn|]' }}{% endif %}{{ '\\n' }}{% endfor %}",
        '[|assistant|]',
    ),
    'llama3': _with_prompt(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] "
        "+ '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}",
        '<|start_header_id|>assistant<|end_header_id|>\\n\\n',
    ),
    'mistral': (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ ' ' + m['content'] + eos_token }}{% elif m['role'] == 'user' %}"
        "{{ ' [INST] ' }}{% if messages[0]['role'] == 'system' and loop.index0 == 1 %}"
        "{{ messages[0]['content'] + '\\n\\n' }}{% endif %}{{ m['content'] + ' [/INST]' }}"
        '{% endif %}{% endfor %}'
    ),
}
