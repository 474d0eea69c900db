"""A run that can go on training: it trains, saves, answers samples, and tells what it is and how it went.

It is made in start.py, anew or from a checkpoint, and holds all that takes part: config, rows, base, adapters, the
optimizer's state and the plan of memory. What a step is, is training/loop.py's.
"""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_trainer.adapters.formulas import lora_scaling
from qlora_trainer.adapters.inject import adapter_state_dict
from qlora_trainer.adapters.peft_config import AdapterFileConfig
from qlora_trainer.adapters.peft_format import stored_ranks, write_adapter
from qlora_trainer.common.atomic import replaced_directory
from qlora_trainer.common.errors import (
    DiskError,
    InsufficientMemoryError,
    first_line,
    is_broken_allocator,
    is_out_of_memory,
)
from qlora_trainer.common.process_memory import restart_peak
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.preparation.prepare import Prepared
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.model.device import give_back_memory
from qlora_trainer.model.load import Base
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.planning.allocator import ALLOCATOR_VARIABLES
from qlora_trainer.planning.memory_plan import MemoryPlan
from qlora_trainer.runs.checkpoint import newest_checkpoint, save_checkpoint
from qlora_trainer.runs.directory import BaseRecord, read_samples, write_base_record, write_samples
from qlora_trainer.runs.initial_adapter import target_names
from qlora_trainer.runs.metrics import RunLog
from qlora_trainer.runs.resume_rules import environment
from qlora_trainer.training.determinism import deterministic_algorithms
from qlora_trainer.training.evaluation import Answer, answer_prompts, eval_prompts
from qlora_trainer.training.loop import take_steps
from qlora_trainer.training.recovery import probe, take_step
from qlora_trainer.training.state import TrainState


@dataclasses.dataclass
class Run:
    """A run that can go on training."""

    directory: Path
    config: RunConfig
    renderer: Renderer  # of prompts, as the rows were rendered
    prepared: Prepared
    base: Base
    adapted: list[str]  # paths of the adapted layers
    state: TrainState
    warnings: list[str]
    plan: MemoryPlan | None = None  # where it is what the run does, and was worth making
    program_bytes: int | None = None  # of host memory, before the base was loaded

    def train(self, on_step: Callable[[dict[str, Any]], None], stop_after: int | None = None) -> bool:
        """Train to the end or an interruption; returns whether the end was reached, and adapter/ was written.

        Raises:
            TrainingError: the gradient is not finite, or training.deterministic cannot be had.
            InsufficientMemoryError: a row does not fit by itself, or torch's allocator broke when memory ran out.
        """
        try:
            with deterministic_algorithms(self.config.training.deterministic):
                finished = self._take_steps(on_step, stop_after)
        except RuntimeError as error:
            if not (self.state.ran_out_of_memory and is_broken_allocator(error)):
                raise
            raise InsufficientMemoryError(self._go_on_in_a_new_process(first_line(error))) from error
        if finished:
            with replaced_directory(self.directory / "adapter") as work:
                self.write_adapter(work)
                belongs_to = BaseRecord(self.base.fingerprint, self.state.step, self.directory.name, self.prepared.key)
                write_base_record(work, belongs_to)
        return finished

    def _take_steps(self, on_step: Callable[[dict[str, Any]], None], stop_after: int | None) -> bool:
        """Train and keep the metrics; returns whether the end was reached."""
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
            return take_steps(
                self.state,
                self.prepared.eval,
                take_step=take_step,
                on_step=record,
                save=self.save,
                stop_after=stop_after,
            )
        finally:
            log.close()

    def _go_on_in_a_new_process(self, reason: str) -> str:
        """Save what can be saved after the allocator broke, which takes no device memory, and say how to go on."""
        try:
            if self.state.optimizer.steps == {self.state.updates}:  # not amid an update
                self.save()
        except (RuntimeError, DiskError) as error:
            reason = f"{reason} Saving step {self.state.step} failed too: {first_line(error)}"
        saved = newest_checkpoint(self.directory).step
        return (
            f"Memory ran out on {self.base.device}, and after that torch's allocator failed for good, as it can with "
            f"expandable segments ({reason}). A new process without them goes on after step {saved}: "
            f"{ALLOCATOR_VARIABLES[0]}=expandable_segments:False qlora resume {self.directory}"
        )

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
        """Answer a few eval rows (of training, where none are kept for evaluation) and keep the answers for the report.

        A prompt begins a row as it is trained, and so is no longer than these. Where memory runs out all the same, as a
        cache for generation may be more than a step takes, there are no answers but a warning.
        """
        examples = self.prepared.eval if len(self.prepared.eval) else self.prepared.train
        prompts = eval_prompts(self.renderer, examples, self.config.evaluation.samples)
        if not prompts:
            return
        reason, is_broken = "", False
        try:
            answers = answer_prompts(
                self.base.model,
                self.renderer.tokenizer,
                prompts,
                max_new_tokens=self.config.evaluation.max_new_tokens,
                progress=progress,
            )
        except (MemoryError, RuntimeError) as error:
            is_broken = self.state.ran_out_of_memory and is_broken_allocator(error)
            if not (is_broken or is_out_of_memory(error)):
                raise
            reason = first_line(error)
        if reason:  # here, where no traceback holds what was allocated
            self.state.ran_out_of_memory = True
            if not is_broken:
                with suppress(RuntimeError):  # an allocator that broke says so at the next step, which saves the run
                    give_back_memory()
            self.warnings.append(
                f"The samples have no answers {when} training, as memory ran out ({reason}). Nothing else depends on "
                "them; fewer evaluation.max_new_tokens need less, and evaluation.samples=0 leaves them out."
            )
            return
        kept = {(sample["prompt"], sample["reference"]): sample for sample in read_samples(self.directory)}
        write_samples(self.directory, [{**_sample(a), **kept.get(_key(a), {}), when: a.answer} for a in answers])

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
        tensors = adapter_state_dict(self.base.model)
        # The scaling as alpha / rank, for rsLoRA too: some readers know lora_alpha alone.
        scaling = lora_scaling(settings.rank, settings.alpha, settings.use_rslora)
        ranks = stored_ranks(tensors)
        rank = settings.rank if len(set(ranks.values())) > 1 else max(ranks.values())
        other_ranks = {path: found for path, found in ranks.items() if found != rank}
        write_adapter(
            directory,
            tensors,
            AdapterFileConfig(
                base_model_name_or_path=self.config.model.name,
                revision=self.config.model.revision,
                r=rank,
                lora_alpha=scaling * rank,
                rank_pattern=other_ranks,
                alpha_pattern={path: scaling * other for path, other in other_ranks.items()},
                lora_dropout=settings.dropout,
                target_modules=target_names(self.base.model, self.adapted),
                bias=settings.bias,
                fan_in_fan_out=isinstance(first, NF4Linear) and first.fan_in_fan_out,
            ),
        )


def _sample(answer: Answer) -> dict[str, Any]:
    return {"prompt": answer.request, "reference": answer.expected, "before": None, "after": None}


def _key(answer: Answer) -> tuple[str, str]:
    return answer.request, answer.expected
