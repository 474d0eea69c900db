"""Write a store of prepared examples: once, as a stream, in blocks that are made elsewhere.

It is written under a temporary name of its own and renamed when complete: processes that prepare the same set at the
same time do not meet. Left out: reading it (store.py), and what an example is made of.
"""

import contextlib
import errno
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as arrow

from qlora_trainer.common.atomic import sync_tree
from qlora_trainer.common.errors import DiskError, QLoRATrainerError
from qlora_trainer.data.preparation.store import EXAMPLES_NAME, SCHEMA, SKIPPED_NAME, SUMMARY_NAME, existing_store
from qlora_trainer.data.types import IGNORED_LABEL, Example, Row, row_to_json

_ABANDONED_SECONDS = 7 * 86_400  # a preparation that has written nothing for so long was killed
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)

# Blocks are joined up to this size: the fewer there are, the sooner a file is opened. A bound on memory, too.
_JOINED_BYTES = 8 << 20


def make_block(examples: Sequence[tuple[int, str, Example, Row]]) -> arrow.RecordBatch:
    """Lay some examples out in the store's columns, their source not known yet.

    Args:
        examples: Each with the number of its row in the chunk, its place, and the row that it shows.

    Returns:
        One row for each, `row_number` counting within the chunk.
    """
    ids = [np.asarray(example.input_ids, dtype=np.int32) for _, _, example, _ in examples]
    trained = [np.asarray(example.labels) != IGNORED_LABEL for _, _, example, _ in examples]
    bounds = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    texts = [
        json.dumps({"where": where, "row": row_to_json(row)}, ensure_ascii=False).encode(errors="surrogatepass")
        for _, where, _, row in examples
    ]
    columns = {
        "input_ids": arrow.LargeListArray.from_arrays(bounds, np.concatenate([np.empty(0, dtype=np.int32), *ids])),
        "trained": arrow.LargeListArray.from_arrays(bounds, np.concatenate([np.empty(0, dtype=np.bool_), *trained])),
        "trained_count": [np.count_nonzero(flags[1:]) for flags in trained],
        "digest": [_hash(i, flags) for i, flags in zip(ids, trained, strict=True)],
        "prompt_digest": [_prompt_hash(i, flags) for i, flags in zip(ids, trained, strict=True)],
        "row_number": [number for number, _, _, _ in examples],
        "source": np.zeros(len(examples), dtype=np.int32),
        "row": texts,
    }
    return arrow.record_batch(columns, schema=SCHEMA)


def _hash(*parts: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(p.tobytes() for p in parts), digest_size=8).digest(), "little")


def _prompt_hash(ids: np.ndarray, trained: np.ndarray) -> int:
    """Hash what is before the last answer; earlier answers of a conversation are part of it."""
    begins = np.flatnonzero(trained[1:] & ~trained[:-1])
    return _hash(ids[: begins[-1] + 1]) if len(begins) else 0


class StoreWriter:
    """Appends examples to the files of a new store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file = (directory / EXAMPLES_NAME).open("wb")
        self._examples = arrow.ipc.new_file(self._file, SCHEMA)
        self._blocks: list[arrow.RecordBatch] = []  # not written yet

    def append(self, block: arrow.RecordBatch, *, source: int, first_row: int) -> None:
        """Add a chunk's examples.

        Args:
            block: From `make_block`.
            source: Index of the source that they came from.
            first_row: Number of the chunk's first row among all rows read.
        """
        numbers = block["row_number"].to_numpy() + first_row
        sources = np.full(len(block), source, dtype=np.int32)
        columns = {**dict(zip(SCHEMA.names, block.columns, strict=True)), "row_number": numbers, "source": sources}
        self._blocks.append(arrow.record_batch(columns, schema=SCHEMA))
        if sum(block.nbytes for block in self._blocks) >= _JOINED_BYTES:
            self._write_blocks()

    def skip(self, rows: Sequence[tuple[str, str]]) -> None:
        """List rows that were skipped, each (where, reason)."""
        if rows:
            with (self.directory / SKIPPED_NAME).open("a", encoding="utf-8") as file:
                for where, reason in rows:
                    file.write(json.dumps({"where": where, "reason": reason}) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write what there is to say of the whole, after the last example."""
        self._write_blocks()
        self._examples.close()
        (self.directory / SUMMARY_NAME).write_text(json.dumps(summary, indent=1), encoding="utf-8")

    def _write_blocks(self) -> None:
        if self._blocks:
            self._examples.write_batch(arrow.concat_batches(self._blocks))
            self._blocks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


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
