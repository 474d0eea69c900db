"""The merge: fold an adapter into its base and write a plain dense checkpoint, tensor by tensor, without a model.

The adapter was trained next to the base *as NF4 gave it back*, so by default each weight is taken through NF4 once
more, exactly as in training: cast to the recorded dtype, quantized, compared with the recorded fingerprint, and
dequantized. `base="original"` folds into the checkpoint's own weights instead, which is another function than the one
trained, sometimes a better one: callers measure both (`choose_base` in verify.py).

All arithmetic is fp32, with a single cast to the output dtype: dequantizing in bf16 and adding there would cost about
25 times the error. NF4 is no output dtype, since rounding to the same grid again would erase the adapter. The source
checkpoint's names and order drive the merge: what goes in comes out, under the same names, tied weights included.
What goes where is decided beforehand, in merge_plan.py.

The source is mapped, and values exist a few rows at a time, so the memory taken is that of one 4-bit weight, and does
not grow with the vocabulary; only weights stored (I, O), as GPT-2's, are gathered whole. Rows are computed while those
before them are written, and the base is compared with its fingerprint in a thread next to. What was written is read
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
from qlora_trainer.adapters.formulas import fold_lora
from qlora_trainer.common.atomic import new_directory, refuse_existing, remove_leftovers, write_text
from qlora_trainer.common.background import Background
from qlora_trainer.common.errors import MergeError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import dtype_name
from qlora_trainer.merging.merge_plan import MergeBase, MergeInputs, TensorPlan, plan_merge
from qlora_trainer.merging.verify import Verification
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.read_back import verify_files
from qlora_trainer.weights.reading import read_blocks, row_blocks
from qlora_trainer.weights.shard_writer import DEFAULT_SHARD_BYTES, ShardWriter
from qlora_trainer.weights.side_files import copy_files, files_to_copy, refuse_full_disk

PROVENANCE_NAME = "qlora_merge.json"


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; also in qlora_merge.json of its output."""

    base: MergeBase
    dtype: str
    tensors: int
    bytes: int
    folded: int  # weights that took in an adapter
    dequantized: int  # weights taken through NF4
    flushed_to_zero: int  # elements that became zero in the output dtype
    verification: Verification | None


def merge(
    inputs: MergeInputs,
    output: Path,
    *,
    dtype: torch.dtype = torch.float16,
    base: MergeBase = "dequantized",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: Callable[[Path], Verification] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> MergeReport:
    """Write the merged model to `output`, a new or empty directory that appears only when all has been verified.

    `verify` is called with the directory while it still has its temporary name, after every file has been checked;
    when it raises, nothing is left. `provenance`, JSON values, is kept in qlora_merge.json next to the report. What a
    merge to the same place left when it was killed is removed first.

    Raises:
        CheckpointError: the base is not the one trained.
        MergeError: the adapter does not fit, a value overflows the dtype, or the verification failed.
        OutputExistsError, DiskError: nothing is left, nothing was overwritten.
    """
    plans, copied = prepare_merge(inputs, output, dtype, base)
    with new_directory(output) as work:
        flushed, checksums = _write_tensors(plans, inputs, base, work, max_shard_bytes, progress)
        copy_files(inputs.base, copied, work)
        _write_config(inputs.base, work, dtype)
        verify_files(work, [plan.output for plan in plans], checksums, progress)
        report = MergeReport(
            base=base,
            dtype=dtype_name(dtype),
            tensors=len(plans),
            bytes=sum(plan.output.nbytes for plan in plans),
            folded=sum(plan.lora is not None for plan in plans),
            dequantized=sum(plan.trained_as is not None for plan in plans) if base == "dequantized" else 0,
            flushed_to_zero=flushed,
            verification=verify(work) if verify else None,
        )
        record = dataclasses.asdict(report) | dict(provenance or {})
        write_text(work / PROVENANCE_NAME, json.dumps(record, indent=2) + "\n")
    return report


def prepare_merge(
    inputs: MergeInputs, output: Path, dtype: torch.dtype, base: MergeBase
) -> tuple[list[TensorPlan], list[Path]]:
    """The plan of a merge and the files to copy, before a value is read; raises as `merge` where it cannot be made."""
    refuse_existing(output)
    plans = plan_merge(inputs, dtype, base)
    copied = files_to_copy(inputs.base)
    remove_leftovers(output)
    needed = sum(plan.output.nbytes for plan in plans) + sum(path.stat().st_size for path in copied)
    refuse_full_disk(output, needed, "The merged model")
    return plans, copied


def _write_tensors(
    plans: list[TensorPlan],
    inputs: MergeInputs,
    base: MergeBase,
    work: Path,
    max_shard_bytes: int,
    progress: Progress,
) -> tuple[int, dict[str, int]]:
    """Write every tensor; returns how many elements the output dtype flushed to zero, and each tensor's CRC-32."""
    total = sum(plan.output.nbytes for plan in plans)
    done = flushed = 0
    with Background() as checks, ShardWriter(work, [plan.output for plan in plans], max_shard_bytes) as writer:
        for plan in plans:
            if plan.recorded:
                checks.submit(plan.recorded.check)
            for block in merged_blocks(plan, inputs, base, checks):
                cast = block.to(plan.output.dtype).cpu()
                if cast.is_floating_point():
                    _check_finite(plan.source.name, block, cast.dtype)
                    flushed += _count_flushed(block, cast)
                writer.write(plan.output.name, cast)
                done += cast.nbytes
                progress("merging", done, total)
    return flushed, writer.checksums


def merged_blocks(plan: TensorPlan, inputs: MergeInputs, base: MergeBase, checks: Background) -> Iterator[Tensor]:
    """The merged tensor by rows, as they lie in the file: fp32, or as in the source where it is not floating."""
    if plan.replacement is not None:
        yield plan.replacement.float()
    elif not plan.output.dtype.is_floating_point:
        for _, block in read_blocks(plan.source):
            yield block
    elif plan.transposed:  # the rows of the file are columns here: gather the whole, which Conv1D models can bear
        yield torch.cat(list(_weight_blocks(plan, inputs, base, checks))).T
    else:
        yield from _weight_blocks(plan, inputs, base, checks)


def _weight_blocks(plan: TensorPlan, inputs: MergeInputs, base: MergeBase, checks: Background) -> Iterator[Tensor]:
    """A float tensor by rows in fp32, adapter folded in; a weight as (O, I) whatever the file's order."""
    quantized = None
    if plan.trained_as:
        weight = plan.trained_as.read(inputs.device)
        checks.submit(plan.trained_as.check, weight)
        quantized = plan.trained_as.as_trained(weight) if base == "dequantized" else None
    lora = [factor.to(inputs.device) for factor in plan.lora or ()]
    for rows, values in _base_blocks(plan, quantized):
        block = values.to(inputs.device).float()  # cast there: it goes over in its own dtype
        yield fold_lora(block, lora[0], lora[1][rows], inputs.scaling) if lora else block


def _base_blocks(plan: TensorPlan, quantized: NF4Weight | None) -> Iterator[tuple[slice | None, Tensor]]:
    """The base's rows of a float tensor, as they were in training where that is given."""
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
    """MergeError where a value of the fp32 block is not finite in `dtype`; casting keeps order, so extremes tell."""
    if block.numel() == 0:
        return
    extremes = torch.stack(block.aminmax())  # NaN where there is one
    if torch.isfinite(extremes.to(dtype)).all():
        return
    if torch.isfinite(extremes).all():
        raise MergeError(
            f"{name} has a value of {float(extremes.abs().max()):.6g}, too large for {dtype_name(dtype)}. Merge with "
            "--dtype bfloat16, which has the range."
        )
    raise MergeError(f"{name} holds values that are not finite. The base or the adapter is damaged.")


def _count_flushed(
    block: Tensor,  # fp32
    cast: Tensor,  # the same in the output dtype, on the CPU
) -> int:
    """How many elements became zero."""
    if cast.dtype == torch.float32:
        return 0
    bits = cast.view(torch.int16)
    # Twice the bits lose the sign, so that -0 counts as zero; integers are counted several times as fast as halves.
    return int(torch.count_nonzero(block)) - int(np.count_nonzero(bits.add(bits).numpy()))


def _write_config(directory: Path, work: Path, dtype: torch.dtype) -> None:
    """config.json as it was, but for the quantization, gone, and the dtype, under its new name and its old one."""
    config = dict(ModelDirectory.open(directory).config_json)
    config.pop("quantization_config", None)
    config |= {"dtype": dtype_name(dtype), "torch_dtype": dtype_name(dtype)}
    write_text(work / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
