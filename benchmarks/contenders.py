"""Run a contender of cpu_training.py or gpu.py in a process: `python -m benchmarks.contenders NAME JOB RESULT`.

`ours` runs first: it writes the rows of each step, tokenized, with the learning rate, and the adapter it starts from;
the others read them. JOB and RESULT are JSON files. Peak memory is counted from the beginning of the first step, so
that loading a model, which takes a moment's memory of its own, is left out; Linux reports it, and on a GPU torch, which
does not see what an optimizer pages. The library of one contender is imported in its own function: in the process of
another it would count as that one's memory.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, load_peer, longest, peer_step, plain_checkpoint, rows_of_step, trainable_parameters
from benchmarks.processes import cpu_seconds, end_job
from qlora_trainer.common.process_memory import peak_private_bytes, restart_peak
from qlora_trainer.common.units import dtype_name

ALPHA = 32.0
MAX_LENGTH = 1024  # tokens of a row: TRL's default


@dataclasses.dataclass(frozen=True)
class Job:
    """Hold what all contenders do."""

    model: str
    rows: str
    steps: int
    batch_size: int
    rank: int
    work: str  # an empty directory for what is shared, and for runs
    micro_batch_tokens: int | None = None  # of ours; None: auto
    device: str = "cpu"  # or cuda: all compute in bf16 there, in fp32 here, but for TRL


@dataclasses.dataclass(frozen=True)
class Shared:
    """Hold what `ours` found and the others need."""

    model: str  # directory of safetensors
    adapter: str  # directory of the initial adapter in PEFT's format
    source_dtype: str
    max_grad_norm: float
    learning_rates: list[float]  # of each step
    rows: list[list[Row]]  # of each step


@dataclasses.dataclass(frozen=True)
class Result:
    """Hold what a contender measured."""

    losses: list[float]  # of each step
    seconds: list[float]  # of each step
    cpu_seconds: list[float]  # of each step, over all threads: what others do on the machine changes it little
    tokens: list[int]  # of each step, padding left out
    computed_tokens: list[int]  # of each step, padding included
    peak_bytes: int  # of all steps: private to the process, or on a GPU what torch reserved
    settings: str  # what is worth knowing of how it trained


class Meter:
    """Record losses and seconds of the steps, and the peak of memory in them. Make it when the model is loaded."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peak_bytes = 0
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            restart_peak()
        self._cpu_seconds_before = cpu_seconds()

    def note(self, loss: float, seconds: float) -> None:
        """Call after each step, before anything else takes memory."""
        now = cpu_seconds()
        self.losses.append(loss)
        self.seconds.append(seconds)
        self.cpu_seconds.append(now - self._cpu_seconds_before)
        self.peak_bytes = torch.cuda.max_memory_reserved() if self.device == "cuda" else peak_private_bytes() or 0
        self._cpu_seconds_before = now

    def result(self, rows: Sequence[Sequence[Row]], *, is_padded: bool, settings: str) -> Result:
        tokens = [sum(len(row.input_ids) for row in step) for step in rows]
        padded = [len(step) * longest(step) for step in rows]
        return Result(
            losses=self.losses,
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
            tokens=tokens,
            computed_tokens=padded if is_padded else tokens,
            peak_bytes=self.peak_bytes,
            settings=settings,
        )


def ours(job: Job, activations: str) -> Result:
    """Train a run of ours at its defaults, but for the model, rows, rank and steps; writes what the others need."""
    from qlora_trainer.config.load import make_config
    from qlora_trainer.runs.checkpoint import newest_checkpoint
    from qlora_trainer.runs.start import start_run
    from qlora_trainer.training.schedule import learning_rate

    config = make_config(
        {
            "model": {"name": job.model, "device": job.device, "compute_dtype": _dtype(job)},
            "adapter": {"rank": job.rank, "alpha": ALPHA},
            "data": {"train": job.rows, "eval": 0.0, "max_length": MAX_LENGTH},
            "training": {
                "output_dir": str(Path(job.work) / f"run-{activations}"),
                "max_steps": job.steps,
                "global_batch_size": job.batch_size,
                "activation_checkpointing": activations,
                "micro_batch_tokens": job.micro_batch_tokens or "auto",
            },
        }
    )
    run = start_run(config)
    rows = [rows_of_step(run, step) for step in range(job.steps)]
    shared = Shared(
        model=str(plain_checkpoint(run.base.directory.path, Path(job.work) / "model")),
        adapter=str(newest_checkpoint(run.directory).path),
        source_dtype=run.base.fingerprint.source_dtype,
        max_grad_norm=config.optimizer.max_grad_norm,
        learning_rates=[learning_rate(config.optimizer, step, job.steps) for step in range(job.steps)],
        rows=rows,
    )
    _shared_path(job).write_text(json.dumps(dataclasses.asdict(shared)), encoding="utf-8")
    meter = Meter(job.device)
    run.train(lambda record: meter.note(record["loss"], record["tokens"] / record["tokens_per_second"]))
    packed = f"packed into micro-batches of up to {run.state.loader.micro_batch_tokens} tokens"
    at_once = f"parts of them at once on {run.state.workers} threads where they divide evenly"
    settings = f"{run.config.optimizer.name}, {packed}, {at_once}, {run.state.policy}, {_dtype(job)}"
    return meter.result(rows, is_padded=False, settings=settings)


def hand_written_loop(job: Job) -> Result:
    """Train by peft + bitsandbytes in twenty lines: padded batches, gradient checkpointing, a paged optimizer."""
    shared = _read_shared(job)
    source = getattr(torch, shared.source_dtype)
    where = {"device": job.device, "compute_dtype": getattr(torch, _dtype(job))}
    model = load_peer(Path(shared.model), Path(shared.adapter), source, checkpointing=True, **where)
    settings = f"paged_adamw_32bit, rows padded to the step's longest, gradient checkpointing, {_dtype(job)}"
    return _padded_loop(model, job, shared, settings)


def unsloth(job: Job) -> Result:
    """Train by Unsloth as its documentation shows it, on our rows in our order, from an adapter of its own."""
    from unsloth import FastLanguageModel

    shared = _read_shared(job)
    model, _ = FastLanguageModel.from_pretrained(shared.model, max_seq_length=MAX_LENGTH, load_in_4bit=True)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=job.rank, lora_alpha=ALPHA, target_modules=linear, use_gradient_checkpointing="unsloth"
    )
    settings = "paged_adamw_32bit, rows padded to the step's longest, its own checkpointing, bfloat16"
    return _padded_loop(model, job, shared, settings)


def _padded_loop(model: Any, job: Job, shared: Shared, settings: str) -> Result:
    import bitsandbytes

    optimizer = bitsandbytes.optim.PagedAdamW32bit(trainable_parameters(model), weight_decay=0.0)
    meter = Meter(job.device)
    for rows, rate in zip(shared.rows, shared.learning_rates, strict=True):
        started = time.perf_counter()
        loss = peer_step(model, optimizer, rows, rate, shared.max_grad_norm, job.device)
        if job.device == "cuda":
            torch.cuda.synchronize()
        meter.note(loss, time.perf_counter() - started)
    return meter.result(shared.rows, is_padded=True, settings=settings)


def trl(job: Job) -> Result:
    """Train by TRL's SFTTrainer at its defaults, given NF4 with double quantization, LoRA, and our rows in order."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    shared = _read_shared(job)

    class Clock(TrainerCallback):
        """Time each step; its loss comes with the log after it."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.meter = Meter()

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.finished = time.perf_counter()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.meter.note(logs["loss"], self.finished - self.started)

    clock = Clock()
    arguments = SFTConfig(
        output_dir=str(Path(job.work) / "trl"),
        per_device_train_batch_size=job.batch_size,
        max_steps=job.steps,
        train_sampling_strategy="sequential",
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=shared.model,
        args=arguments,
        train_dataset=Dataset.from_list([row._asdict() for rows in shared.rows for row in rows]),
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        peft_config=LoraConfig(r=job.rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    adapters = next(p.dtype for name, p in trainer.model.named_parameters() if "lora_A" in name)
    settings = (
        f"{arguments.optim.value}, rows padded to the step's longest, gradient checkpointing "
        f"{'on' if arguments.gradient_checkpointing else 'off'}, "
        f"{'bfloat16 autocast' if arguments.bf16 else 'float32'}, adapters in {dtype_name(adapters)}, "
        f"learning rate {arguments.learning_rate:g} {arguments.lr_scheduler_type.value}"
    )
    return clock.meter.result(shared.rows, is_padded=True, settings=settings)


CONTENDERS: dict[str, Callable[[Job], Result]] = {
    "ours": lambda job: ours(job, "auto"),
    "ours, full": lambda job: ours(job, "full"),
    "hand-written loop": hand_written_loop,
    "TRL": trl,
    "Unsloth": unsloth,
}
ON_CPU = ("ours", "ours, full", "hand-written loop", "TRL")
ON_GPU = ("ours", "hand-written loop", "Unsloth")


def _dtype(job: Job) -> str:
    return "bfloat16" if job.device == "cuda" else "float32"


def _shared_path(job: Job) -> Path:
    return Path(job.work) / "shared.json"


def _read_shared(job: Job) -> Shared:
    content = json.loads(_shared_path(job).read_text(encoding="utf-8"))
    return Shared(**{**content, "rows": [[Row(*row) for row in step] for step in content["rows"]]})


def main() -> None:
    name, described, result = sys.argv[1:]
    end_job(described, result, lambda job: CONTENDERS[name](Job(**job)))


if __name__ == "__main__":
    main()
