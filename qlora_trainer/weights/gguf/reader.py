"""Read the tensors of a GGUF file in the model's own names and layout, dequantized when they are read.

A model in GGUF takes 4 or 5 GB; a copy in 16 bits would take three times that on disk, and is never made. The import
(importer.py) goes through the file once and writes a record: where each tensor is, its name in the checkpoint, and the
dtype its values have there. Reading follows the record. Most tensors are stored in the checkpoint's layout, as the
import found by comparing, and are read by rows. For those whose rows llama.cpp permutes the record has the order of
rows, and each is read whole. transformers converts any others again.

Left out: which tensors there are and their names, which layout.py takes from transformers.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qlora_trainer.common.boundary import as_model_error
from qlora_trainer.common.errors import FileMissingError, ModelError
from qlora_trainer.common.file_identity import FileIdentity
from qlora_trainer.common.units import dtype_name
from qlora_trainer.weights.gguf.layout import Translation, translations_of

IMPORT_RECORD = "import.json"
SAMPLE_ELEMENTS = 2**25
CHUNK_ELEMENTS = 2**20  # dequantized at a time by each thread; gguf's functions make several copies


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Describe a tensor as it is stored in a GGUF file."""

    name: str  # llama.cpp's
    type: str  # gguf's, such as Q4_K
    shape: tuple[int, ...]  # slowest dimension first, as in torch
    offset: int  # of its first byte in the file

    def values(self, file: Path, rows: slice | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantize the tensor, or some of its rows, to fp32 and cast once.

        In addition to the result it takes the memory of a few chunks.

        Args:
            file: the .gguf file.
            rows: of the first dimension, step 1; by default all.
            dtype: of the result.

        Returns:
            The values, in the file's layout.

        Raises:
            ModelError: they cannot be read or dequantized.
        """
        if len(self.shape) < 2:  # gguf's functions take rows; a vector is one
            (vector,) = dataclasses.replace(self, shape=(1, *self.shape)).values(file, dtype=dtype)
            return vector if rows is None else vector[rows]
        start, stop, _ = (rows or slice(None)).indices(self.shape[0])
        out = torch.empty(stop - start, *self.shape[1:], dtype=dtype)
        step = max(1, CHUNK_ELEMENTS // max(1, math.prod(self.shape[1:])))
        chunks = [slice(begin, min(begin + step, stop)) for begin in range(start, stop, step)]
        fill = functools.partial(self._fill, file, out, start)
        with as_model_error(
            lambda error: f"Tensor {self.name} of {file} is stored as {self.type}, and cannot be unpacked here: {error}"
        ):
            if len(chunks) == 1:
                fill(chunks[0])
            else:
                with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                    list(pool.map(fill, chunks))
        return out

    def _fill(self, file: Path, out: Tensor, start: int, rows: slice) -> None:
        """Dequantize some rows into `out`, whose first row is row `start` of the tensor."""
        from gguf import GGMLQuantizationType, quant_shape_to_byte_shape
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.type]
        data = np.memmap(file, np.uint8, "r", self.offset, quant_shape_to_byte_shape(self.shape, kind))
        part = out[rows.start - start : rows.stop - start]
        # As one row: gguf dequantizes sixteen rows at a time, which is slow where they are narrow.
        values = dequantize(data[rows].reshape(1, -1), kind).reshape(part.shape)
        part.copy_(torch.from_numpy(values if values.flags.writeable else values.copy()))


Rows = Literal["as stored", "otherwise"] | str
"""Order of a tensor's rows: "as stored", the checkpoint's; numbers with commas between them, the file's row for each of
the checkpoint's; or "otherwise", so that transformers must convert the tensor."""


@dataclasses.dataclass(frozen=True)
class ImportedTensor:
    """Describe a tensor of the checkpoint, and where its values come from."""

    stored: StoredTensor
    dtype: torch.dtype  # of its values in the checkpoint
    shape: tuple[int, ...]  # in the checkpoint
    rows: Rows

    def to_json(self) -> dict[str, Any]:
        """Write the tensor as an entry of the import's record.

        Returns:
            The fields, as JSON takes them.
        """
        dtype = dtype_name(self.dtype)
        return dataclasses.asdict(self.stored) | {"dtype": dtype, "rows": self.rows, "becomes": self.shape}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ImportedTensor":
        """Read a tensor from an entry of the import's record.

        Args:
            fields: as `to_json` writes them.

        Returns:
            The tensor.
        """
        stored = StoredTensor(fields["name"], fields["type"], tuple(fields["shape"]), fields["offset"])
        return cls(stored, getattr(torch, fields["dtype"]), tuple(fields["becomes"]), fields["rows"])


class GGUFWeights:
    """Read the checkpoint that an imported GGUF file represents, a tensor at a time, by the checkpoint's names.

    FileMissingError is raised if the GGUF file is gone.

    Args:
        directory: the import.
        model_config: makes transformers' config of the directory; called where transformers must convert a tensor.

    Raises:
        ModelError: the record cannot be read, or the file was changed since the import.
    """

    def __init__(self, directory: Path, model_config: Callable[[], Any]) -> None:
        try:
            record = json.loads((directory / IMPORT_RECORD).read_text(encoding="utf-8"))
            self.identity = FileIdentity(**record["file"])
            self.path = Path(self.identity.path)
            self.tensors = {name: ImportedTensor.from_json(fields) for name, fields in record["tensors"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{directory / IMPORT_RECORD} cannot be read ({type(error).__name__}: {error}). Delete {directory}; it "
                "is made again from the GGUF file."
            ) from error
        self.directory, self.model_config = directory, model_config
        self._check_file()
        self._converted: tuple[str, Tensor] | None = None  # the last tensor that was converted whole

    def _check_file(self) -> None:
        """Raise FileMissingError if the file is gone, or ModelError if it has changed."""
        if not self.path.is_file():
            raise FileMissingError(
                f"{self.path}, from which this base is read, is gone. Put it back, or name it as model.name from where "
                "it is now: it is known by its content."
            )
        if not self.identity.is_current():
            raise ModelError(
                f"{self.path} was changed since it was imported. Start again with it as model.name; a run that was "
                "trained on it needs the file as it was."
            )

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a tensor in the checkpoint's layout and dtype, or some of its rows; ModelError if it cannot be read.

        Args:
            name: the checkpoint's.
            rows: of the first dimension, step 1; by default all.

        Returns:
            The values, on the CPU.
        """
        tensor = self.tensors[name]
        if tensor.rows == "as stored":
            return tensor.stored.values(self.path, rows, tensor.dtype)
        converted = self._converted  # read once: another thread may replace it by another tensor
        if converted is None or converted[0] != name:
            self._converted = None  # free the old one before the new one is made
            converted = self._converted = (name, self._convert(tensor))
        return converted[1] if rows is None else converted[1][rows]

    def _convert(self, tensor: ImportedTensor) -> Tensor:
        """Read a whole tensor whose rows are not stored in the checkpoint's order."""
        if tensor.rows == "otherwise":
            values = tensor.stored.values(self.path)
            return self._translations[tensor.stored.name].convert(values.numpy()).to(tensor.dtype)
        return tensor.stored.values(self.path, dtype=tensor.dtype)[_permutation(tensor.rows)]

    @functools.cached_property
    def _translations(self) -> dict[str, Translation]:
        architecture = json.loads((self.directory / IMPORT_RECORD).read_text(encoding="utf-8"))["architecture"]
        names = [tensor.stored.name for tensor in self.tensors.values()]
        return translations_of(self.model_config(), self.directory, architecture, names)


def open_weights(
    directory: Path,
    model_config: Callable[[], Any],
) -> GGUFWeights | None:
    """Open the weights of a directory that represents a GGUF file.

    FileMissingError is raised if the file is gone, ModelError if it has changed or the record cannot be read.

    Args:
        directory: any model directory.
        model_config: as in GGUFWeights.

    Returns:
        The weights; None for a directory that is not an import.
    """
    return GGUFWeights(directory, model_config) if (directory / IMPORT_RECORD).is_file() else None


@dataclasses.dataclass(frozen=True)
class Examined:
    """Hold what was found by looking at every value of a tensor."""

    shape: tuple[int, ...]  # in the checkpoint
    rows: Rows
    lowest: float
    highest: float


def examine_values(tensor: StoredTensor, file: Path, convert: Callable[[np.ndarray], Tensor]) -> Examined:
    """Read every value of a tensor, and compare its layout with the checkpoint's, which `convert` makes.

    Embeddings and LM heads can be too large to convert whole, so only their first rows are converted: llama.cpp
    permutes the rows of attention heads, not those of tokens.

    Args:
        tensor: where it is in the file.
        file: the .gguf file.
        convert: dequantized float32 values -> float32, in the checkpoint's layout.

    Returns:
        Shape and order of rows in the checkpoint, and the least and greatest value, NaN if one is.
    """
    by_tokens = tensor.name in ("token_embd.weight", "output.weight")
    step = max(1, SAMPLE_ELEMENTS // tensor.shape[-1]) if by_tokens else tensor.shape[0]
    shape, rows = tensor.shape, "as stored"
    lowest, highest = math.inf, -math.inf
    for start in range(0, tensor.shape[0], step):
        values = tensor.values(file, slice(start, start + step))
        low, high = (float(bound) for bound in values.aminmax())
        lowest, highest = float(np.minimum(lowest, low)), float(np.maximum(highest, high))  # NaN stays NaN
        if start == 0 and math.isfinite(low) and math.isfinite(high):  # NaN is not equal to itself
            converted = convert(values.numpy())
            rows = _rows(values, converted, convert)
            if rows != "as stored" and len(values) < tensor.shape[0]:
                values = tensor.values(file)
                converted = convert(values.numpy())
                rows = _rows(values, converted, convert)
            shape = tensor.shape if rows == "as stored" else tuple(converted.shape)
    return Examined(shape, rows, lowest, highest)


def _rows(values: Tensor, converted: Tensor, convert: Callable[[np.ndarray], Tensor]) -> Rows:
    """Compare values with their conversion: the same, in another order of rows, or otherwise."""
    if converted.shape != values.shape:
        return "otherwise"
    untouched = converted.data_ptr() == values.data_ptr() and converted.stride() == values.stride()
    if untouched or torch.equal(converted, values):
        return "as stored"
    if values.dim() == 2:
        order = convert(
            np.arange(len(values), dtype=np.float32)[:, None]
        )  # the rows' numbers, in the order of the result
        if not order.isfinite().all():
            return "otherwise"
        written = ",".join(str(int(row)) for row in order.flatten())
        if torch.equal(order.flatten().sort().values, torch.arange(len(values)).float()):
            return written if torch.equal(values[_permutation(written)], converted) else "otherwise"
    return "otherwise"


@functools.lru_cache(maxsize=8)
def _permutation(written: str) -> Tensor:
    """Parse an order of rows as `Rows` has it."""
    return torch.tensor([int(row) for row in written.split(",")])
