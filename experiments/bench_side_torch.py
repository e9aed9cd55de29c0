"""The other side of bench_trl, run by an interpreter with torch, transformers, TRL and PEFT.

As bench_side, it makes units in turns: python experiments/bench_side_torch.py TASK FOLDER.
"""

import json
import sys
from pathlib import Path

from experiments.bench_turns import Turns

TOKENS, ROW = 2048, 256


def read(folder) -> tuple:
    about = json.loads((folder / 'about.json').read_text())
    with (folder / 'pairs.jsonl').open() as file:
        return about, [json.loads(line) for line in file]


def place(about) -> dict:
    """Where and in what it computes."""
    return {'device': about.get('device', 'cpu'), 'dtype': about.get('dtype', 'float32')}


def adapter_config() -> object:
    """LoRA on all linears, and the head."""
    import peft

    return peft.LoraConfig(
        r=16, lora_alpha=32, task_type='SEQ_CLS', modules_to_save=['score'],
        target_modules=[f'{n}_proj' for n in ('q', 'k', 'v', 'o', 'gate', 'up', 'down')],
    )  # fmt: skip


def padded(rows, pad) -> dict:
    """Rows of ids as a batch."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {'input_ids': ids, 'attention_mask': mask}


def loop(turns, folder) -> None:
    """LoRA steps without a trainer: what RewardTrainer does of a batch, and nothing beside."""
    import peft
    import torch
    import transformers

    about, pairs = read(folder)
    on, size = place(about), about['train_batch_size']
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / 'model', dtype=on['dtype']
    )
    model = peft.get_peft_model(model, adapter_config()).to(on['device'])
    learns = [x for x in model.parameters() if x.requires_grad]
    tx = torch.optim.AdamW(learns, lr=1e-4)
    pad = model.config.pad_token_id
    turns.wait()
    while True:
        for at in torch.randperm(len(pairs)).split(size)[: len(pairs) // size]:
            some = [pairs[i] for i in at.tolist()]
            rows = [pair[side] for side in ('chosen_ids', 'rejected_ids') for pair in some]
            batch = {name: x.to(on['device']) for name, x in padded(rows, pad).items()}
            chosen, rejected = model(**batch).logits[:, 0].float().chunk(2)
            loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learns, 1.0)
            tx.step()
            tx.zero_grad(set_to_none=True)
            if turns.left == 1:
                learns[0].sum().item()  # waits for the device
            turns.tick(size)


def train(turns, folder, adapter) -> None:
    """TRL's trainer as it comes, but for what would slow it down here: remat, bf16, logging."""
    import datasets
    import torch
    import transformers
    import trl

    about, pairs = read(folder)
    size = about['train_batch_size']

    class Hook(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.wait()

        def on_step_end(self, args, state, control, **kwargs):
            if turns.left == 1 and on['device'] == 'cuda':
                torch.cuda.synchronize()
            turns.tick(size)

    on = place(about)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / 'model')
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / 'model', dtype=on['dtype']
    )
    config = trl.RewardConfig(
        output_dir=str(folder / 'trl'), max_steps=10**5, per_device_train_batch_size=size,
        learning_rate=1e-4, lr_scheduler_type='constant', max_length=about['max_length'],
        gradient_checkpointing=False, bf16=on['dtype'] == 'bfloat16',
        use_cpu=on['device'] == 'cpu', report_to='none',
        logging_strategy='no', save_strategy='no', disable_tqdm=True,
        dataloader_drop_last=True,
    )  # fmt: skip
    lora = adapter_config() if adapter else None
    trainer = trl.RewardTrainer(
        model=model, args=config, processing_class=tokenizer, callbacks=[Hook()],
        train_dataset=datasets.Dataset.from_list(pairs), peft_config=lora,
    )  # fmt: skip
    trainer.train()


def score(turns, folder, batch) -> None:
    """Rows as they come, in padded batches."""
    import torch
    import transformers

    about, pairs = read(folder)
    rows = [ids for pair in pairs for ids in (pair['chosen_ids'], pair['rejected_ids'])]
    rows = rows[: about['rows']]
    on = place(about)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder / 'model', dtype=on['dtype']
    ).to(on['device'])
    pad = model.config.pad_token_id
    model.eval()
    turns.wait()
    while True:
        found = []
        for at in range(0, len(rows), batch):
            part = rows[at : at + batch]
            batch_of = {name: x.to(on['device']) for name, x in padded(part, pad).items()}
            with torch.inference_mode():
                found += model(**batch_of).logits[:, 0].float().tolist()
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
    'peft_lora': loop,
    'padded_16': lambda turns, folder: score(turns, folder, 16),
    'one_by_one': lambda turns, folder: score(turns, folder, 1),
    'torch_linears': linears,
    'torch_attention': attention,
}


if __name__ == '__main__':
    SIDES[sys.argv[1]](Turns(), Path(sys.argv[2]))
