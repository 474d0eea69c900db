"""Writing a store of prepared examples: once, as a stream, in blocks that are made elsewhere.

It is written under a temporary name of its own and renamed when complete: processes that prepare the same set side by
side do not meet. E examples, N tokens of all examples end to end.
"""

import contextlib
import errno
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from qlora_trainer.common.atomic import sync_tree
from qlora_trainer.common.errors import DiskError, QLoRATrainerError
from qlora_trainer.data.preparation.store import ARRAYS, DUPLICATES, SKIPPED_NAME, existing_store
from qlora_trainer.data.types import IGNORED_LABEL, Example, Row, row_to_json

_ABANDONED_SECONDS = 7 * 86_400  # a preparation that has written nothing for so long was killed
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)

_WRITTEN = {name: dtype for name, dtype in ARRAYS.items() if name not in DUPLICATES}


@dataclass(frozen=True)
class Block:
    """Some examples on their way into a store: E examples, N tokens."""

    tokens: np.ndarray  # (N,) int32
    trained: np.ndarray  # (N,) bool
    lengths: np.ndarray  # (E,) int64, tokens of each
    trained_counts: np.ndarray  # (E,) int64
    digests: np.ndarray  # (E,) uint64
    prompts: np.ndarray  # (E,) uint64
    rows: np.ndarray  # (E,) int64, which row of the block's batch each came from
    text_lengths: np.ndarray  # (E,) int64, bytes of each in `texts`
    texts: bytes  # the rows as JSON lines


def make_block(examples: Sequence[tuple[int, str, Example, Row]]) -> Block:
    """Examples as arrays: each with the number of its row in the batch, its place, and what it shows."""
    ids = [np.asarray(example.input_ids, dtype=np.int32) for _, _, example, _ in examples]
    trained = [np.asarray(example.labels) != IGNORED_LABEL for _, _, example, _ in examples]
    texts = [
        json.dumps({"where": where, "row": row_to_json(row)}, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
        for _, where, _, row in examples
    ]
    return Block(
        tokens=np.concatenate([np.empty(0, dtype=np.int32), *ids]),
        trained=np.concatenate([np.empty(0, dtype=np.bool_), *trained]),
        lengths=np.array([len(i) for i in ids], dtype=np.int64),
        trained_counts=np.array([np.count_nonzero(flags[1:]) for flags in trained], dtype=np.int64),
        digests=np.array([_hash(i, flags) for i, flags in zip(ids, trained, strict=True)], dtype=np.uint64),
        prompts=np.array([_prompt_hash(i, flags) for i, flags in zip(ids, trained, strict=True)], dtype=np.uint64),
        rows=np.array([row for row, _, _, _ in examples], dtype=np.int64),
        text_lengths=np.array([len(text) for text in texts], dtype=np.int64),
        texts=b"".join(texts),
    )


def _hash(*parts: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(p.tobytes() for p in parts), digest_size=8).digest(), "little")


def _prompt_hash(ids: np.ndarray, trained: np.ndarray) -> int:
    """Of what is before the last answer; earlier answers of a conversation are part of it."""
    begins = np.flatnonzero(trained[1:] & ~trained[:-1])
    return _hash(ids[: begins[-1] + 1]) if len(begins) else 0


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
            "trained": block.trained,
            "bounds": token_ends,
            "trained_counts": block.trained_counts,
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
        for name, hashes in DUPLICATES.items():
            duplicates = _first_equal(np.load(self.directory / f"{hashes}.npy"))
            np.save(self.directory / f"{name}.npy", duplicates)
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
    """For each of (E,) hashes the index of the first that is equal; -1 for the hash 0, which represents none."""
    order = np.argsort(hashes, kind="stable")
    begins = np.flatnonzero(np.diff(hashes[order], prepend=hashes[order[:1]] + 1))
    duplicates = np.empty(len(hashes), dtype=np.int64)
    duplicates[order] = np.repeat(order[begins], np.diff(begins, append=len(hashes)))
    duplicates[hashes == 0] = -1
    return duplicates


@contextlib.contextmanager
def new_store(directory: Path) -> Iterator[StoreWriter]:
    """A writer whose files appear at `directory` when the block ends well.

    They take the place of a damaged store. A sound one that another process has put there meanwhile stays: its
    name is a hash of all that decides the content. What processes killed long ago have left next to it is removed.

    Raises:
        DiskError: the disk is full, or the directory cannot be written.
    """
    temporary = _aside(directory, "partial")
    _remove_abandoned(directory.parent)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _disk_error(directory, error) from error
    try:
        with StoreWriter(temporary) as writer:
            yield writer
        sync_tree(temporary)
        _take_place(temporary, directory)
    except OSError as error:
        if isinstance(error, QLoRATrainerError) or error.errno not in _DISK_ERRORS:
            raise
        raise _disk_error(directory, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _disk_error(directory: Path, error: OSError) -> DiskError:
    return DiskError(
        f"Prepared data cannot be written to {directory.parent}: {error.strerror or error}. Free some space, or set "
        "XDG_CACHE_HOME to another folder, which can be written."
    )


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


class _ArrayWriter:
    """A one-dimensional .npy file that grows. Its header has space for any length and is written again at the end."""

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
