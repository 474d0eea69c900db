"""Describe tensors that lie in files: name, dtype, shape, and where the bytes are; open a safetensors file.

Left out: a whole directory (listing.py), and reading by blocks (reading.py).
"""

import dataclasses
import math
import mmap
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from qlora_trainer.common.boundary import as_model_error, refuse_pointer_text
from qlora_trainer.common.errors import LFS_HEADER, ModelError
from qlora_trainer.common.file_identity import FileIdentity

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
    """Describe a tensor that has no values yet."""

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


class TensorSource(Protocol):
    """Represent an opened file that tensors are read from."""

    path: Path
    identity: FileIdentity  # as it was when it was opened

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a tensor, or some of its rows.

        Args:
            name: the checkpoint's.
            rows: of the first dimension, step 1; None for all.

        Returns:
            The tensor on the CPU.
        """


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """Describe a tensor on disk."""

    source: TensorSource = dataclasses.field(compare=False)
    offset: int | None  # of its first byte in the file; None where the file holds it in another form

    @property
    def file(self) -> Path:
        """Return the path of the file that holds it."""
        return self.source.path

    def read(
        self,
        rows: slice | None = None,  # of the first dimension; step 1
    ) -> Tensor:
        """Read the tensor, or some of its rows; do not write into it: where it can be, it is mapped from the file.

        What cannot be read raises ModelError.

        Args:
            rows: None for all.

        Returns:
            The tensor on the CPU, in its own dtype.
        """
        return self.source.read(self.name, rows)


class TensorFile:
    """List a safetensors file once, and map what is read of it, which stays in the file until it is used.

    Args:
        path: the file.

    Raises:
        ModelError: the file is damaged, or holds a dtype that is not known here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with as_model_error(lambda error: f"{path} is damaged or cut short ({error}). Fetch the file again."):
            refuse_pointer(path)
            self.identity = FileIdentity.of(path.resolve())
            self.tensors = {info.name: info for info in self._list()}  # in the order they lie there
        self._mapped: Callable[[], np.ndarray | None] = lambda: None  # the file's bytes, while a tensor holds them

    def _list(self) -> Iterator[TensorInfo]:
        with safe_open(self.path, framework="pt") as file, self.path.open("rb") as header:
            end = 8 + int.from_bytes(header.read(8), "little")  # of the header; the tensors follow without a gap
            for name in file.offset_keys():
                tensor = file.get_slice(name)
                dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
                if dtype not in _DTYPES:
                    raise ModelError(f"{self.path}: tensor {name} has dtype {dtype}, which this trainer does not know.")
                info = TensorInfo(name, _DTYPES[dtype], shape, self, end)
                end += info.nbytes
                yield info

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Map a tensor, or some of its rows.

        The pages are private: what is written into them never reaches the file. A file that cannot be read, or is not
        the one that was listed, raises ModelError.

        Args:
            name: of the tensor.
            rows: of the first dimension, step 1; None for all.

        Returns:
            The tensor on the CPU.
        """
        info = self.tensors[name]
        assert info.offset is not None
        content = self._map()[info.offset : info.offset + info.nbytes]
        if info.offset % info.dtype.itemsize:
            content = content.clone()  # of a writer that leaves tensors at odd bytes
        tensor = content.view(info.dtype).view(info.shape)
        return tensor if rows is None else tensor[rows]

    def _map(self) -> Tensor:  # (bytes of the file,) uint8
        """Map the file; tensors that are held together share one mapping, which goes with the last of them."""
        array = self._mapped()
        if array is None:
            try:
                with self.path.open("rb") as file:
                    block = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise ModelError(f"{self.path} cannot be read ({error}). Fetch the file again.") from error
            self.refuse_changed()
            array = np.frombuffer(block, np.uint8)
            self._mapped = weakref.ref(array)
        return torch.from_numpy(array)

    def refuse_changed(self) -> None:
        """Refuse a file that is not the one that was listed.

        Raises:
            ModelError: it is another one.
        """
        if not self.identity.is_current():
            raise changed(self.path)


def refuse_pointer(path: Path) -> None:
    """Refuse the few lines that git leaves in place of a file that is kept by git-lfs.

    Args:
        path: of a file that can be read.

    Raises:
        ModelError: it is a git-lfs pointer.
    """
    with path.open("rb") as file:
        refuse_pointer_text(path, file.read(len(LFS_HEADER)))


def changed(path: Path) -> ModelError:
    """Make the error for a file that is not the one that was listed.

    Args:
        path: the file.

    Returns:
        The error, to be raised.
    """
    return ModelError(f"{path} was changed while it was being read. Start again when nothing writes to it.")
