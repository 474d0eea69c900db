"""Describe tensors that lie in files: name, dtype, shape, and where the bytes are; list those of one safetensors file.

Left out: a whole directory (listing.py), and values (reading.py).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_trainer.common.errors import ModelError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before it has values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor on disk; in another file than one of safetensors, `read` gives its rows."""

    file: Path
    offset: int | None = None  # of its first byte in a file of safetensors
    read: Callable[[slice | None], Tensor] | None = dataclasses.field(default=None, compare=False)


def tensors_of_file(path: Path) -> list[TensorInfo]:
    """List the tensors of a safetensors file in the order they lie there.

    Args:
        path: the file.

    Returns:
        One TensorInfo for each tensor, with the offset of its first byte.

    Raises:
        ModelError: the file is damaged, or holds a dtype that is not known here.
    """
    tensors = []
    try:
        with safe_open(path, framework="pt") as file, path.open("rb") as header:
            end = 8 + int.from_bytes(header.read(8), "little")  # of the header; the tensors follow without a gap
            for name in file.offset_keys():
                tensor = file.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in _DTYPES:
                    raise ModelError(f"{path}: tensor {name} has dtype {dtype}, which this trainer does not know.")
                tensors.append(TensorInfo(name, _DTYPES[dtype], shape, path, end))
                end += tensors[-1].nbytes
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or cut short ({error}). Fetch the file again.") from error
    return tensors
