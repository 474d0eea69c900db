"""A run: from a config to a trained adapter, and, after an interruption, back to where it stood.

This is where the rooms below are put together, in the order that lets a mistake cost least: the config and the output
directory, then the tokenizer and the data (bad rows fail in seconds), then the base, the adapters and the optimizer.
`resume_run` makes the same objects from the run directory and puts the newest valid checkpoint into them.
"""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_trainer.activations import apply_policy, choose_policy
from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.peft_format import AdapterFileConfig, read_adapter, write_adapter
from qlora_trainer.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from qlora_trainer.config import AdapterConfig, RunConfig, save_config
from qlora_trainer.data.preparation import Prepared
from qlora_trainer.data.rendering import Renderer
from qlora_trainer.directories import disk_errors, refuse_existing
from qlora_trainer.errors import AdapterError, CheckpointError
from qlora_trainer.evaluation import answer_questions, questions
from qlora_trainer.fingerprint import BaseFingerprint
from qlora_trainer.fitting import check_fits_card, gib
from qlora_trainer.gguf_import import import_notices
from qlora_trainer.model import Base, load_base_model, load_tokenizer, resolve_model
from qlora_trainer.planning import MemoryPlan
from qlora_trainer.progress import Progress, silent
from qlora_trainer.quantization import NF4Linear
from qlora_trainer.report import METRICS_NAME, RunLog, read_metrics
from qlora_trainer.report_page import Sample, write_report
from qlora_trainer.run_directory import (
    environment,
    environment_differences,
    prepare_data,
    read_run_config,
    read_samples,
    user_cache,
    write_samples,
)
from qlora_trainer.training import TrainState, build_state, train


@dataclasses.dataclass
class Run:
    """A run that can go on training."""

    directory: Path
    config: RunConfig
    tokenizer: Any
    prepared: Prepared
    base: Base
    adapted: list[str]  # paths of the adapted layers
    state: TrainState
    notices: list[str]
    plan: MemoryPlan | None = None  # on CUDA

    def train(self, on_step: Callable[[dict[str, Any]], None], stop_after: int | None = None) -> bool:
        """Train to the end or an interruption; returns whether the end was reached, and adapter/ was written."""
        log = RunLog(self.directory, after_step=self.state.step)
        if self.plan:
            torch.cuda.reset_peak_memory_stats(self.base.device)  # the plan is of training, not of loading

        def record(metrics: dict[str, Any]) -> None:
            log.append(metrics)
            on_step(metrics)

        try:
            finished = train(self.state, self.prepared.heldout, on_step=record, save=self.save, stop_after=stop_after)
        finally:
            log.close()
        if finished:
            directory = self.directory / "adapter"
            with disk_errors(self.directory):
                directory.mkdir(exist_ok=True)
            self.write_adapter(directory)
        return finished

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        tensors, state = self.state.state_dict()
        return save_checkpoint(
            self.directory,
            self.state.step,
            write_adapter=self.write_adapter,
            tensors=tensors,
            state={
                "training": state,
                "base": self.base.fingerprint.to_json(),
                "data": self.prepared.key,
                "environment": environment(self.base.device),
            },
            keep=self.config.checkpoint.keep,
        )

    def answer_samples(self, when: Literal["before", "after"], progress: Progress = silent) -> None:
        """Answer a few held-out rows (of training, where none are held out) and keep the answers for the report."""
        examples = self.prepared.heldout if len(self.prepared.heldout) else self.prepared.train
        asked = questions(Renderer(self.tokenizer), examples, self.config.evaluation.samples)
        if not asked:
            return
        limit = self.config.evaluation.max_new_tokens
        answers = answer_questions(self.base.model, self.tokenizer, asked, max_new_tokens=limit, progress=progress)
        kept: list[dict[str, Any]] = read_samples(self.directory) or [
            {"prompt": a.request, "reference": a.expected, "before": None, "after": None} for a in answers
        ]
        for sample, answer in zip(kept, answers, strict=True):
            sample[when] = answer.answer
        write_samples(self.directory, kept)

    def summary(self) -> list[tuple[str, str]]:
        """What a person wants to know before the run begins: (name, value)."""
        trainable = sum(parameter.numel() for group in self.state.groups for parameter in group.parameters.values())
        data, optimizer = self.prepared.report, self.state.optimizer
        name = Path(self.config.model.name).name if Path(self.config.model.name).exists() else self.config.model.name
        pages = (
            f"{optimizer.paged_bytes / 2**20:.1f} MiB of it paged"
            if self.base.device.type == "cuda"
            else "not paged: nothing pages on a CPU"
        )
        return [
            ("base", f"{name}, {self.base.four_bit_share:.0%} of its linear weights in NF4"),
            ("compute", f"{str(self.base.compute_dtype).removeprefix('torch.')} on {self.base.device}"),
            (
                "adapters",
                f"rank {self.config.adapter.rank} on {len(self.adapted)} layers, {trainable:,} numbers in fp32",
            ),
            ("optimizer", f"{self.config.optimizer.name}, state {optimizer.state_bytes / 2**20:.1f} MiB, {pages}"),
            (
                "training rows",
                f"{data.train.examples:,}, {data.train.tokens:,} tokens, {data.train.learned_tokens:,} learned",
            ),
            ("held-out rows", f"{data.heldout.examples:,}, {data.heldout.tokens:,} tokens"),
            ("steps", f"{self.state.total_steps:,}, each of up to {self.config.training.batch_size} rows"),
            *([("planned memory", f"{gib(self.plan.total)}, peak at {self.plan.operation}")] if self.plan else []),
        ]

    def write_report(self, measured: Sequence[tuple[str, str]] = (), title: str | None = None) -> Path:
        """report.html of the run as it stands; `measured` are (name, value) pairs to show first."""
        metrics = read_metrics(self.directory / METRICS_NAME)
        losses = [record["heldout_loss"] for record in metrics if record.get("heldout_loss") is not None]
        is_finished = self.state.step == self.state.total_steps
        unfinished = [] if is_finished else [("stopped at", f"step {self.state.step:,}")]
        loss = [("held-out loss", f"{losses[-1]:.4f} (first {losses[0]:.4f})")] if losses else []
        return write_report(
            self.directory,
            title=title or self.directory.name,
            config_yaml=(self.directory / "config.yaml").read_text(encoding="utf-8"),
            metrics=metrics,
            summary=[*measured, *loss, *unfinished, *self.summary(), *self._plan_and_peak(metrics)],
            samples=[Sample(**sample) for sample in read_samples(self.directory)],
            notices=self.notices,
        )

    def _plan_and_peak(self, metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
        """What torch allocated at most, beside what was planned; empty without a plan or a step."""
        if self.plan is None or not metrics:
            return []
        peak, planned = max(record["peak_memory_bytes"] for record in metrics), self.plan.allocated
        return [("peak allocated", f"{gib(peak)}, planned {gib(planned)} ({peak / planned - 1:+.1%})")]

    def release(self) -> None:
        """Let go of the model and its optimizer, to load another in their place."""
        self.base.model = None
        del self.state
        gc.collect()

    def write_adapter(self, directory: Path) -> None:
        """The adapter as it is now, in PEFT's format."""
        settings = self.config.adapter
        first = self.base.model.get_submodule(self.adapted[0]).base
        write_adapter(
            directory,
            adapter_state_dict(self.base.model),
            AdapterFileConfig(
                base_model_name_or_path=self.config.model.name,
                revision=self.config.model.revision,
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=_target_names(self.base.model, self.adapted),
                bias=settings.bias,
                use_rslora=settings.use_rslora,
                fan_in_fan_out=isinstance(first, NF4Linear) and first.fan_in_fan_out,
            ),
        )


def start_run(config: RunConfig, progress: Progress = silent) -> Run:
    """Make a new run; its directory is created last, with the config, when all else has succeeded."""
    directory = Path(config.training.output_dir)
    refuse_existing(directory)
    run = _assemble(config, directory, progress)
    if config.adapter.init_from:
        initial = read_adapter(Path(config.adapter.init_from))
        _check_same_function(initial.config, config.adapter)
        load_adapter_state(run.base.model, initial.tensors)
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, directory / "config.yaml")
    return run


def resume_run(directory: Path, progress: Progress = silent) -> Run:
    """Put a run back to where its newest valid checkpoint stands.

    Raises:
        CheckpointError: no valid checkpoint, or it belongs to other data, another base, or other settings.
    """
    config = read_run_config(directory)
    found = newest_checkpoint(directory)
    tensors, state = load_checkpoint(found.path)
    run = _assemble(config, directory, progress)
    if difference := BaseFingerprint.from_json(state["base"]).difference(run.base.fingerprint):
        raise CheckpointError(
            f"The base {config.model.name} is not the one this run trains on: {difference}. Restore it, or start a new "
            "run with adapter.init_from."
        )
    if state["data"] != run.prepared.key:
        raise CheckpointError(
            f"The data of this run changed since {found.path.name}: the files, the tokenizer or how rows are rendered. "
            "A resumed run would not be the one that was started. Restore the data, or start a new run with "
            f"adapter.init_from={found.path}."
        )
    load_adapter_state(run.base.model, read_adapter(found.path).tensors)
    run.state.load_state_dict(tensors, state["training"])
    run.notices += found.passed_over
    run.notices += environment_differences(state["environment"], environment(run.base.device))
    return run


def _target_names(model: Any, adapted: list[str]) -> list[str]:
    """The shortest names that PEFT resolves to exactly the adapted layers: the ends of their paths, or the paths."""
    ends = {path.rsplit(".", 1)[-1] for path in adapted}
    matched = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in ends]
    return sorted(ends) if sorted(matched) == sorted(adapted) else sorted(adapted)


def _assemble(config: RunConfig, directory: Path, progress: Progress) -> Run:
    path = resolve_model(config.model.name, config.model.revision, user_cache(), progress)
    tokenizer = load_tokenizer(path)
    prepared = prepare_data(config, tokenizer, path, progress)
    plan = check_fits_card(path, config, progress)
    base = load_base_model(path, config.model, progress)
    torch.manual_seed(config.training.seed)  # of dropout; everything else draws from a generator of its own
    adapted = add_adapters(base.model, config.adapter, config.training.seed)
    apply_policy(base.model, choose_policy(config.training.activations, base.device))
    state = build_state(base.model, config, prepared.train, base.compute_dtype)
    notices = [*prepared.report.notices, *import_notices(path), *state.forward.notices]
    if base.device.type == "cuda":
        notices.append(
            "On CUDA the backward of attention and of index operations is not deterministic, so a resumed run repeats "
            "the uninterrupted one closely, not bit for bit."
        )
    return Run(directory, config, tokenizer, prepared, base, adapted, state, notices, plan)


def _check_same_function(found: AdapterFileConfig, wanted: AdapterConfig) -> None:
    """An adapter's numbers mean something only with its own rank, alpha and scaling rule."""
    pairs = {
        "adapter.rank": (found.r, wanted.rank),
        "adapter.alpha": (found.lora_alpha, wanted.alpha),
        "adapter.use_rslora": (found.use_rslora, wanted.use_rslora),
        "adapter.bias": (found.bias, wanted.bias),
    }
    if changes := [f"{key}={value}" for key, (value, ours) in pairs.items() if value != ours]:
        raise AdapterError(
            f"The adapter {wanted.init_from} was made with other settings than this config has. To start from it, set "
            f"{' '.join(str(change).lower() for change in changes)}."
        )
