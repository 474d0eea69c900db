"""Compare losses of our trainer and of a plain peft + bitsandbytes loop, from the same adapters and rows, in fp32.

    python -m benchmarks.peft_parity MODEL_DIRECTORY ROWS.jsonl [steps] [rows a step]

The peer is that of common.py, without checkpointing, under torch's AdamW. Prints both losses of every step and the
largest relative difference.
"""

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import load_peer, peer_step, plain_checkpoint, rows_of_step, trainable_parameters
from qlora_trainer.config.load import make_config
from qlora_trainer.runs.checkpoint import newest_checkpoint
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.schedule import learning_rate

RANK, ALPHA = 8, 16.0


def compare(model: Path, rows: Path, steps: int, batch_size: int, work: Path) -> list[tuple[float, float]]:
    """Return (our loss, the peer's loss) of each step."""
    config = make_config(
        {
            "model": {"name": str(model), "device": "cpu"},
            "adapter": {"rank": RANK, "alpha": ALPHA},
            "data": {"train": str(rows), "eval": 0.0, "max_length": 512},
            "optimizer": {"name": "adamw", "learning_rate": 5e-4, "schedule": "constant", "warmup_ratio": 0.0},
            "training": {"output_dir": str(work / "run"), "max_steps": steps, "global_batch_size": batch_size},
        }
    )
    run = start_run(config)
    initial = newest_checkpoint(run.directory).path
    peer = load_peer(
        plain_checkpoint(run.base.directory.path, work / "model"), initial, source_dtype(run), checkpointing=False
    )
    ours: list[float] = []
    run.train(lambda record: ours.append(record["loss"]))
    optimizer = torch.optim.AdamW(trainable_parameters(peer), weight_decay=0.0)
    settings = config.optimizer
    theirs = [
        peer_step(
            peer, optimizer, rows_of_step(run, step), learning_rate(settings, step, steps), settings.max_grad_norm
        )
        for step in range(steps)
    ]
    return list(zip(ours, theirs, strict=True))


def source_dtype(run: Run) -> torch.dtype:
    """Return the dtype from which the run's base was quantized."""
    return getattr(torch, run.base.fingerprint.source_dtype)


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
