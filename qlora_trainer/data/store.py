"""Prepared examples on disk: written once as a stream, then memory-mapped, so a million rows need little memory.

A directory of flat .npy arrays, the rows themselves as JSON lines, and the rows that were skipped, written under a
temporary name of its own and renamed when complete: processes that prepare the same set side by side do not meet.
E examples, N tokens of all examples end to end.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from qlora_trainer.data.examples import IGNORED_LABEL, Example
from qlora_trainer.data.messages import Row, row_from_json, row_to_json
from qlora_trainer.errors import DiskError, QLoRATrainerError

SKIPPED_NAME = "skipped_rows.jsonl"
_ABANDONED_SECONDS = 7 * 86_400  # a preparation that has written nothing for so long was killed
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR)

_ARRAYS: dict[str, type] = {
    "tokens": np.int32,  # (N,)
    "learned": np.bool_,  # (N,)
    "bounds": np.int64,  # (E + 1,) where each example begins in tokens, and the last ends
    "learned_counts": np.int64,  # (E,) labels that carry loss
    "digests": np.uint64,  # (E,) of the token ids and labels, to find duplicates
    "prompts": np.uint64,  # (E,) of the token ids before the last learned stretch; 0 where there are none
    "units": np.int64,  # (E,) which row of the files it came from; a document gives several examples
    "sources": np.int32,  # (E,) which source it came from
    "row_bounds": np.int64,  # (E + 1,) bytes in rows.jsonl
    "twins": np.int64,  # (E,) the first example with the same tokens and labels, maybe itself
    "prompt_twins": np.int64,  # (E,) the first one with the same prompt; -1 where there is none
}
# Found when all is written, so that a later start need not sort a million hashes again.
_TWINS = {"twins": "digests", "prompt_twins": "prompts"}
_WRITTEN = {name: dtype for name, dtype in _ARRAYS.items() if name not in _TWINS}


@dataclass(frozen=True)
class Block:
    """Some examples on their way into a store: E examples, N tokens."""

    tokens: np.ndarray  # (N,) int32
    learned: np.ndarray  # (N,) bool
    lengths: np.ndarray  # (E,) int64, tokens of each
    learned_counts: np.ndarray  # (E,) int64
    digests: np.ndarray  # (E,) uint64
    prompts: np.ndarray  # (E,) uint64
    rows: np.ndarray  # (E,) int64, which row of the block's batch each came from
    text_lengths: np.ndarray  # (E,) int64, bytes of each in `texts`
    texts: bytes  # the rows as JSON lines


def make_block(examples: Sequence[tuple[int, str, Example, Row]]) -> Block:
    """Examples as arrays: each with the number of its row in the batch, its place, and what it shows."""
    ids = [np.asarray(example.input_ids, dtype=np.int32) for _, _, example, _ in examples]
    learned = [np.asarray(example.labels) != IGNORED_LABEL for _, _, example, _ in examples]
    texts = [
        json.dumps({"where": where, "row": row_to_json(row)}, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        for _, where, _, row in examples
    ]
    return Block(
        tokens=np.concatenate([np.empty(0, dtype=np.int32), *ids]),
        learned=np.concatenate([np.empty(0, dtype=np.bool_), *learned]),
        lengths=np.array([len(i) for i in ids], dtype=np.int64),
        learned_counts=np.array([np.count_nonzero(flags[1:]) for flags in learned], dtype=np.int64),
        digests=np.array([_hash(i, flags) for i, flags in zip(ids, learned, strict=True)], dtype=np.uint64),
        prompts=np.array([_prompt_hash(i, flags) for i, flags in zip(ids, learned, strict=True)], dtype=np.uint64),
        rows=np.array([row for row, _, _, _ in examples], dtype=np.int64),
        text_lengths=np.array([len(text) for text in texts], dtype=np.int64),
        texts=b"".join(texts),
    )


def _hash(*parts: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(p.tobytes() for p in parts), digest_size=8).digest(), "little")


def _prompt_hash(ids: np.ndarray, learned: np.ndarray) -> int:
    """Of what stands before the last answer; earlier answers of a conversation are part of it."""
    begins = np.flatnonzero(learned[1:] & ~learned[:-1])
    return _hash(ids[: begins[-1] + 1]) if len(begins) else 0


class ExampleStore:
    """Everything prepared, read-only. Raises ValueError or OSError where files are missing or do not fit together."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        self.summary: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        if not self._fits():
            raise ValueError(f"{directory} is incomplete or damaged")

    def _fits(self) -> bool:
        """What can be seen without reading all tokens: kinds, lengths, and bounds that rise from 0 to the end."""
        if any(array.dtype != _ARRAYS[name] or array.ndim != 1 for name, array in self.arrays.items()):
            return False
        count = len(self.arrays["units"])
        ends = {"bounds": len(self.arrays["tokens"]), "row_bounds": (self.directory / "rows.jsonl").stat().st_size}
        for name, end in ends.items():
            bounds = self.arrays[name]
            if len(bounds) != count + 1 or bounds[0] != 0 or bounds[-1] != end or np.any(bounds[1:] <= bounds[:-1]):
                return False
        each = ("learned_counts", "digests", "prompts", "sources", *_TWINS)
        listed = sum(sum(source["skipped"].values()) for source in self.summary.get("sources", []))
        return (
            len(self.arrays["learned"]) == len(self.arrays["tokens"])
            and all(len(self.arrays[name]) == count for name in each)
            and all(np.all(self.arrays[name] < count) for name in _TWINS)
            and (not listed or self.skipped_rows.is_file())
        )

    @property
    def skipped_rows(self) -> Path:
        """The list of skipped rows, one JSON object a line with where and reason; no file where there are none."""
        return self.directory / SKIPPED_NAME

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

    @property
    def twins(self) -> np.ndarray:
        """Equal for examples of one store with the same tokens and labels, (len,) int64."""
        return self._store.arrays["twins"][self._indices]

    @property
    def prompt_twins(self) -> np.ndarray:
        """Equal for examples of one store that have the same prompt, (len,) int64; -1 where there is none."""
        return self._store.arrays["prompt_twins"][self._indices]

    @property
    def sources(self) -> np.ndarray:
        """The index of the source of each example, (len,) int32."""
        return self._store.arrays["sources"][self._indices]

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
        self._arrays = {name: _ArrayWriter(directory / f"{name}.npy", dtype) for name, dtype in _WRITTEN.items()}
        self._rows: IO[bytes] = (directory / "rows.jsonl").open("wb")
        self._tokens = 0
        self._arrays["bounds"].append([0])
        self._arrays["row_bounds"].append([0])

    def append(self, block: Block, *, source: int, first_unit: int) -> None:
        """Add a batch's examples; its row 0 is row `first_unit` of all rows read."""
        token_ends = self._tokens + np.cumsum(block.lengths)
        values: dict[str, np.ndarray] = {
            "tokens": block.tokens,
            "learned": block.learned,
            "bounds": token_ends,
            "learned_counts": block.learned_counts,
            "digests": block.digests,
            "prompts": block.prompts,
            "units": first_unit + block.rows,
            "sources": np.full(len(block.rows), source),
            "row_bounds": self._rows.tell() + np.cumsum(block.text_lengths),
        }
        self._rows.write(block.texts)
        self._tokens += len(block.tokens)
        for name, value in values.items():
            self._arrays[name].append(value)

    def skip(self, rows: Sequence[tuple[str, str]]) -> None:
        """List rows that were skipped, each (where, reason)."""
        if rows:
            with (self.directory / SKIPPED_NAME).open("a", encoding="utf-8") as file:
                for where, reason in rows:
                    file.write(json.dumps({"where": where, "reason": reason}) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Say what there is to say of the whole, after the last example."""
        self._close()
        for name, hashes in _TWINS.items():
            twins = _first_equal(np.load(self.directory / f"{hashes}.npy"))
            np.save(self.directory / f"{name}.npy", twins)
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")

    def _close(self) -> None:
        self._rows.close()
        for array in self._arrays.values():
            array.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


def _first_equal(hashes: np.ndarray) -> np.ndarray:
    """For each of (E,) hashes the index of the first that is equal; -1 for the hash 0, which stands for none."""
    order = np.argsort(hashes, kind="stable")
    begins = np.flatnonzero(np.diff(hashes[order], prepend=hashes[order[:1]] + 1))
    twins = np.empty(len(hashes), dtype=np.int64)
    twins[order] = np.repeat(order[begins], np.diff(begins, append=len(hashes)))
    twins[hashes == 0] = -1
    return twins


@contextlib.contextmanager
def new_store(directory: Path) -> Iterator[StoreWriter]:
    """A writer whose files appear at `directory` when the block ends well.

    They take the place of a damaged store. A sound one that another process has put there meanwhile stays: its
    name is a hash of all that decides the content. What processes killed long ago have left beside it is removed.

    Raises:
        DiskError: the disk is full, or the directory cannot be written.
    """
    temporary = _aside(directory, "partial")
    _remove_abandoned(directory.parent)
    try:
        temporary.mkdir(parents=True)
        with StoreWriter(temporary) as writer:
            yield writer
        _sync(temporary)
        _take_place(temporary, directory)
    except OSError as error:
        if isinstance(error, QLoRATrainerError) or error.errno not in _DISK_ERRORS:
            raise
        raise DiskError(
            f"Prepared data cannot be written to {directory.parent}: {error.strerror or error}. Free some space, or "
            "choose another cache directory."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def existing_store(directory: Path) -> ExampleStore | None:
    """The store prepared before, or None where there is none or it is damaged: then it is to be made anew."""
    try:
        return ExampleStore(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _take_place(fresh: Path, directory: Path) -> None:
    while True:
        try:
            fresh.rename(directory)
            return
        except OSError:
            if not directory.exists():
                raise
        if existing_store(directory):
            return
        damaged = _aside(directory, "damaged")
        try:
            directory.rename(damaged)
        except FileNotFoundError:
            continue  # another process was as quick
        shutil.rmtree(damaged, ignore_errors=True)


def _aside(directory: Path, kind: str) -> Path:
    return directory.with_name(f".{directory.name}.{kind}-{secrets.token_hex(4)}")


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed preparations have left, which may be many gigabytes and is seen by nobody."""
    for kind in ("partial", "damaged"):
        for left in directory.glob(f".*.{kind}-*"):
            with contextlib.suppress(OSError):  # another process was as quick
                newest = max(path.stat().st_mtime for path in (left, *left.iterdir()))
                if newest < time.time() - _ABANDONED_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Flush what was written: after a power cut a file could else have its length and not its content."""
    for path in directory.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())


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
        if self._file.closed:
            return
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
