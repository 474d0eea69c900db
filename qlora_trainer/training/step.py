"""Take one optimizer step: add the gradients of its micro-batches, clip, update.

A step is a set of rows: its loss is the summed loss of all their label tokens divided by their number, so the gradient
is the same in one micro-batch or many, packed or padded.
"""

import math
from functools import partial

import torch
from torch import Tensor

from qlora_kernels.side_by_side import DrewRandomNumbersError, run_at_once
from qlora_trainer.common.errors import MicroBatchError, TrainingError, is_out_of_memory
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.model.forward import attention_for, loss_sum
from qlora_trainer.training.flat import clip_, grad_norm
from qlora_trainer.training.schedule import learning_rate
from qlora_trainer.training.state import TrainState


def train_step(state: TrainState, packs: list[Pack]) -> dict[str, float]:
    """Run forward and backward over the micro-batches of one optimizer step, then clip and update.

    A step whose gradient is not finite, or that has no label tokens, updates nothing and does not advance the schedule.
    Where memory runs out, MicroBatchError is raised, and all but the gradients and the random state is as before the
    step.

    Args:
        state: of the run.
        packs: the micro-batches.

    Returns:
        The step's metrics: loss and grad_norm, learning_rate, tokens and trained_tokens.
    """
    label_tokens = sum(pack.label_tokens for pack in packs)
    rate = learning_rate(state.config.optimizer, state.updates, state.total_steps)
    loss, norm = accumulate_gradients(state, packs)
    both = torch.stack((loss, norm)).cpu()  # the one time that a step of a dense model waits for the device
    finite = math.isfinite(float(both[1]))
    if finite and label_tokens:
        clip_(state.groups, state.config.optimizer.max_grad_norm, norm)
        state.optimizer.step(rate)
        state.updates += 1
    state.grad_scale.update(found_non_finite=not finite)
    state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
    state.step += 1
    return {
        "loss": float(both[0]),
        "learning_rate": rate,
        "grad_norm": float(both[1]),
        "tokens": sum(pack.tokens for pack in packs),
        "trained_tokens": label_tokens,
    }


def accumulate_gradients(state: TrainState, packs: list[Pack]) -> tuple[Tensor, Tensor]:
    """Add up the gradients of all packs, and leave them in the groups.

    Args:
        state: of the run.
        packs: the micro-batches of a step.

    Returns:
        The loss of all packs together and the norm of its gradient: ((), ()).
    """
    label_tokens = sum(pack.label_tokens for pack in packs)
    state.optimizer.zero_grad()
    loss = torch.zeros((), device=state.device)
    with state.prepared.for_a_step():
        for pack in packs:
            if pack.label_tokens:
                # Summed over the step's label tokens, not averaged a micro-batch: they hold different numbers of them.
                loss += add_gradient(state, pack, label_tokens)
    state.grad_scale.unscale_(state.groups)
    return loss, grad_norm(state.groups)


def add_gradient(state: TrainState, pack: Pack, label_tokens: int) -> Tensor:
    """Run forward and backward of one micro-batch, its parts at once.

    Args:
        state: of the run.
        pack: the micro-batch.
        label_tokens: of the whole step.

    Returns:
        Its part of the loss, ().

    Raises:
        MicroBatchError: memory ran out.
        TrainingError: its parts run at once, and the model draws random numbers.
    """
    try:
        with attention_for(state.model, pack):
            parts = [part for part in pack.parts or (pack,) if part.label_tokens]
            losses = run_at_once([partial(_run, state, part, label_tokens) for part in parts], draws=True)
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]
    except DrewRandomNumbersError as error:
        raise TrainingError(
            "This model draws random numbers in its forward pass, which parts of a micro-batch that run at once cannot "
            "repeat. No step was taken. Set training.cpu_workers=1."
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MicroBatchError(pack.row_lengths, error) from error


def _run(state: TrainState, pack: Pack, label_tokens: int) -> Tensor:
    """Run forward and backward of a micro-batch, or of a part of one, and return its part of the loss, ()."""
    on_device = pack.to(state.device)
    with state.noise.on(on_device):
        part = loss_sum(state.model, on_device, state.forward.loss_path) / label_tokens
    state.grad_scale.scale(part).backward()
    return part.detach()
