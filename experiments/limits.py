"""What the numbers among the flags may be; checked before anything is read or written."""

import math
from typing import Any

# flag: (smallest, largest), both allowed
LIMITS = {
    'learning_rate': (math.ulp(0.0), math.inf),
    'num_train_epochs': (1, math.inf),
    'train_batch_size': (1, math.inf),
    'gradient_accumulation_steps': (1, math.inf),
    'packs': (1, math.inf),
    'warmup_steps': (0, math.inf),
    'weight_decay': (0.0, math.inf),
    'max_grad_norm': (math.ulp(0.0), math.inf),
    'max_length': (2, math.inf),
    'logging_steps': (1, math.inf),
    'save_steps': (1, math.inf),
    'eval_steps': (1, math.inf),
    'seed': (0, 2**32 - 1),
    'center_rewards_coefficient': (0.0, math.inf),
    'lm_coefficient': (0.0, math.nextafter(1, 0)),
    'dropout': (0.0, math.nextafter(1, 0)),
    'gating_temperature': (math.ulp(0.0), math.inf),
    'gating_hidden_dim': (1, math.inf),
    'gating_n_hidden': (1, math.inf),
    'initial_scale': (math.ulp(0.0), math.inf),
    'rated': (math.ulp(0.0), 1.0),
    'length_bias': (0.0, math.inf),
    'robust_epsilon': (0.0, math.nextafter(0.5, 0)),
    'lora_r': (1, math.inf),
    'lora_alpha': (math.ulp(0.0), math.inf),
    'vocabulary': (262, math.inf),  # the bytes, and six tokens of the template
    'hidden_size': (16, math.inf),
    'num_hidden_layers': (1, math.inf),
    'rounds': (1, math.inf),
    'alternations': (1, math.inf),
    'steps': (1, math.inf),
    'rows': (2, math.inf),
    'pairs': (1, math.inf),
    'tokens': (1, math.inf),
}


def check(c: Any) -> None:
    """Raises ValueError naming the first flag of `c` that is outside its limits."""
    for name, (low, high) in LIMITS.items():
        value = getattr(c, name, None)
        if not isinstance(value, int | float) or low <= value <= high:
            continue
        least = 'more than 0' if low == math.ulp(0.0) else f'at least {low}'
        most = '' if high == math.inf else f' and at most {high:.6g}'
        raise ValueError(f'--{name}: found {value}, expected {least}{most}')
    if (steps := getattr(c, 'max_steps', -1)) != -1 and steps < 1:
        raise ValueError(f'--max_steps: found {steps}, expected at least 1, or -1 for all epochs')
    if (width := getattr(c, 'hidden_size', 16)) % 16:
        raise ValueError(f'--hidden_size: found {width}, expected a multiple of 16, the head width')
