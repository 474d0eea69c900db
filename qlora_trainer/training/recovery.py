"""Take the same step again where memory runs out, with smaller micro-batches, then with less kept for backward.

A plan can be wrong by a little, and other programs use the card too. A step is a set of rows, so it can be taken again
with the same rows in smaller micro-batches, divided by the same number of label tokens: it learns the same, and only
last bits differ, as from any choice of micro-batches. The micro-batch that failed is split by rows first, since that
costs no arithmetic; where it is a single row, the activation policy goes one level further, as far as host memory has
space for what is offloaded. What was lowered stays so for the rest of the run, also when it is resumed: what failed
once would fail again.

`probe` looks for the failure before the first step, in the longest micro-batch of the run, rather than hours into it.

With expandable segments torch's allocator may be broken afterward, for the rest of the process. Then there is nothing
to try again here: the run is saved and goes on in a new process (runs/run.py).

Left out: memory that runs out elsewhere (evaluation, loading), and a host whose kernel ends the process: that cannot be
caught.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.common.errors import InsufficientMemoryError, MicroBatchError, ModelError
from qlora_trainer.common.units import counted, gib
from qlora_trainer.model.device import give_back_memory
from qlora_trainer.training.memory.activations import MOST_BETWEEN_OFFLOADED, Policy, offloaded_bytes, spare_host_memory
from qlora_trainer.training.not_finite import refuse_loss_not_finite
from qlora_trainer.training.rng import restore_rng, rng_state
from qlora_trainer.training.state import TrainState
from qlora_trainer.training.step import accumulate_gradients, train_step

_Result = TypeVar("_Result")


def take_step(state: TrainState) -> dict[str, float]:
    """Take the loader's next step, with less memory where it runs out, and move the cursor on.

    Meanwhile the step after is laid out in a thread; where that fails, the step after raises it.

    Where a row does not fit by itself under any policy, InsufficientMemoryError is raised and the state is that before
    the step. Where the loss shows that the model cannot compute in its dtype, TrainingError is raised.

    Args:
        state: of the run.

    Returns:
        The step's metrics.
    """

    def attempt() -> dict[str, float]:
        packs = state.loader.peek()
        if state.step + 1 < state.total_steps:
            state.loader.begin_step_after()  # while the device has this one
        return train_step(state, packs)

    metrics = until_it_fits(state, attempt, f"step {state.step + 1}")
    refuse_loss_not_finite(state, metrics, state.loader.peek)
    state.loader.advance()
    return metrics


def probe(state: TrainState, lengths: np.ndarray) -> None:
    """Run forward and backward of the largest micro-batch of the steps to come, and lower what does not fit.

    The optimizer's state exists already, and its update works in place, so a step needs no more than this. Nothing
    changes but, where memory ran out, the micro-batches and the policy: not the adapters, the optimizer, the random
    state or the data cursor; the gradients are zero. Where a row does not fit by itself under any policy,
    InsufficientMemoryError is raised and the state is as it was.

    Args:
        state: of the run.
        lengths: tokens of each training row, (rows,).
    """
    steps = state.total_steps - state.step
    if steps == 0:
        return
    state.model.train()
    random = rng_state()
    until_it_fits(
        state,
        lambda: accumulate_gradients(state, [state.loader.largest_pack(lengths, steps)]),
        "the longest micro-batch, tried before the first step",
    )
    state.optimizer.zero_grad()
    restore_rng(*random)


def until_it_fits(state: TrainState, attempt: Callable[[], _Result], what: str) -> _Result:
    """Repeat an attempt from the same state with less memory, as often as it raises MicroBatchError.

    An attempt that fails leaves partial gradients, which the next begins by zeroing in place, and another random state,
    which is put back.

    Args:
        state: of the run.
        attempt: forward and backward of one micro-batch or more.
        what: names the attempt, for the one sentence that joins `state.warnings` where memory ran out.

    Returns:
        What the attempt returned.

    Raises:
        InsufficientMemoryError: there is nothing left to lower; the state is as it was.
        RuntimeError: of the attempt, but for one of memory; the random state is as it was.
    """
    before = state.loader.micro_batch_tokens, state.policy
    random = rng_state()
    failed: list[list[int]] = []
    while True:
        try:
            result = attempt()
            break
        except MicroBatchError as error:
            failed.append(error.row_lengths)
            reason = error.reason
            state.ran_out_of_memory = True
        except RuntimeError:
            restore_rng(*random)  # the state before the attempt may be saved yet
            raise
        # Here, not in the except block: there the error's traceback still holds every frame, and they their tensors.
        give_back_memory()
        is_lower = lower(state, failed[-1])
        restore_rng(*random)  # after it, as it may plan steps
        if not is_lower:
            message = _no_space(failed[-1], reason, state)
            state.set_memory(*before)
            raise InsufficientMemoryError(message)
        if state.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(state.device)  # the peak reported is that of what fits
    if failed:
        state.warnings.append(_lowered(what, failed[0], before, (state.loader.micro_batch_tokens, state.policy)))
    return result


def lower(state: TrainState, row_lengths: list[int]) -> bool:
    """Lower the memory that later micro-batches need: by plan, or to half the tokens, or a policy that keeps less.

    Args:
        state: of the run.
        row_lengths: tokens of its rows as they were laid out.

    Returns:
        False if it cannot need less.
    """
    planned = state.smaller and state.smaller(state.policy, state.loader.micro_batch_tokens, row_lengths)
    if planned:
        try:
            state.set_memory(planned[1], planned[0])
            return True
        except ModelError:  # its layers cannot be recomputed
            pass
    if len(row_lengths) > 1:  # both bounds are below the sum, so these rows will be laid out in more micro-batches
        state.set_memory(max(sum(row_lengths) // 2, max(row_lengths)), state.policy)
        return True
    policy = _policy_with_less(state, row_lengths[0])
    if policy is None:
        return False
    try:
        state.set_memory(state.loader.micro_batch_tokens, policy)
    except ModelError:  # its layers cannot be recomputed, as every policy with less memory does
        return False
    return True


def _policy_with_less(state: TrainState, tokens: int) -> Policy | None:
    """Return the next policy with less on the device, whose part on the host fits there; None where there is none."""
    policy = state.policy.with_less_memory()
    while policy is not None and state.device.type == "cuda" and _host_lacks(state, policy, tokens):
        every = policy.offload_every_n_layers + 1
        policy = dataclasses.replace(policy, offload_every_n_layers=every) if every <= MOST_BETWEEN_OFFLOADED else None
    return policy


def _host_lacks(state: TrainState, policy: Policy, tokens: int) -> bool:
    """Return True if a policy offloads more than is offloaded now and than host memory has space for."""
    needed = offloaded_bytes(state.model, policy, tokens)
    return needed > offloaded_bytes(state.model, state.policy, tokens) and needed > spare_host_memory()


def _lowered(what: str, row_lengths: list[int], before: tuple[int, Policy], after: tuple[int, Policy]) -> str:
    changes = []
    if after[0] != before[0]:
        changes.append(f"micro-batches of at most {counted(after[0], 'token')} (before: {before[0]:,})")
    if after[1] != before[1]:
        changes.append(f"activation checkpointing {after[1]} (before: {before[1]})")
    return (
        f"Memory ran out in {what}, on {_rows(row_lengths)}. It was tried again with {' and '.join(changes)}, "
        "which the run keeps. Its steps train on the same rows; only last bits differ (and dropout's masks, where "
        "there is dropout). To change that, resume with another training.micro_batch_tokens or "
        "training.activation_checkpointing."
    )


def _no_space(row_lengths: list[int], reason: str, state: TrainState) -> str:
    next_policy = state.policy.with_less_memory()
    host = ""
    if next_policy is not None and state.device.type == "cuda" and _host_lacks(state, next_policy, row_lengths[0]):
        needed = offloaded_bytes(state.model, next_policy, row_lengths[0])
        host = f" Offloading would take {gib(needed)} of host memory, more than is free there."
    return (
        f"A row of {counted(row_lengths[0], 'token')} does not fit the memory of {state.device} by itself, even with "
        f"activation checkpointing {state.policy} ({reason}).{host} No step was lost. Close what else uses the device, "
        f"or resume on a larger one. Or start a new run with data.max_length below {row_lengths[0]} "
        f"(data.too_long=drop leaves longer rows out), a smaller {adapter_kind(state.config.adapter).size} or a "
        "smaller base; adapter.init_from takes over what was trained."
    )


def _rows(row_lengths: list[int]) -> str:
    total = counted(sum(row_lengths), "token")
    return f"a row of {total}" if len(row_lengths) == 1 else f"{len(row_lengths)} rows of together {total}"
