"""Run base + adapter with its weights rounded as a merge rounds them, to know what the output dtype alone costs.

A merged weight is W + sBA, cast once. Here the error of that cast is added to W and the adapter stays unmerged:
W + (cast(W + sBA) - (W + sBA)), with sBA on top. So a right merge gives the same logits but for the last bits of fp32,
however much rounding costs; and an adapter that was lost, scaled otherwise, or folded into another weight on the way
into the merged files is no part of the reference, and shows in full. Where the adapter is no sum (DoRA, IA3), what is
added to W is the change that changes the merged weight by that error (Fold.change_of_base).

Legend: O out features, I in features, R rank.
"""

from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.head_rows import HeadRows
from qlora_kernels.nf4 import dequantize_nf4
from qlora_trainer.adapters.folds import Fold
from qlora_trainer.adapters.trainable import adapter_modules
from qlora_trainer.merging.logits import HeadLogits, Logits
from qlora_trainer.merging.streamed_model import StreamedMatrix
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.weights.reading import row_blocks


@dataclass(frozen=True, eq=False)
class Rounding:
    """Add the error of casting a merged weight to the weight without its adapter."""

    dtype: torch.dtype
    fold: Fold | None = None  # what trained next to the weight; None: it has no adapter
    transposed: bool = False  # the weight is stored (I, O)

    def __call__(
        self,
        weight: Tensor,  # fp32, as it is stored
    ) -> Tensor:
        """Round the weight.

        Args:
            weight: all of it, or where it has no adapter some of its rows.

        Returns:
            fp32, of the same shape.
        """
        if self.fold is None:
            return weight.to(self.dtype).float()
        stored = weight.T if self.transposed else weight  # (O, I)
        rounded = torch.empty_like(stored)
        for rows in row_blocks(tuple(stored.shape)):  # the merge's own: a product of more rows may sum otherwise
            assert rows is not None, "a matrix has rows"
            merged = self.fold.rows(stored[rows], rows)
            error = merged.to(self.dtype).float() - merged
            rounded[rows] = stored[rows] + self.fold.change_of_base(stored[rows], error, rows)
        return rounded.T if self.transposed else rounded


@dataclass(frozen=True, eq=False)
class RoundedRows:
    """Give the rows of an LM head, rounded to a dtype."""

    head: HeadRows
    rounding: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Return (V, H)."""
        return self.head.shape

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start, H)
        """Round some rows of the weight.

        Args:
            start: the first row.
            stop: the row after the last.
            dtype: of what is returned.

        Returns:
            (stop - start, H).
        """
        return self.head.rows(start, stop, torch.float32).to(self.rounding).to(dtype)


def rounded_head(found: Logits, dtype: torch.dtype) -> Logits:
    """Round the LM head that logits are made with, where they are made when they are asked for.

    Args:
        found: logits of a model with rounded weights.
        dtype: to round to.

    Returns:
        The logits that stay those of rounded weights after `rounded_weights`.
    """
    if not isinstance(found, HeadLogits):
        return found
    bias = None if found.bias is None else found.bias.to(dtype).float()
    return replace(found, head=RoundedRows(found.head, dtype), bias=bias)


@torch.no_grad()
@contextmanager
def rounded_weights(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a model compute, in the block, with weights rounded as a merge into `dtype` rounds them.

    Args:
        model: base + adapter in fp32, streamed or whole.
        dtype: of the merged weights.
    """
    adapters = adapter_modules(model).values()
    folds = {id(module.base): (module.fold(), module.bias_fold()) for module in adapters}
    own = {id(p) for module in adapters for name, p in module.own_parameters() if not module.is_merged_as_it_is(name)}
    with ExitStack() as undo:
        for adapter in adapters:
            undo.callback(adapter.let_go)
            adapter.hold()
        for path, module in list(model.named_modules()):
            fold, bias_fold = folds.get(id(module), (None, None))
            if isinstance(module, NF4Linear):
                undo.callback(model.set_submodule, path, module)
                model.set_submodule(path, _dense(module, Rounding(dtype, fold), Rounding(dtype, bias_fold)))
            else:
                _round_parameters(module, dtype, {"weight": fold, "bias": bias_fold}, own, undo)
        yield


def _round_parameters(
    module: nn.Module, dtype: torch.dtype, folds: Mapping[str, Fold | None], own: Container[int], undo: ExitStack
) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in own:
            continue
        fold = folds.get(name)
        transposed = fold is not None and parameter.dim() > 1 and not isinstance(module, nn.Linear)
        rounding = Rounding(dtype, fold, transposed)
        if isinstance(parameter, StreamedMatrix):
            parameter.rounding = rounding
            undo.callback(setattr, parameter, "rounding", None)
        elif parameter.is_floating_point():
            undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = rounding(parameter.data.float())


def _dense(module: NF4Linear, rounding: Rounding, of_bias: Rounding) -> nn.Linear:
    """Make a plain layer of the rounded weight, with the bias rounded too."""
    dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    dense.weight = nn.Parameter(rounding(dequantize_nf4(module.nf4_weight, torch.float32)), requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(of_bias(module.bias.data.float()), requires_grad=False)
    return dense
