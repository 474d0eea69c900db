"""Train a run, save its checkpoints and its adapter, and answer its samples.

A run is made in start.py, new or from a checkpoint, and holds everything that takes part: config, rows, base, adapters,
the optimizer's state and the plan of memory. Left out: the training loop itself (training/loop.py).
"""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_trainer.adapters.inject import adapter_state_dict
from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.peft_format import write_adapter
from qlora_trainer.adapters.tokens.new_tokens import tokenizer_files_with
from qlora_trainer.common.atomic import new_directory, write_text
from qlora_trainer.common.command_line import command_line
from qlora_trainer.common.errors import (
    DiskError,
    InsufficientMemoryError,
    first_line,
    is_broken_allocator,
    is_out_of_memory,
)
from qlora_trainer.common.process_memory import restart_peak
from qlora_trainer.common.progress import SAVING, Progress, silent
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.preparation.prepare import Prepared
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.model.device import give_back_memory
from qlora_trainer.model.load import Base
from qlora_trainer.planning.allocator import ALLOCATOR_VARIABLES
from qlora_trainer.planning.memory_plan import MemoryPlan
from qlora_trainer.planning.speed.candidates import Pace
from qlora_trainer.runs.checkpoint import newest_checkpoint, save_checkpoint
from qlora_trainer.runs.directory import BaseRecord, read_samples, write_base_record, write_samples
from qlora_trainer.runs.metrics import RunLog
from qlora_trainer.runs.resume_rules import environment
from qlora_trainer.runs.turns import taught_turns
from qlora_trainer.training.determinism import deterministic_algorithms
from qlora_trainer.training.evaluation import Answer, answer_prompts, eval_prompts
from qlora_trainer.training.loop import stop_requests, train
from qlora_trainer.training.recovery import probe, take_step
from qlora_trainer.training.state import TrainState
from qlora_trainer.weights.turn_files import write_turn_files


@dataclasses.dataclass
class Run:
    """Hold everything that a run trains with, and train it."""

    directory: Path
    config: RunConfig
    renderer: Renderer  # of prompts, as the rows were rendered
    prepared: Prepared
    base: Base
    adapted: list[str]  # paths of the adapted layers
    state: TrainState
    warnings: list[str]
    pace: Pace  # device and rows, from which the time of its steps is estimated
    plan: MemoryPlan | None = None  # None if the run does not follow it, or none was made
    program_bytes: int | None = None  # of host memory, before the base was loaded
    changes: list[str] = dataclasses.field(default_factory=list)  # of the base's files on turns, next to the adapter

    def train(
        self,
        on_step: Callable[[dict[str, Any]], None],
        stop_after: int | None = None,
        progress: Progress = silent,
    ) -> bool:
        """Train to the end or until interrupted; at the end write adapter/.

        Gradients that are not finite raise TrainingError, as does training.deterministic where an operation has no
        deterministic version; a row that does not fit by itself raises InsufficientMemoryError.

        Args:
            on_step: is called with the metrics of each step.
            stop_after: the step to stop after, as if interrupted; None: the last one.
            progress: is called as each step, evaluation and saving begins.

        Returns:
            True if the end was reached.

        Raises:
            InsufficientMemoryError: torch's allocator failed for good after memory ran out.
        """
        with stop_requests() as stop_requested:
            try:
                with deterministic_algorithms(self.config.training.deterministic):
                    finished = self._take_steps(on_step, stop_after, progress, stop_requested)
            except RuntimeError as error:
                if not (self.state.ran_out_of_memory and is_broken_allocator(error)):
                    raise
                raise InsufficientMemoryError(self._go_on_in_a_new_process(first_line(error))) from error
            if finished:
                progress(SAVING, self.state.step, self.state.total_steps)
                self._save_adapter()
        return finished

    def _save_adapter(self) -> None:
        """Write adapter/, with the files on turns."""
        with new_directory(self.directory / "adapter", replaces=True) as work:
            self.write_adapter(work)
            belongs_to = BaseRecord(self.base.fingerprint, self.state.step, self.directory.name, self.prepared.key)
            write_base_record(work, belongs_to)
            taught = taught_turns(self.renderer, self.prepared.train.has_conversations())
            self.changes = write_turn_files(self.base.directory, taught, work)

    def _take_steps(
        self,
        on_step: Callable[[dict[str, Any]], None],
        stop_after: int | None,
        progress: Progress,
        stop_requested: Callable[[], bool],
    ) -> bool:
        """Train and log the metrics; return True if the end was reached."""
        if self.base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.base.device)  # the plan covers training, not loading
            probe(self.state, self.prepared.train.lengths)
        else:
            restart_peak()
        log = RunLog(self.directory, after_step=self.state.step)

        def record(metrics: dict[str, Any]) -> None:
            log.append(metrics)
            on_step(metrics)

        try:
            return train(
                self.state,
                self.prepared.eval,
                take_step=take_step,
                on_step=record,
                save=self.save,
                stop_requested=stop_requested,
                stop_after=stop_after,
                progress=progress,
            )
        finally:
            log.close()

    def _go_on_in_a_new_process(self, reason: str) -> str:
        """Save, which takes no device memory, after the allocator failed; return the message on how to go on."""
        try:
            if self.state.optimizer.steps == {self.state.updates}:  # not in the middle of an update
                self.save()
        except (RuntimeError, DiskError) as error:
            reason = f"{reason} Saving step {self.state.step} failed too: {first_line(error)}"
        saved = newest_checkpoint(self.directory).step
        return (
            f"Memory ran out on {self.base.device}, and torch's allocator can no longer be used, which may happen with "
            f"expandable segments ({reason}). Resume after step {saved} in a new process, without them: "
            f"{ALLOCATOR_VARIABLES[0]}=expandable_segments:False {command_line('resume', self.directory)}"
        )

    def save(self, directory: Path | None = None) -> Path:
        """Write a checkpoint of the present state.

        Args:
            directory: to write to; None: the run directory.

        Returns:
            The checkpoint's directory.
        """
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
        """Answer a few eval rows, or training rows if there are none, and keep the answers for the report.

        A prompt is the beginning of a row as it is trained, and so is no longer than the rows. If memory runs out all
        the same, as the cache for generation may take more than a step does, there is a warning in place of answers.

        Args:
            when: the answers' place in the report.
            progress: is called as answers are generated.

        Raises:
            RuntimeError: generation failed for another reason than memory.
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
        if reason:  # outside the except block, whose traceback would keep the tensors alive
            self.state.ran_out_of_memory = True
            if not is_broken:
                with suppress(RuntimeError):  # a broken allocator fails again at the next step, which saves the run
                    give_back_memory()
            self.warnings.append(
                f"The samples have no answers {when} training, as memory ran out ({reason}). Nothing else depends on "
                "them. Lower evaluation.max_new_tokens, or set evaluation.samples=0."
            )
            return
        kept = {(sample["prompt"], sample["reference"]): sample for sample in read_samples(self.directory)}
        write_samples(self.directory, [{**_sample(a), **kept.get(_key(a), {}), when: a.answer} for a in answers])

    def release(self) -> None:
        """Free the model and its optimizer, so that another can be loaded; the run cannot be used afterward."""
        self.state.optimizer.release()
        self.base.model = None
        del self.state
        give_back_memory()

    def write_adapter(self, directory: Path) -> None:
        """Write the adapter in its present state, in PEFT's format, with the tokenizer where it has new tokens.

        Args:
            directory: exists, and receives the files.
        """
        for name, text in tokenizer_files_with(self.base.directory, [*self.config.adapter.new_tokens]).items():
            write_text(directory / name, text)
        settings, model = self.config.adapter, self.base.model
        tensors = adapter_state_dict(model)
        named = {"base_model_name_or_path": self.config.model.name, "revision": self.config.model.revision}
        config = adapter_kind(settings).file_config(settings, model, tensors, self.adapted, named)
        write_adapter(directory, tensors, config)


def _sample(answer: Answer) -> dict[str, Any]:
    return {"prompt": answer.request, "reference": answer.expected, "before": None, "after": None}


def _key(answer: Answer) -> tuple[str, str]:
    return answer.request, answer.expected
