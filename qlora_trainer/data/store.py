"""Prepared examples on disk: written once as a stream, then memory-mapped, so a million rows need little memory.

A directory of flat .npy arrays and the rows themselves as JSON lines, written under a temporary name and renamed when
complete. E examples, N tokens of all examples end to end.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from qlora_trainer.data.messages import Row, row_from_json, row_to_json
from qlora_trainer.data.packing import IGNORED_LABEL, Example
from qlora_trainer.errors import DiskError, QLoRATrainerError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

_ARRAYS: dict[str, type] = {
    "tokens": np.int32,  # (N,)
    "learned": np.bool_,  # (N,)
    "bounds": np.int64,  # (E + 1,) where each example begins in tokens, and the last ends
    "learned_counts": np.int64,  # (E,) labels that carry loss
    "digests": np.uint64,  # (E,) of the token ids and labels, to find duplicates
    "units": np.int64,  # (E,) which row of the files it came from; a document gives several examples
    "for_heldout": np.bool_,  # (E,) from a held-out file
    "row_bounds": np.int64,  # (E + 1,) bytes in rows.jsonl
}


class ExampleStore:
    """Everything prepared, read-only. Raises ValueError or OSError where files are missing or do not fit together."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        self.summary: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        count = len(self.arrays["units"])
        bounds, row_bounds = self.arrays["bounds"], self.arrays["row_bounds"]
        fits = (
            len(bounds) == len(row_bounds) == count + 1
            and bounds[-1] == len(self.arrays["tokens"]) == len(self.arrays["learned"])
            and row_bounds[-1] == (directory / "rows.jsonl").stat().st_size
        )
        if not fits:
            raise ValueError(f"{directory} is incomplete")

    def example(self, index: int) -> Example:
        begin, end = self.arrays["bounds"][index : index + 2]
        tokens = np.asarray(self.arrays["tokens"][begin:end], dtype=np.int64)
        labels = np.where(self.arrays["learned"][begin:end], tokens, IGNORED_LABEL)
        return Example(tokens.tolist(), labels.tolist())

    def row(self, index: int) -> tuple[str, Row]:
        """Where the row came from, and the row."""
        begin, end = self.arrays["row_bounds"][index : index + 2]
        with (self.directory / "rows.jsonl").open("rb") as file:
            file.seek(int(begin))
            value = json.loads(file.read(int(end - begin)))
        return value["where"], row_from_json(value["row"])


class ExampleSet:
    """Some of the prepared examples: a list of Example, with the rows that they show."""

    def __init__(self, store: ExampleStore, indices: np.ndarray) -> None:
        self._store = store
        self._indices = indices  # (examples of this set,) int64

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._store.example(int(self._indices[index]))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (len,) int64."""
        return np.diff(self._store.arrays["bounds"])[self._indices]

    @property
    def learned_counts(self) -> np.ndarray:
        """Labels that carry loss, of each example, (len,) int64."""
        return self._store.arrays["learned_counts"][self._indices]

    @property
    def digests(self) -> np.ndarray:
        """A hash of each example's tokens and labels, (len,) uint64."""
        return self._store.arrays["digests"][self._indices]

    def row(self, index: int) -> Row:
        """The row as it was read; of a long document, the part that this example holds."""
        return self._store.row(int(self._indices[index]))[1]

    def where(self, index: int) -> str:
        """File and line that an example came from."""
        return self._store.row(int(self._indices[index]))[0]


class StoreWriter:
    """Appends examples to the files of a new store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._arrays = {name: _ArrayWriter(directory / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()}
        self._rows: IO[bytes] = (directory / "rows.jsonl").open("wb")
        self._tokens = 0
        self._arrays["bounds"].append([0])
        self._arrays["row_bounds"].append([0])

    def append(self, example: Example, row: Row, *, where: str, unit: int, for_heldout: bool) -> None:
        self._tokens += len(example.input_ids)
        self._rows.write(json.dumps({"where": where, "row": row_to_json(row)}, ensure_ascii=False).encode() + b"\n")
        ids = np.asarray(example.input_ids, dtype=np.int32)
        learned = np.asarray(example.labels) != IGNORED_LABEL
        digest = hashlib.blake2b(ids.tobytes() + learned.tobytes(), digest_size=8).digest()
        values: dict[str, Any] = {
            "tokens": ids,
            "learned": learned,
            "bounds": [self._tokens],
            "learned_counts": [example.learned_tokens],
            "digests": [int.from_bytes(digest, "little")],
            "units": [unit],
            "for_heldout": [for_heldout],
            "row_bounds": [self._rows.tell()],
        }
        for name, value in values.items():
            self._arrays[name].append(value)

    def finish(self, summary: dict[str, Any]) -> None:
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.close()
        for array in self._arrays.values():
            array.close()


@contextmanager
def new_store(directory: Path) -> Iterator[StoreWriter]:
    """A writer whose files appear at `directory` when the block ends well, replacing what was there.

    Raises:
        DiskError: the disk is full, or the directory cannot be written.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with StoreWriter(temporary) as writer:
            yield writer
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except OSError as error:
        if isinstance(error, QLoRATrainerError) or error.errno not in _DISK_ERRORS:
            raise
        raise DiskError(
            f"Prepared data cannot be written to {directory.parent}: {error.strerror or error}. Free some space, or "
            "choose another cache directory."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _ArrayWriter:
    """A one-dimensional .npy file that grows. Its header has room for any length and is written again at the end."""

    def __init__(self, path: Path, dtype: type) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, values: Any) -> None:
        array = np.asarray(values, dtype=self.dtype)
        self._file.write(array.tobytes())
        self.length += len(array)

    def close(self) -> None:
        end_of_header = self._file.seek(0) or self._write_header()
        assert end_of_header == self._data_start, "a .npy header keeps its size as the array grows"
        self._file.close()

    def _write_header(self) -> int:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
        end = self._file.tell()
        if self.length == 0:
            self._data_start = end
        return end
