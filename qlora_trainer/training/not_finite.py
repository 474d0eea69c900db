"""End a run whose loss is not finite, and name the place in the model where the values left the range.

A gradient that is not finite is another thing, which a lower loss scale may mend: loop.py counts these. A loss that is
not finite before the first update shows that the model cannot compute in its dtype, so no step would train anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from qlora_trainer.common.errors import TrainingError
from qlora_trainer.common.units import dtype_name
from qlora_trainer.config.override import override
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.model.evaluation_mode import evaluation_mode
from qlora_trainer.model.forward import loss_sum
from qlora_trainer.model.modules.activation_range import LargestValue, watched_activations
from qlora_trainer.training.state import TrainState

MOST_LOSSES_NOT_FINITE = 5  # in a row, after the first update


def refuse_loss_not_finite(
    state: TrainState, metrics: Mapping[str, float], packs: Callable[[], Sequence[Pack]]
) -> None:
    """End the run at a loss that is not finite: at the first step, or after several skipped steps in a row.

    Args:
        state: after the step.
        metrics: of the step.
        packs: makes the step's micro-batches again, to find the place.

    Raises:
        TrainingError: the run ends; the message has the place and the way out.
    """
    if math.isfinite(metrics["loss"]) or (state.updates and state.skipped_in_a_row < MOST_LOSSES_NOT_FINITE):
        return
    dtype = state.model.config.dtype
    skipped = f"nothing was updated in {state.skipped_in_a_row} steps in a row" if state.updates else "nothing trains"
    cause = _cause(_first_place(state, packs()), dtype)
    raise TrainingError(
        f"The loss of step {state.step} is {metrics['loss']}, so {skipped}. {cause} {_way_out(state, dtype)}"
    )


@torch.no_grad()
def _first_place(state: TrainState, packs: Sequence[Pack]) -> LargestValue | None:
    """Run the step's forward passes again, and find the first place with a value that is not finite."""
    with evaluation_mode(state.model), watched_activations(state.model) as seen:
        for pack in packs:
            loss_sum(state.model, pack.to(state.device), state.forward.loss_path)
            if place := seen.first_beyond(torch.finfo(torch.float32).max):
                return place
    return None


def _cause(found: LargestValue | None, dtype: torch.dtype) -> str:
    place = f"the first value that is not finite is in {found.place}" if found else "the loss alone is not finite"
    if dtype == torch.float16:
        return f"In float16, which ends at {torch.finfo(dtype).max:,.0f}, {place}."
    return f"Computing in {dtype_name(dtype)}, {place}."


def _way_out(state: TrainState, dtype: torch.dtype) -> str:
    output = state.config.training.output_dir
    if dtype == torch.float16:
        anew = [
            f"model.compute_dtype={name} {override('training.output_dir', f'{output}-{name}')}"
            for name in ("float32", "bfloat16")
        ]
        return f"Start anew with {anew[0]}, or on a card that has bfloat16 with {anew[1]}."
    if state.updates:
        return "Start anew with a lower optimizer.learning_rate, or resume from the last checkpoint, which is sound."
    return "The base's weights, or the adapter that the run starts from, give such values: check these files."
