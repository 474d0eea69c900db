"""Repeat the optimizer step to the end of training, or until asked to stop: log, evaluate and save on the way.

The first SIGINT or SIGTERM is noted for the next place where everything is saved; the second acts at once.
Left out: the step (step.py), and what survives a restart (state.py).
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from qlora_trainer.common.errors import InsufficientMemoryError, TrainingError
from qlora_trainer.common.process_memory import peak_resident_bytes
from qlora_trainer.common.progress import EVALUATING, SAVING, TRAINING, Progress, silent
from qlora_trainer.data.preparation.prepare import ExampleSet
from qlora_trainer.training.evaluation import eval_loss
from qlora_trainer.training.state import TrainState

MOST_SKIPPED_IN_A_ROW = 5
MOST_SKIPPED_WITH_SCALING = 16  # each halves the loss scale, which starts at 2^16


def train(
    state: TrainState,
    eval_set: ExampleSet,
    *,
    take_step: Callable[[TrainState], dict[str, float]],
    on_step: Callable[[dict[str, Any]], None],
    save: Callable[[], object],
    stop_requested: Callable[[], bool],
    stop_after: int | None = None,
    progress: Progress = silent,
) -> bool:
    """Train to the end, or until asked to stop; either way a checkpoint of the last step is saved.

    Args:
        state: all that training changes.
        eval_set: measured every `training.evaluate_every` steps; may be empty.
        take_step: takes the loader's next step and moves its cursor on; recovery.take_step.
        on_step: gets each step's metrics.
        save: writes a checkpoint.
        stop_requested: returns True once training is asked to stop, see `stop_requests`.
        stop_after: stop at this step, as an interruption would.
        progress: is called as each step, evaluation and checkpoint begins.

    Returns:
        True if the end was reached.

    Raises:
        InsufficientMemoryError: a step does not fit; a checkpoint of the one before is saved.
    """
    training = state.config.training
    state.model.train()
    while state.step < state.total_steps:
        progress(TRAINING, state.step, state.total_steps)
        started = time.perf_counter()
        try:
            metrics = take_step(state)
        except InsufficientMemoryError:
            save()
            raise
        seconds = time.perf_counter() - started
        check_skipped_steps(state, metrics)
        record = {
            "step": state.step,
            "epoch": state.step / state.loader.steps_per_epoch,
            **metrics,
            "tokens_per_second": metrics["tokens"] / seconds,
            "peak_memory_bytes": peak_memory_bytes(state.device),
            "micro_batch_tokens": state.loader.micro_batch_tokens,
            "activation_checkpointing": str(state.policy),
        }
        is_last = state.step == state.total_steps
        if state.warnings:
            record["recovered"] = " ".join(state.warnings)
            state.warnings.clear()
        if len(eval_set) and (state.step % training.evaluate_every == 0 or is_last):
            progress(EVALUATING, state.step, state.total_steps)
            record["eval_loss"] = measure_eval(state, eval_set)
        on_step(record)
        stopping = stop_requested() or state.step == stop_after
        if state.step % training.save_every == 0 or is_last or stopping:
            progress(SAVING, state.step, state.total_steps)
            save()
            if stopping or stop_requested():
                return is_last
    return True


def measure_eval(state: TrainState, eval_set: ExampleSet) -> float:
    """Compute the mean loss of the eval label tokens, by the training forward without dropout.

    Args:
        state: of the run.
        eval_set: its rows.

    Returns:
        The loss in nats a token.
    """
    limit, workers = state.loader.micro_batch_tokens, state.workers
    return eval_loss(state.model, eval_set, state.forward, limit, workers=workers)


def check_skipped_steps(state: TrainState, metrics: dict[str, float]) -> None:
    """Stop the run after several steps in a row without a finite gradient.

    Args:
        state: after a step.
        metrics: of that step.

    Raises:
        TrainingError: so many steps were skipped.
    """
    most = MOST_SKIPPED_WITH_SCALING if state.grad_scale.enabled else MOST_SKIPPED_IN_A_ROW
    if state.skipped_in_a_row >= most:
        raise TrainingError(
            f"The gradient was not finite in {state.skipped_in_a_row} steps in a row (step {state.step}, loss "
            f"{metrics['loss']}); nothing was updated in them. Lower optimizer.learning_rate, or compute in bfloat16 "
            "or float32 (model.compute_dtype). The last checkpoint is intact."
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Measure the peak of torch's allocator on CUDA; on a CPU the process's peak resident set.

    Args:
        device: of the run.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT or SIGTERM in the block; the second acts at once.

    Yields:
        A function that returns True once a signal has come.
    """
    requested = False
    previous: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(signum, previous[signum])

    try:
        for signum in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[signum] = signal.signal(signum, note)
    except ValueError:  # only the main thread may; a caller in another thread handles its own signals
        previous.clear()
    try:
        yield lambda: requested
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
