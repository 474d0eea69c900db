"""Fold an adapter into its base and write a plain dense checkpoint, tensor by tensor, without a model.

The adapter was trained on the base *as NF4 gave it back*, so by default each weight is taken through NF4 once more,
exactly as in training: cast to the recorded dtype, quantized, compared with the recorded fingerprint, and dequantized.
`base="original"` folds into the checkpoint's own weights instead, which is another function than the one trained,
sometimes a better one: callers measure both (`choose_base` in verify.py).

All arithmetic is fp32, with a single cast to the output dtype: dequantizing in bf16 and adding there would cost about
25 times the error. NF4 is no output dtype, since rounding to the same grid again would erase the adapter. The source
checkpoint's names and order drive the merge: what goes in comes out, under the same names, tied weights included.
What goes where is decided beforehand, in merge_plan.py.

The source is mapped, and values exist a few rows at a time, so the memory taken is that of one 4-bit weight, and does
not grow with the vocabulary; only weights stored (I, O), as GPT-2's, are gathered whole. Rows are computed while those
before them are written, and another thread compares the base with its fingerprint meanwhile. What was written is read
back from the disk in the end.

Legend: O out features, I in features, R rank.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4
from qlora_trainer.common.atomic import new_directory, write_text
from qlora_trainer.common.background import Background
from qlora_trainer.common.errors import DtypeRangeError, MergeError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import dtype_name
from qlora_trainer.merging.merge_plan import MergeBase, MergePlan, TensorPlan
from qlora_trainer.merging.verify import Verification
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.read_back import verify_files
from qlora_trainer.weights.reading import read_blocks, row_blocks
from qlora_trainer.weights.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from qlora_trainer.weights.side_files import copy_files

PROVENANCE_NAME = "qlora_merge.json"


@dataclass(frozen=True)
class MergeReport:
    """Report what a merge did; it is also in qlora_merge.json of the output."""

    base: MergeBase
    dtype: str
    tensors: int
    bytes: int
    folded: int  # weights that took in an adapter
    dequantized: int  # weights taken through NF4
    flushed_to_zero: int  # elements that became zero in the output dtype
    changes: tuple[str, ...]  # of files that are not the base's, a sentence each
    verification: Verification | None


def merge(
    plan: MergePlan,
    *,
    base: MergeBase = "dequantized",
    device: torch.device | str = "cpu",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: Callable[[ModelDirectory], Verification] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> MergeReport:
    """Write the merged model, to a directory that appears only when all of it has been verified.

    Args:
        plan: of `plan_merge`.
        base: what to fold into: the weights as training had them, or the checkpoint's own.
        device: of the arithmetic; the kind of device trained on gives the very codes of training.
        max_shard_bytes: of a file of weights; a larger tensor has a file of its own.
        verify: is called with the directory while it still has its temporary name, after every file has been checked;
            when it raises, nothing is left.
        provenance: JSON values to keep in qlora_merge.json next to the report.
        progress: is called as weights are written and checked.

    Returns:
        What was done, which is also in qlora_merge.json.

    Raises:
        CheckpointError: the base is not the one trained.
        MergeError: a value overflows the dtype, the original base is not there, or the verification failed.
        OutputExistsError: something has been put there since the plan was made; it is not overwritten.
        DiskError: the files could not be written; nothing is left.
    """
    if base == "original":
        plan.refuse_missing_original()
    with new_directory(plan.output) as work:
        flushed, checksums = _write_tensors(plan, base, device, work, max_shard_bytes, progress)
        copy_files(plan.inputs.base.path, plan.copied, work)
        for name, text in plan.changed.items():
            write_text(work / name, text)
        _write_config(plan, work)
        verify_files(work, [each.output for each in plan.tensors], checksums, progress)
        report = MergeReport(
            base=base,
            dtype=dtype_name(plan.dtype),
            tensors=len(plan.tensors),
            bytes=sum(each.output.nbytes for each in plan.tensors),
            folded=sum(each.fold is not None for each in plan.tensors),
            dequantized=len(plan.trained) if base == "dequantized" else 0,
            flushed_to_zero=flushed,
            changes=plan.changes,
            verification=verify(ModelDirectory.open(work)) if verify else None,
        )
        record = dataclasses.asdict(report) | dict(provenance or {})
        write_text(work / PROVENANCE_NAME, json.dumps(record, indent=2) + "\n")
    return report


def _write_tensors(
    plan: MergePlan,
    base: MergeBase,
    device: torch.device | str,
    work: Path,
    max_shard_bytes: int,
    progress: Progress,
) -> tuple[int, dict[str, int]]:
    """Write every tensor; returns how many elements the output dtype flushed to zero, and each tensor's CRC-32."""
    outputs = [each.output for each in plan.tensors]
    total = sum(output.nbytes for output in outputs)
    done = flushed = 0
    with Background() as checks, ShardWriter(work, outputs, max_shard_bytes) as writer:
        for each in plan.tensors:
            if each.recorded:
                checks.submit(each.recorded.check)
            for block in merged_blocks(each, base, device, checks):
                cast = block.to(each.output.dtype).cpu()
                if cast.is_floating_point():
                    _check_finite(each.source.name, block, cast.dtype)
                    flushed += _count_flushed(block, cast)
                writer.write(each.output.name, cast)
                done += cast.nbytes
                progress("merging", done, total)
    return flushed, writer.checksums


def merged_blocks(
    plan: TensorPlan, base: MergeBase, device: torch.device | str, checks: Background
) -> Iterator[Tensor]:
    """Yield a merged tensor by rows, as they lie in the file: fp32, or as in the source where it is not floating.

    Args:
        plan: of the tensor.
        base: what to fold into.
        device: of the arithmetic, and of what is yielded but integers and trained biases.
        checks: compares the weight with the one of training meanwhile.

    Yields:
        (rows, ...) of the tensor, all rows in order.
    """
    if plan.replacement is not None:
        yield plan.replacement.float()
    elif not plan.output.dtype.is_floating_point:
        for _, block in read_blocks(plan.source):
            yield block
    elif plan.tokens is not None:
        yield from plan.tokens.over(_weight_blocks(plan, base, device, checks))
    elif plan.transposed:  # the rows of the file are columns here: gather the whole, which Conv1D models can bear
        yield torch.cat(list(_weight_blocks(plan, base, device, checks))).T
    else:
        yield from _weight_blocks(plan, base, device, checks)


def _weight_blocks(
    plan: TensorPlan, base: MergeBase, device: torch.device | str, checks: Background
) -> Iterator[Tensor]:
    """Yield a float tensor by rows in fp32, adapter folded in; a weight as (O, I) whatever the file's order."""
    quantized = None
    if plan.trained_as:
        weight = plan.trained_as.read(device)
        checks.submit(plan.trained_as.check, weight)
        quantized = plan.trained_as.as_trained(weight) if base == "dequantized" else None
    fold = plan.fold and plan.fold.to(device)
    for rows, values in _base_blocks(plan, quantized):
        block = values.to(device).float()  # cast there: it goes over in its own dtype
        yield fold.rows(block, rows or slice(None)) if fold else block


def _base_blocks(plan: TensorPlan, quantized: NF4Weight | None) -> Iterator[tuple[slice | None, Tensor]]:
    """Yield the base's rows of a float tensor, as they were in training if that is given."""
    if quantized is not None:
        for rows in row_blocks(quantized.shape):
            yield rows, dequantize_nf4(quantized, torch.float32, rows=rows)
    elif plan.transposed:
        weight = plan.source.read().T
        for rows in row_blocks(tuple(weight.shape)):
            yield rows, weight[rows]
    else:
        yield from read_blocks(plan.source)


def _check_finite(name: str, block: Tensor, dtype: torch.dtype) -> None:
    """Refuse a block of which a value is not finite in `dtype`; casting keeps order, so its extremes show it."""
    if block.numel() == 0:
        return
    extremes = torch.stack(block.aminmax())  # NaN where there is one
    if torch.isfinite(extremes.to(dtype)).all():
        return
    if torch.isfinite(extremes).all():
        raise DtypeRangeError(
            f"{name} has a value of {float(extremes.abs().max()):.6g}, too large for {dtype_name(dtype)}."
        )
    raise MergeError(f"{name} holds values that are not finite. The base or the adapter is damaged.")


def _count_flushed(
    block: Tensor,  # fp32
    cast: Tensor,  # the same in the output dtype, on the CPU
) -> int:
    """Count the elements that became zero."""
    if cast.dtype == torch.float32:
        return 0
    bits = cast.view(torch.int16)
    # Twice the bits lose the sign, so that -0 counts as zero; integers are counted several times as fast as halves.
    return int(torch.count_nonzero(block)) - int(np.count_nonzero(bits.add(bits).numpy()))


def _write_config(plan: MergePlan, work: Path) -> None:
    """Copy config.json as the weights are: without quantization, with the dtype under its new name and its old one."""
    config = {**plan.inputs.base.config_json, **plan.config_corrections}
    config.pop("quantization_config", None)
    config |= {"dtype": dtype_name(plan.dtype), "torch_dtype": dtype_name(plan.dtype)}
    write_text(work / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
