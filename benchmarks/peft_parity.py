"""Losses of our trainer and of a plain peft + bitsandbytes loop, from the same adapters, on the same rows, in fp32.

    python -m benchmarks.peft_parity MODEL_DIRECTORY ROWS.jsonl [steps] [rows a step]

The peer is what its documentation shows: transformers' 4-bit loading, get_peft_model, rows padded on the right with
an attention mask, torch's AdamW, the summed loss over the step's label tokens. Prints both losses of every step and
the largest relative difference.
"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.adapters.inject import adapter_state_dict
from qlora_trainer.config import make_config
from qlora_trainer.data.packing import Example
from qlora_trainer.optim import learning_rate
from qlora_trainer.runs import Run, start_run

RANK, ALPHA = 8, 16.0


def compare(model: Path, rows: Path, steps: int, batch_size: int, work: Path) -> list[tuple[float, float]]:
    """(our loss, the peer's loss) of each step."""
    config = make_config(
        {
            "model": {"name": str(model), "device": "cpu"},
            "adapter": {"rank": RANK, "alpha": ALPHA},
            "data": {"train": str(rows), "heldout": 0.0, "max_length": 512},
            "optimizer": {"name": "adamw", "learning_rate": 5e-4, "schedule": "constant", "warmup_ratio": 0.0},
            "training": {"output_dir": str(work / "run"), "max_steps": steps, "batch_size": batch_size},
        }
    )
    run = start_run(config)
    initial = adapter_state_dict(run.base.model)
    order = [rows_of_step(run, step, batch_size) for step in range(steps)]
    ours: list[float] = []
    run.train(lambda record: ours.append(record["loss"]))
    theirs = peer_losses(run, initial, order)
    return list(zip(ours, theirs, strict=True))


def rows_of_step(run: Run, step: int, batch_size: int) -> list[Example]:
    """The examples that our loader gives a step."""
    from qlora_trainer.data.loader import epoch_order

    epoch, within = divmod(step, run.state.loader.steps_per_epoch)
    order = epoch_order(len(run.prepared.train), run.config.training.seed, epoch)
    return [run.prepared.train[int(i)] for i in order[within * batch_size : (within + 1) * batch_size]]


def peer_losses(run: Run, initial: dict[str, torch.Tensor], order: list[list[Example]]) -> list[float]:
    """The same steps by peft + bitsandbytes."""
    source = getattr(torch, run.base.fingerprint.source_dtype)
    model = AutoModelForCausalLM.from_pretrained(
        run.base.directory,
        dtype=source,
        device_map={"": "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    for parameter in model.parameters():  # norms, embeddings and head in fp32, as ours compute
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    targets = sorted({path.rsplit(".", 1)[-1] for path in run.adapted})
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"))
    set_peft_model_state_dict(model, initial)
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)
    losses = []
    for step, examples in enumerate(order):
        input_ids, labels, mask = padded(examples)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        wanted = labels[:, 1:]
        total = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1), reduction="sum")
        loss = total / (wanted != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, run.config.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.config.optimizer, step, len(order))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def padded(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded (B, T) token ids, labels and attention mask."""
    width = max(len(example.input_ids) for example in examples)
    ids = torch.zeros((len(examples), width), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = torch.tensor(example.input_ids)
        labels[row, :length] = torch.tensor(example.labels)
        mask[row, :length] = 1
    return ids, labels, mask


def main() -> None:
    model, rows = Path(sys.argv[1]), Path(sys.argv[2])
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 20
    batch_size = int(sys.argv[4]) if len(sys.argv) > 4 else 4
    with tempfile.TemporaryDirectory() as work:
        pairs = compare(model, rows, steps, batch_size, Path(work))
    worst = 0.0
    for step, (ours, theirs) in enumerate(pairs, start=1):
        difference = abs(ours - theirs) / theirs
        worst = max(worst, difference)
        print(
            f"step {step:3d}  ours {ours:.6f}  peft + bitsandbytes {theirs:.6f}  relative difference {difference:.1e}"
        )
    print(f"largest relative difference over {steps} steps: {worst:.1e}")


if __name__ == "__main__":
    main()
