"""What `jaxrm plan` is asked; nothing heavy is imported."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Asked:
    """A run, and how to say what it takes."""

    model: str
    """A name such as llama-3-8b, or a folder or hub id with a config.json."""
    machine: str
    """v5e, v5p or v6e with a topology, as v5e:4x4, or a cloud's type, as v6e-16; h100, h200,
    a100-80gb or rtx-4090 with their number, as h100:8."""
    method: Literal['lora', 'full', 'score'] = 'lora'
    """What learns: a LoRA, all weights, or nothing."""
    tokens: int = 65536
    """Of a step on all chips, prompts counted once; of each member."""
    max_length: int = 1024
    """Longest row in tokens."""
    lora_r: int | None = None
    """Rank of the LoRA, by default 16; scoring has one only where there are several members."""
    lora_target_modules: tuple[str, ...] | None = None
    """Linears that it adapts, as q_proj v_proj; by default all."""
    members: int = 1
    """Models of one kind that share what is frozen, such as experts."""
    remat: Literal['none', 'dots', 'mlp', 'full'] | None = None
    """What is computed again instead of kept; by default what is fastest of what fits."""
    fsdp: int | None = None
    """How many chips share out the weights; by default what is best."""
    tensor: int | None = None
    """How many share out each layer's heads and feed-forward; by default what is best."""
    compile: bool = False
    """Have the TPU's own compiler confirm it: takes minutes and libtpu, but no TPU."""
    cache: Path = Path('~/.cache/jaxrm/plan')
    """Folder of what was compiled before."""
    json: bool = False
    """Print JSON."""
