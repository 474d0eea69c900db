"""Read tensors of safetensors and GGUF files, whole, by rows, or by blocks of rows.

A merge of a 7B model should need the memory of a few rows, so nothing here holds a whole shard: a file is mapped, and
slices are taken of it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_trainer.common.errors import ModelError
from qlora_trainer.weights.tensors import TensorInfo


def read_tensor(
    info: TensorInfo,
    rows: slice | None = None,  # of the first dimension; step 1
) -> Tensor:
    """The tensor, or some of its rows, where it can be mapped from the file: read it, but do not write into it.

    Raises:
        ModelError: the file is damaged, or changed since it was listed.
    """
    if info.read is not None:
        return info.read(rows)
    tensor = read_tensors([info])[0]
    return tensor if rows is None else tensor[rows]


def read_tensors(infos: Sequence[TensorInfo]) -> list[Tensor]:
    """As `read_tensor`, whole tensors; a file of several is opened once, since all of its header is read for that."""
    found = {info.name: info.read(None) for info in infos if info.read is not None}
    for path in dict.fromkeys(info.file for info in infos if info.read is None):
        mine = [info for info in infos if info.file == path]
        try:
            with safe_open(path, framework="pt") as file:
                found |= {info.name: file.get_tensor(info.name) for info in mine}
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error
        if any((found[info.name].dtype, found[info.name].shape) != (info.dtype, info.shape) for info in mine):
            raise changed(path)
    return [found[info.name] for info in infos]


def unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(f"{path} cannot be read ({error}). Fetch the file again.")


def changed(path: Path) -> ModelError:
    return ModelError(f"{path} was changed while it was being read. Start again when nothing writes to it.")


def read_rows(
    info: TensorInfo,
    rows: Tensor,  # (N,) numbers, ascending
) -> Tensor:  # (N, ...)
    """Rows from anywhere in a tensor; of one that cannot be mapped, no others are decoded."""
    if info.read is None:
        return read_tensor(info)[rows]
    numbers = rows.tolist()
    starts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1] + 1]
    spans = [slice(numbers[i], numbers[j - 1] + 1) for i, j in itertools.pairwise([*starts, len(numbers)])]
    return torch.cat([info.read(span) for span in spans])


def read_blocks(info: TensorInfo) -> Iterator[tuple[slice | None, Tensor]]:
    """A tensor by `row_blocks`, each with its rows; a mapped file is opened once."""
    whole = None if info.read is not None else read_tensor(info)
    for rows in row_blocks(info.shape):
        if whole is None:
            yield rows, read_tensor(info, rows)
        else:
            yield rows, whole if rows is None else whole[rows]


def same_values(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors hold the same values, whatever their dtypes."""
    return first.shape == second.shape and all(
        torch.equal(mine.float(), others.float())
        for (_, mine), (_, others) in zip(read_blocks(first), read_blocks(second), strict=True)
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes as they lie in a safetensors file; no copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def row_blocks(
    shape: tuple[int, ...],
    block_elements: int = 2**20,  # 4 MiB of fp32, which stay in a processor's cache from one operation to the next
    minimum_rows: int = 256,
) -> list[slice | None]:
    """Rows to take at a time: near `block_elements`, never fewer than `minimum_rows`; [None], all, for a scalar.

    Matrix products of a few rows run in other kernels, and round otherwise, than the whole product would.
    """
    if not shape:
        return [None]
    rows = shape[0]
    row_elements = max(1, math.prod(shape[1:]))
    count = max(1, rows // max(minimum_rows, block_elements // row_elements))
    edges = [rows * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
