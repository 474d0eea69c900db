"""Read tensors of safetensors and GGUF files by rows from anywhere, or by blocks of rows.

A merge of a 7B model should need the memory of a few rows, so nothing here holds a whole shard: a file is mapped, and
slices are taken of it.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.weights.tensors import TensorInfo


def read_rows(
    info: TensorInfo,
    rows: Tensor,  # (N,) numbers
) -> Tensor:  # (N, ...)
    """Read rows from anywhere in a tensor; of one that cannot be mapped, no others are decoded.

    Args:
        info: of the tensor.
        rows: counted from 0.

    Returns:
        The rows on the CPU, in the tensor's dtype.
    """
    if info.offset is not None:
        return info.read()[rows]
    numbers = rows.tolist()
    starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    spans = [slice(numbers[i], numbers[j - 1] + 1) for i, j in itertools.pairwise([*starts, len(numbers)])]
    return torch.cat([info.read(span) for span in spans])


def read_ahead(infos: Iterable[TensorInfo]) -> None:
    """Ask the system to read small tensors at once, which otherwise are waited for one after the other.

    Where that cannot be asked for, nothing happens.

    Args:
        infos: of the tensors, of any files.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    by_file: dict[Path, list[tuple[int, int]]] = {}
    for info in infos:
        if info.offset is not None:
            by_file.setdefault(info.file, []).append((info.offset, info.nbytes))
    for path, spans in by_file.items():
        with contextlib.suppress(OSError), path.open("rb") as file:  # who reads it says what is wrong with it
            for offset, size in spans:
                os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


def read_blocks(info: TensorInfo) -> Iterator[tuple[slice | None, Tensor]]:
    """Read a tensor by `row_blocks`.

    Args:
        info: of the tensor.

    Yields:
        Each block's rows, and the block.
    """
    whole = None if info.offset is None else info.read()  # maps the file once for all blocks
    for rows in row_blocks(info.shape):
        if whole is None:
            yield rows, info.read(rows)
        else:
            yield rows, whole if rows is None else whole[rows]


def same_values(first: TensorInfo, second: TensorInfo) -> bool:
    """Compare the values of two tensors, whatever their dtypes.

    Args:
        first: a tensor on disk.
        second: another one.

    Returns:
        True if shapes and values are equal.
    """
    return first.shape == second.shape and all(
        torch.equal(mine.float(), others.float())
        for (_, mine), (_, others) in zip(read_blocks(first), read_blocks(second), strict=True)
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as they lie in a safetensors file; no copy where it is contiguous and on the CPU.

    Args:
        tensor: of any shape, on any device.

    Returns:
        The bytes, which share the tensor's memory where there is no copy.
    """
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def row_blocks(
    shape: tuple[int, ...],
    block_elements: int = 2**20,  # 4 MiB of fp32, which stay in a processor's cache from one operation to the next
    minimum_rows: int = 256,
) -> list[slice | None]:
    """Divide a tensor's rows into blocks of about `block_elements`, and of `minimum_rows` at least.

    Matrix products of a few rows run in other kernels, and round otherwise, than the whole product would.

    Args:
        shape: of the tensor.
        block_elements: in a block, where it has more than `minimum_rows`.
        minimum_rows: of a block; a tensor with fewer is one block.

    Returns:
        The rows of each block; [None], which means all, for a scalar.
    """
    if not shape:
        return [None]
    rows = shape[0]
    row_elements = max(1, math.prod(shape[1:]))
    count = max(1, rows // max(minimum_rows, block_elements // row_elements))
    edges = [rows * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
