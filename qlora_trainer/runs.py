"""A run: from a config to a trained adapter, and, after an interruption, back to where it stood.

This is where the rooms below are put together, in the order that lets a mistake cost least: the config and the output
directory, then the tokenizer and the data (bad rows fail in seconds), then the base, the adapters and the optimizer.
`resume_run` makes the same objects from the run directory and puts the newest valid checkpoint into them; a new run has
one of step 0, so that it can be resumed from its first moment on.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_trainer.activations import choose_policy
from qlora_trainer.adapters.delta import lora_scaling
from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.peft_format import (
    AdapterFileConfig,
    read_adapter,
    setting_differences,
    write_adapter,
)
from qlora_trainer.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from qlora_trainer.config import save_config
from qlora_trainer.data.overview import bin_labels, heldout_facts, overview_of, source_facts, train_facts
from qlora_trainer.data.preparation import Prepared
from qlora_trainer.data.rendering import Renderer
from qlora_trainer.directories import new_directory, refuse_existing, replaced_directory
from qlora_trainer.errors import CheckpointError
from qlora_trainer.evaluation import Answer, answer_questions, questions
from qlora_trainer.fingerprint import BaseFingerprint
from qlora_trainer.fitting import check_fits_here, gib, plan_as_lowered
from qlora_trainer.gguf_import import import_notices
from qlora_trainer.initial_adapter import check_base, check_settings, target_names
from qlora_trainer.model import Base, give_back_memory, load_base_model
from qlora_trainer.model_source import load_tokenizer, resolve_model
from qlora_trainer.planning import MemoryPlan
from qlora_trainer.process_memory import peak_private_bytes, private_bytes, restart_peak
from qlora_trainer.progress import Progress, silent
from qlora_trainer.quantization import NF4Linear
from qlora_trainer.recovery import probe, take_step
from qlora_trainer.report import METRICS_NAME, RunLog, read_metrics
from qlora_trainer.report_page import DataPart, Sample, write_report
from qlora_trainer.run_directory import (
    CONFIG_NAME,
    BaseRecord,
    config_changes,
    environment,
    environment_differences,
    prepare_data,
    read_run_config,
    read_samples,
    user_cache,
    write_base_record,
    write_run_config,
    write_samples,
)
from qlora_trainer.settings import RunConfig
from qlora_trainer.training import TrainState, as_lowered, build_state, train


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
    plan: MemoryPlan | None = None  # where it is what the run does, and was worth making
    program_bytes: int | None = None  # of host memory, before the base was loaded

    def train(self, on_step: Callable[[dict[str, Any]], None], stop_after: int | None = None) -> bool:
        """Train to the end or an interruption; returns whether the end was reached, and adapter/ was written."""
        if self.base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.base.device)  # the plan is of training, not of loading
            probe(self.state, self.prepared.train.lengths)
        else:
            restart_peak()
        log = RunLog(self.directory, after_step=self.state.step)

        def record(metrics: dict[str, Any]) -> None:
            log.append(metrics)
            on_step(metrics)

        try:
            finished = train(
                self.state,
                self.prepared.heldout,
                take_step=take_step,
                on_step=record,
                save=self.save,
                stop_after=stop_after,
            )
        finally:
            log.close()
        if finished:
            with replaced_directory(self.directory / "adapter") as work:
                self.write_adapter(work)
                belongs_to = BaseRecord(self.base.fingerprint, self.state.step, self.directory.name, self.prepared.key)
                write_base_record(work, belongs_to)
        return finished

    def save(self, directory: Path | None = None) -> Path:
        """Write a checkpoint of the present state, into the run directory unless another is given."""
        tensors, state = self.state.state_dict()
        return save_checkpoint(
            directory or self.directory,
            self.state.step,
            write_adapter=self.write_adapter,
            tensors=tensors,
            state={
                "training": state,
                "base": self.base.fingerprint.to_json(),
                "data": self.prepared.key,
                "config": self.config.model_dump(mode="json"),
                "environment": environment(self.base.device, self.base.compute_dtype),
            },
            keep=self.config.checkpoint.keep,
        )

    def answer_samples(self, when: Literal["before", "after"], progress: Progress = silent) -> None:
        """Answer a few held-out rows (of training, where none are held out) and keep the answers for the report."""
        examples = self.prepared.heldout if len(self.prepared.heldout) else self.prepared.train
        renderer = Renderer(self.tokenizer, template_date=self.config.data.template_date)
        asked = questions(renderer, examples, self.config.evaluation.samples)
        if not asked:
            return
        limit = self.config.evaluation.max_new_tokens
        answers = answer_questions(self.base.model, self.tokenizer, asked, max_new_tokens=limit, progress=progress)
        kept = {(sample["prompt"], sample["reference"]): sample for sample in read_samples(self.directory)}
        write_samples(self.directory, [{**_sample(a), **kept.get(_key(a), {}), when: a.answer} for a in answers])

    def summary(self) -> list[tuple[str, str]]:
        """What a person wants to know before the run begins: (name, value)."""
        trainable = sum(parameter.numel() for group in self.state.groups for parameter in group.parameters.values())
        data, optimizer, settings = self.prepared.report, self.state.optimizer, self.config.adapter
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
                f"rank {settings.rank} on {len(self.adapted)} layers, {trainable:,} numbers in {settings.dtype}",
            ),
            ("backward", f"{self.state.policy}; little is kept by {self.state.lean}"),
            ("optimizer", f"{self.config.optimizer.name}, state {optimizer.state_bytes / 2**20:.1f} MiB, {pages}"),
            (
                "training rows",
                f"{data.train.examples:,}, {data.train.tokens:,} tokens, {data.train.learned_tokens:,} learned",
            ),
            *([("rows of an epoch", _rows_by_source(self.prepared))] if self.prepared.mixture else []),
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
            notices=[*self.notices, *(record["recovered"] for record in metrics if "recovered" in record)],
            data=self._data_part(),
        )

    def _data_part(self) -> DataPart:
        """The rows in numbers, as `qlora inspect` shows them."""
        loader, report = self.state.loader, self.prepared.report
        overview = overview_of(
            self.prepared,
            batch_size=loader.batch_size,
            micro_batch_tokens=loader.micro_batch_tokens,
            packing=loader.packing,
            seed=loader.seed,
        )
        tables = [(source.name, source_facts(source, report.max_length)) for source in report.sources]
        tables += [("training", train_facts(report, overview.epoch)), ("held out", heldout_facts(report))]
        return DataPart(tables, bin_labels(overview.lengths), overview.lengths.train)

    def _plan_and_peak(self, metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
        """What training took at most, beside what was planned; empty without a plan or a step."""
        if self.plan is None or not metrics:
            return []
        if self.base.device.type == "cuda":
            peak, planned = max(record["peak_memory_bytes"] for record in metrics), self.plan.allocated
            return [("peak allocated", f"{gib(peak)}, planned {gib(planned)} ({peak / planned - 1:+.1%})")]
        if self.program_bytes is None or (measured := peak_private_bytes()) is None:
            return []
        planned = self.program_bytes + self.plan.total
        return [
            (
                "peak of the process",
                f"{gib(measured)}, planned {gib(planned)} ({measured / planned - 1:+.1%}), "
                f"of it {gib(self.program_bytes)} the program itself",
            )
        ]

    def release(self) -> None:
        """Let go of the model and its optimizer, to load another in their place."""
        self.state.optimizer.release()
        self.base.model = None
        del self.state
        give_back_memory()

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
                # The scaling as alpha / rank, for rsLoRA too: some readers know lora_alpha alone.
                lora_alpha=lora_scaling(settings.rank, settings.alpha, settings.use_rslora) * settings.rank,
                lora_dropout=settings.dropout,
                target_modules=target_names(self.base.model, self.adapted),
                bias=settings.bias,
                fan_in_fan_out=isinstance(first, NF4Linear) and first.fan_in_fan_out,
            ),
        )


def start_run(config: RunConfig, progress: Progress = silent) -> Run:
    """Make a new run; its directory appears last, with the config and a checkpoint of step 0, when all has succeeded.

    Raises:
        QLoRATrainerError: of any kind; its text says what to do. Nothing was left in the output directory.
    """
    directory = Path(config.training.output_dir)
    refuse_existing(directory)
    initial = read_adapter(Path(config.adapter.init_from)) if config.adapter.init_from else None
    path = resolve_model(config.model.name, config.model.revision, user_cache(), progress)
    config = _with_commit(config, path)
    if initial:
        check_settings(initial, config, path)
    tokenizer = load_tokenizer(path)
    config = _with_date(config, tokenizer)
    run = _assemble(config, directory, path, tokenizer, progress)
    if initial:
        run.notices += check_base(initial, config, run.base.fingerprint)
        load_adapter_state(run.base.model, initial.tensors)
    with new_directory(directory) as work:
        save_config(config, work / CONFIG_NAME)
        run.prepared.write_skipped_rows(work)
        run.save(work)
    return run


def resume_run(directory: Path, overrides: Sequence[str] = (), progress: Progress = silent) -> Run:
    """Put a run back to where its newest valid checkpoint stands.

    Args:
        directory: the run directory.
        overrides: `section.key=value` of what only concerns memory, logging or where things lie, such as
            training.activations=recompute; written to config.yaml. Edits of config.yaml count in the same way.

    Raises:
        CheckpointError: no valid checkpoint, or it belongs to other data, another base, or other settings.
    """
    config = read_run_config(directory, overrides)
    found = newest_checkpoint(directory)
    tensors, state = load_checkpoint(found.path)
    refused, notices = config_changes(state["config"], config)
    adapter = read_adapter(found.path)
    refused += [
        f"{key}: {was} → {now}, by the adapter's own file"
        for key, (was, now) in setting_differences(adapter.config, config.adapter).items()
        if not any(change.startswith(f"{key}:") for change in refused)
    ]
    if refused:
        changes = "\n".join(f"  - {change}" for change in refused)
        raise CheckpointError(
            f"These settings are not those of {found.path}, and would make it another run:\n{changes}\n"
            f"Put them back in {directory / CONFIG_NAME}, or start a new run with adapter.init_from={found.path}."
        )
    path = resolve_model(config.model.name, config.model.revision, user_cache(), progress)
    saved = state["training"].get("memory")  # checkpoints of earlier versions have none
    planned = as_lowered(config, saved) if saved else None
    run = _assemble(config, directory, path, load_tokenizer(path), progress, planned)
    if difference := BaseFingerprint.from_json(state["base"]).difference(run.base.fingerprint):
        raise CheckpointError(
            f"The base {config.model.name} is not the one this run trains on: {difference}. Restore it, or start a new "
            "run on this one."
        )
    if state["data"] != run.prepared.key:
        raise CheckpointError(
            f"The data of this run changed since {found.path.name}: the files, the tokenizer or how rows are rendered. "
            "A resumed run would not be the one that was started. Restore the data, or start a new run with "
            f"adapter.init_from={found.path}."
        )
    load_adapter_state(run.base.model, adapter.tensors)
    run.state.load_state_dict(tensors, state["training"])
    if run.plan and run.plan.policy != run.state.policy:
        run.notices.append(
            f"The run goes on with activations {run.state.policy}, as its checkpoint was made with, where "
            f"{run.plan.policy} would fit. To choose otherwise, name training.activations."
        )
        run.plan = plan_as_lowered(path, config, run.state.policy, run.state.loader.micro_batch_tokens)
    here = environment(run.base.device, run.base.compute_dtype)
    run.notices += [*found.passed_over, *notices, *environment_differences(state["environment"], here)]
    if config != read_run_config(directory):
        write_run_config(config, directory)
    return run


def _assemble(
    config: RunConfig, directory: Path, path: Path, tokenizer: Any, progress: Progress, planned: RunConfig | None = None
) -> Run:
    """A run before its first step; `planned` is what memory is planned for, where that is not the config."""
    prepared = prepare_data(config, tokenizer, path, progress)
    plan = check_fits_here(path, planned or config, progress)
    program_bytes = private_bytes()
    base = load_base_model(path, config.model, progress)
    torch.manual_seed(config.training.seed)  # of dropout; everything else draws from a generator of its own
    adapted = add_adapters(base.model, config.adapter, config.training.seed)
    policy = plan.policy if plan else choose_policy(config.training, base.device)
    state = build_state(base.model, config, prepared.train, base.compute_dtype, policy, prepared.mixture)
    notices = [*prepared.report.notices, *import_notices(path), *state.forward.notices]
    if base.device.type == "cuda":
        notices.append(
            "On CUDA the backward of attention and of index operations is not deterministic, so a resumed run repeats "
            "the uninterrupted one closely, not bit for bit."
        )
    return Run(directory, config, tokenizer, prepared, base, adapted, state, notices, plan, program_bytes)


def _rows_by_source(prepared: Prepared) -> str:
    parts = [f"{source.epoch:,} of {source.name}" for source in prepared.report.sources if source.epoch]
    return f"{prepared.report.epoch_examples:,}: {', '.join(parts)}"


def _with_commit(config: RunConfig, path: Path) -> RunConfig:
    """A hub name stands for other weights tomorrow: record the commit that its branch, tag or newest state was."""
    if (
        path.parent.name != "snapshots"
        or Path(config.model.name).exists()
        or not re.fullmatch("[0-9a-f]{40}", path.name)
    ):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": path.name})})


def _with_date(config: RunConfig, tokenizer: Any) -> RunConfig:
    """A chat template that writes today's date writes another one tomorrow: record the day that the run started."""
    day = Renderer(tokenizer, template_date=config.data.template_date).template_date
    return config.model_copy(update={"data": config.data.model_copy(update={"template_date": day})}) if day else config


def _sample(answer: Answer) -> dict[str, Any]:
    return {"prompt": answer.request, "reference": answer.expected, "before": None, "after": None}


def _key(answer: Answer) -> tuple[str, str]:
    return answer.request, answer.expected
