"""The other side of bench_trl, run by an interpreter with torch, transformers, TRL and PEFT.

As bench_side, it makes units in turns: python experiments/bench_side_torch.py TASK FOLDER.
"""

import json
import os
import sys
import time
from pathlib import Path

TOKENS, ROW = 2048, 256


class Turns:
    """Waits for a number of units, counts them down, says how long they took, and waits again."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), 'w')
        sys.stdout = sys.stderr
        self.more = {}

    def wait(self) -> int:
        """The units to make; ends the process with the input."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self.left = self.asked = int(line)
        self.done = 0.0
        self.start = time.perf_counter(), time.process_time()
        return self.asked

    def tick(self, done=1, units=1) -> None:
        """So many more units are made, which are worth `done`."""
        self.left -= units
        self.done += done
        if self.left > 0:
            return
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        said = {'seconds': wall, 'cpu': cpu, 'done': self.done, **self.more}
        self.out.write(json.dumps(said) + '\n')
        self.out.flush()
        self.more = {}
        self.wait()


def read(folder) -> tuple:
    about = json.loads((folder / 'about.json').read_text())
    with (folder / 'pairs.jsonl').open() as file:
        return about, [json.loads(line) for line in file]


def train(turns, folder, adapter) -> None:
    """TRL's trainer as it comes, but for what would slow it down here: remat, bf16, logging."""
    import datasets
    import peft
    import transformers
    import trl

    about, pairs = read(folder)
    size = about['train_batch_size']

    class Hook(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.wait()

        def on_step_end(self, args, state, control, **kwargs):
            turns.tick(size)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / 'model')
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / 'model', dtype='float32'
    )
    config = trl.RewardConfig(
        output_dir=str(folder / 'trl'), max_steps=10**5, per_device_train_batch_size=size,
        learning_rate=1e-4, lr_scheduler_type='constant', max_length=about['max_length'],
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to='none',
        logging_strategy='no', save_strategy='no', disable_tqdm=True,
        dataloader_drop_last=True,
    )  # fmt: skip
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, task_type='SEQ_CLS', modules_to_save=['score'],
        target_modules=[f'{n}_proj' for n in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')],
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        model=model, args=config, processing_class=tokenizer, callbacks=[Hook()],
        train_dataset=datasets.Dataset.from_list(pairs), peft_config=lora if adapter else None,
    )  # fmt: skip
    trainer.train()


def score(turns, folder, batch) -> None:
    """Rows as they come, in padded batches."""
    import torch
    import transformers

    about, pairs = read(folder)
    rows = [ids for pair in pairs for ids in (pair['chosen_ids'], pair['rejected_ids'])]
    rows = rows[: about['rows']]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / 'model', dtype='float32'
    )
    pad = model.config.pad_token_id
    model.eval()
    turns.wait()
    while True:
        found = []
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            longest = max(map(len, part))
            ids = torch.tensor([row + [pad] * (longest - len(row)) for row in part])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in part])
            with torch.inference_mode():
                found += model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
        turns.more = {'scores': found[:64]}
        turns.tick(len(found), len(found))


def repeat(turns, fn, flops) -> None:
    import torch

    with torch.inference_mode():
        fn()
        turns.wait()
        while True:
            fn()
            turns.tick(flops / 1e9)


def linears(turns, folder) -> None:
    import numpy as np
    import torch

    about = json.loads((folder / 'about.json').read_text())
    D, F, heads = about['D'], about['F'], about['Q'] * about['H']
    draw = lambda *s: torch.tensor(np.random.default_rng(0).normal(size=s), dtype=torch.float32)  # noqa: E731
    x, qkvo, gate_up, down = draw(TOKENS, D), draw(4, heads, D), draw(2, F, D), draw(D, F)
    linear = torch.nn.functional.linear

    def fn():
        y = [linear(x, w) for w in qkvo]
        h = [linear(x, w) for w in gate_up]
        return y, h, linear(h[0], down)

    repeat(turns, fn, 2 * TOKENS * (4 * D * heads + 3 * D * F))


def attention(turns, folder) -> None:
    import numpy as np
    import torch

    about = json.loads((folder / 'about.json').read_text())
    Q, H, R = about['Q'], about['H'], TOKENS // ROW
    draw = np.random.default_rng(0).normal(size=(3, R, Q, ROW, H))
    q, k, v = torch.tensor(draw, dtype=torch.float32)
    attend = torch.nn.functional.scaled_dot_product_attention
    flops = 4 * R * Q * H * ROW * (ROW + 1) / 2
    repeat(turns, lambda: attend(q, k, v, is_causal=True), flops)


SIDES = {
    'trl_full': lambda turns, folder: train(turns, folder, adapter=False),
    'trl_lora': lambda turns, folder: train(turns, folder, adapter=True),
    'padded_16': lambda turns, folder: score(turns, folder, 16),
    'one_by_one': lambda turns, folder: score(turns, folder, 1),
    'torch_linears': linears,
    'torch_attention': attention,
}


if __name__ == '__main__':
    SIDES[sys.argv[1]](Turns(), Path(sys.argv[2]))
