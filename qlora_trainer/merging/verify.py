"""Verify that the merged model is the one that was trained, by its logits, and choose the base to merge into.

The merged model's logits on sample rows are compared with those of base + adapter through the training forward: the one
check that sees a wrong value in a sound file. The files themselves are read back before (weights/read_back.py).

Both forwards compute in fp32, and so does the comparison (sums in fp64): bf16 arithmetic alone differs by more than
the bound allows.

Legend: B rows, T tokens of each, N tokens of all, H hidden size, V vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qlora_kernels.head_rows import DenseRows
from qlora_trainer.common.command_line import please_report
from qlora_trainer.common.errors import MergeError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import counted
from qlora_trainer.merging.logits import HeadLogits, LogitDifference, Logits, WholeLogits, compare_logits, compare_pairs
from qlora_trainer.model.forward import LossPath
from qlora_trainer.model.modules.lm_head import head_weight
from qlora_trainer.weights.model_directory import ModelDirectory

# A right merge gives the logits of base + adapter with the same rounding (rounding.py), but for fp32's last bits. So it
# may differ from these by a share of what rounding costs the same model on the same rows, or by what fp32 itself costs
# where that is more; docs/decisions/0040 has the numbers.
SHARE_OF_ROUNDING = 5e-4
LEAST_KL_BOUND = 5e-9
# A merge into fp32 rounds nothing, so nothing tells how far last bits lead in this model.
UNROUNDED_KL_BOUND = 2e-8
# A router's choice jumps: where two experts are as good as equal, the last bits send a token to the other one, which
# cost up to 1e-3 on 512 tokens.
LEAST_ROUTED_KL_BOUND = 1e-3
# How much worse on eval rows an adapter may be on the original base than on the one it was trained on: a share of
# the loss, or nats where the loss is so small that its share says nothing.
MOST_WORSE_RELATIVE, MOST_WORSE_NATS = 0.10, 0.01
_MOST_OFF = 1e-4  # relative, of logits made of hidden states next to the model's own


@dataclass(frozen=True)
class PlainAgreement:
    """Report how plain transformers answered eval prompts: all as base + adapter, but for ties."""

    prompts: int
    tokens: int  # of the answers
    stopped: int  # answers that ended by a stop token
    ties: int  # tokens that base + adapter takes for as good as equal to its own choice
    by_arithmetic: int  # tokens that the files give in fp32, and not in the dtype they are written in
    dtype: str | None  # that plain transformers computed in; None: the model did not fit there, and was streamed
    left_out: int  # rows that spell a control token

    def __str__(self) -> str:
        """Describe the agreement.

        Returns:
            A phrase for people.
        """
        where = f"computing in {self.dtype}" if self.dtype else "reading all but the weights, which were streamed"
        also = f", {self.by_arithmetic} by the arithmetic of {self.dtype}" if self.by_arithmetic else ""
        return (
            f"{where}: prompts, stops and {self.tokens} tokens of {self.prompts} answers are those of base + adapter "
            f"({counted(self.ties, 'tie')}{also}); {self.stopped} of {self.prompts} ended by a stop token"
        )


@dataclass(frozen=True)
class Verification:
    """Hold a comparison that passed: what rounding costs, how the merged model differs, and what is beyond rounding."""

    rows: int
    difference: LogitDifference  # of the merged model from base + adapter
    rounding: LogitDifference  # of base + adapter with the same rounding of its weights from base + adapter
    beyond_rounding: LogitDifference  # of the merged model from base + adapter with the same rounding
    kl_bound: float  # of what is beyond rounding
    plain: PlainAgreement | None = None


@dataclass(frozen=True)
class BaseChoice:
    """Report which base `auto` took, and the eval losses it saw."""

    base: Literal["dequantized", "original"]
    eval_loss: dict[str, float]
    reason: str


def kl_bound(rounding: LogitDifference, is_routed: bool) -> float:
    """Compute how much a right merge's logits may differ from those of base + adapter with the same rounding.

    Args:
        rounding: what rounding costs; a KL of 0 where nothing is rounded.
        is_routed: the model has experts.

    Returns:
        KL in nats.
    """
    least = LEAST_KL_BOUND if rounding.kl else UNROUNDED_KL_BOUND
    return max(SHARE_OF_ROUNDING * rounding.kl, LEAST_ROUTED_KL_BOUND if is_routed else least)


def verify_merge(
    directory: ModelDirectory,
    sample_rows: Sequence[Sequence[int]],
    reference: Logits,
    rounded: Logits,
    load_merged: Callable[[ModelDirectory], Any],
    loss_path: LossPath,
    is_routed: bool = False,
    progress: Progress = silent,
) -> Verification:
    """Compare the merged model's logits with those of base + adapter on token rows.

    Args:
        directory: of the merged model.
        sample_rows: token ids of each row.
        reference: the logits of base + adapter at all tokens of the rows, one row after the other.
        rounded: the same with weights rounded as the merged ones are.
        load_merged: loads the transformers model of the directory, in fp32.
        loss_path: how such a model's hidden states become logits.
        is_routed: the model has experts.
        progress: is called when the comparison begins.

    Returns:
        What was compared.

    Raises:
        MergeError: the KL is above the bound, or a logit is not finite.
    """
    assert sample_rows, "no rows to compare on"
    progress("comparing logits", 0, None)
    merged = row_logits(load_merged(directory), sample_rows, loss_path)
    rounding, difference, beyond = compare_pairs([(reference, rounded), (reference, merged), (rounded, merged)])
    bound = kl_bound(rounding, is_routed)
    if not math.isfinite(difference.kl) or not beyond.kl <= bound:
        raise MergeError(
            "The merged model's logits are not those of the trained one: beyond what rounding costs, KL "
            f"{beyond.kl:.2e} (at most {bound:.1e}), relative error {beyond.relative_error:.2e}, same first choice for "
            f"{beyond.top1_agreement:.1%} of {beyond.tokens} tokens. Nothing was kept. "
            f"{please_report()}"
        )
    return Verification(len(sample_rows), difference, rounding, beyond, bound)


@torch.no_grad()
def row_logits(model: Any, rows: Sequence[Sequence[int]], loss_path: LossPath) -> Logits:
    """Take a transformers model's logits at every token of some rows, from one forward pass.

    Rows are padded on the right and not masked: the tokens of a causal model do not see what is behind them. The
    model's own logits are taken for the last of each padded row, and must be those that `loss_path` makes of its
    hidden states; else it gives all its logits, which takes tokens x vocabulary of memory, in another pass.

    Args:
        model: in fp32.
        rows: token ids of each row.
        loss_path: how the model's hidden states become logits.

    Returns:
        The logits, one row after the other.
    """
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64, device=next(model.parameters()).device)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    if not loss_path.own_logits:
        hidden, last = _last_logits(model, ids)
        made = logits_of_hidden(model, hidden[:, -1], loss_path)
        if compare_logits(WholeLogits(last), made).relative_error <= _MOST_OFF:
            return logits_of_hidden(model, torch.cat([hidden[i, : len(row)] for i, row in enumerate(rows)]), loss_path)
    found = model(input_ids=ids, use_cache=False).logits.float()
    return WholeLogits.of_rows([found[index, : len(row)] for index, row in enumerate(rows)])


def logits_of_hidden(
    model: Any,
    hidden: Tensor,  # (N, H)
    loss_path: LossPath,
) -> HeadLogits:
    """Hold hidden states with the model's LM head, which makes their logits when they are asked for.

    Args:
        model: whose head and bias are taken.
        hidden: states that a forward pass gave.
        loss_path: scale and softcap of its logits.

    Returns:
        The logits, not made yet.
    """
    head = model.get_output_embeddings()
    weight = head_weight(head)
    rows = DenseRows(weight) if isinstance(weight, Tensor) else weight
    return HeadLogits(hidden, rows, head.bias, loss_path.logit_scale, loss_path.softcap)


def _last_logits(
    model: Any,
    ids: Tensor,  # (B, T)
) -> tuple[Tensor, Tensor]:  # (B, T, H), (B, V) fp32 on the CPU
    """Run a forward pass for its hidden states, and the model's own logits at the last tokens."""
    seen: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _, inputs, output: seen.append(output.last_hidden_state))
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    try:
        own = model(input_ids=ids, use_cache=False, **only_last).logits[:, -1]
    finally:
        hook.remove()
    return seen[0], own.float().cpu()


def choose_base(dequantized_loss: float | None, original_loss: float | None) -> BaseChoice:
    """Take the base of the lower eval loss, or the one trained on where they tie or were not both measured.

    Args:
        dequantized_loss: nats a token on the dequantized base; None: not measured.
        original_loss: nats a token on the original base; None: not measured.

    Returns:
        The base with the losses and the reason.
    """
    losses = {
        name: loss
        for name, loss in (("dequantized", dequantized_loss), ("original", original_loss))
        if loss is not None
    }
    if dequantized_loss is None or original_loss is None:
        reason = "the two bases could not both be measured, so the one the adapter was trained on was taken"
        return BaseChoice("dequantized", losses, reason)
    better: Literal["dequantized", "original"] = "original" if original_loss < dequantized_loss else "dequantized"
    reason = f"eval loss {dequantized_loss:.4f} on the dequantized base, {original_loss:.4f} on the original"
    return BaseChoice(better, losses, reason)


def check_original(dequantized_loss: float | None, original_loss: float | None) -> None:
    """Refuse a merge into the original base where the adapter is clearly worse on it than on the one trained on.

    The comparison of logits cannot show that: a merge into the original base is compared with original + adapter.

    Args:
        dequantized_loss: nats a token on the dequantized base; None: not measured.
        original_loss: nats a token on the original base; None: not measured.

    Raises:
        MergeError: it is worse by more than MOST_WORSE_RELATIVE and MOST_WORSE_NATS.
    """
    if dequantized_loss is None or original_loss is None:
        return
    most = max(dequantized_loss * (1 + MOST_WORSE_RELATIVE), dequantized_loss + MOST_WORSE_NATS)
    if not original_loss <= most:
        raise MergeError(
            f"On the original base this adapter has an eval loss of {original_loss:.4f}, and of "
            f"{dequantized_loss:.4f} on the dequantized base it was trained on: more than {MOST_WORSE_RELATIVE:.0%} "
            "worse. Merge with --base dequantized. Nothing was written."
        )
