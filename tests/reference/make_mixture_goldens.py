"""Write an inner model of DMoERM under tests/goldens/mixture, and what torch computes with it.

Run (in the torch environment of README.md, from the repository root):
    python tests/reference/make_mixture_goldens.py

Made with torch 2.13.0 (CPU), transformers 5.23.0 and peft 0.21.2. The base is the folder
tests/goldens/llama/seqcls, the rows of ids are those of seqcls.npz beside it. Values are float32,
eager attention, one unpadded row at a time.

    mixture/experts/<capability>/   adapters with heads, as peft saves them
    mixture/mixture.safetensors     the state of `Inner.mlp`
    mixture/values.npz              features z [rows, experts, D], heads' scores r [rows, experts],
                                    the MLP's score y [rows]
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import save_file
from transformers import LlamaForSequenceClassification

ROOT = Path(__file__).resolve().parents[1] / 'goldens'
BASE = '../llama/seqcls'
EXPERTS = ('logic', 'tone', 'length')


class Inner(torch.nn.Module):
    """The experts' features end to end, through one MLP."""

    def __init__(self, experts, width, hidden):
        super().__init__()
        linear = torch.nn.Linear
        layers = linear(experts * width, hidden), torch.nn.PReLU(), linear(hidden, 1)
        self.mlp = torch.nn.Sequential(*layers)

    def forward(self, z):
        return self.mlp(z.reshape(len(z), -1))[:, 0]


def base():
    options = {'attn_implementation': 'eager', 'dtype': torch.float32}
    return LlamaForSequenceClassification.from_pretrained(BASE, **options).eval()


@torch.no_grad()
def disturb(parameters, seed):
    rng = torch.Generator().manual_seed(seed)
    for _, p in sorted(parameters):
        p.add_(0.2 * torch.randn(p.shape, generator=rng))


def make_expert(name, seed):
    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        task_type='SEQ_CLS', r=3, lora_alpha=6, lora_dropout=0.0,
        target_modules=['q_proj', 'v_proj'], modules_to_save=['score'],
    )  # fmt: skip
    model = peft.get_peft_model(base(), settings)
    disturb([(n, p) for n, p in model.named_parameters() if p.requires_grad], seed)
    folder = Path('experts') / name
    model.save_pretrained(folder)
    (folder / 'README.md').unlink()
    fields = json.loads((folder / 'adapter_config.json').read_text())
    fields['target_modules'].sort()  # a set in peft: its order changes from run to run
    (folder / 'adapter_config.json').write_text(json.dumps(fields, indent=2, sort_keys=True))
    (folder / 'adapter_model.safetensors').chmod(0o644)


@torch.no_grad()
def run_expert(name, rows):
    """The feature and the head's score of every row."""
    model = peft.PeftModel.from_pretrained(base(), Path('experts') / name).eval()
    z, r = [], []
    for row in rows:
        found = model(input_ids=torch.tensor(row)[None], output_hidden_states=True)
        z.append(found.hidden_states[-1][0, -1])  # behind the final norm
        r.append(found.logits[0, 0])
    return torch.stack(z), torch.stack(r)


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    with np.load(ROOT / 'llama' / 'seqcls.npz') as file:
        rows = [row[row >= 0] for row in file['ids_BS']]
    folder = ROOT / 'mixture'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)  # peft records the base's path as given: keep it relative
    for seed, name in enumerate(EXPERTS):
        make_expert(name, seed)
    z, r = zip(*(run_expert(name, rows) for name in EXPERTS), strict=True)
    z, r = torch.stack(z, 1), torch.stack(r, 1)
    torch.manual_seed(9)
    inner = Inner(len(EXPERTS), z.shape[-1], 5)
    disturb(inner.named_parameters(), 9)
    save_file(dict(inner.state_dict()), 'mixture.safetensors')
    with torch.no_grad():
        y = inner(z)
    np.savez_compressed('values.npz', z=z.numpy(), r=r.numpy(), y=y.numpy())


if __name__ == '__main__':
    main()
