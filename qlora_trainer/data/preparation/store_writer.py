"""Write a store of prepared examples: once, as a stream, in blocks that are made elsewhere.

It is written under a temporary name and renamed when complete. Left out: reading it (store.py), and what an example is
made of (rendering).
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as arrow

from qlora_trainer.common.atomic import disk_errors, new_directory, remove_leftovers_in
from qlora_trainer.common.errors import DiskError
from qlora_trainer.data.preparation.store import EXAMPLES_NAME, SCHEMA, SKIPPED_NAME, SUMMARY_NAME, existing_store
from qlora_trainer.data.types import IGNORED_LABEL, Example, Row, row_to_json

# Blocks are joined up to this size: the fewer there are, the sooner a file is opened. A bound on memory, too.
_JOINED_BYTES = 8 << 20


def make_block(examples: Sequence[tuple[int, str, Example, Row]]) -> arrow.RecordBatch:
    """Lay some examples out in the store's columns, their source not known yet.

    Args:
        examples: each with the number of its row in the chunk, its place, and the row that it shows.

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
    """Append examples to the files of a new store.

    Args:
        directory: gets the files.
        control: ids of control tokens; those that the examples hold are noted.
    """

    def __init__(self, directory: Path, control: Collection[int] = ()) -> None:
        self.directory = directory
        self._control = sorted(control)
        self._seen = np.zeros((2, max(control, default=-1) + 1), dtype=np.bool_)  # by id: used, and trained
        self._file = (directory / EXAMPLES_NAME).open("wb")
        self._examples = arrow.ipc.new_file(self._file, SCHEMA)
        self._blocks: list[arrow.RecordBatch] = []  # not written yet

    def append(self, block: arrow.RecordBatch, *, source: int, first_row: int) -> None:
        """Add a chunk's examples.

        Args:
            block: from `make_block`.
            source: index of the source that they came from.
            first_row: number of the chunk's first row among all rows read.
        """
        ids = block["input_ids"].flatten().to_numpy()
        flags = block["trained"].flatten().to_numpy(zero_copy_only=False)
        known = ids < self._seen.shape[1]
        self._seen[0, ids[known]] = True
        self._seen[1, ids[known & flags]] = True
        numbers = block["row_number"].to_numpy() + first_row
        sources = np.full(len(block), source, dtype=np.int32)
        columns = {**dict(zip(SCHEMA.names, block.columns, strict=True)), "row_number": numbers, "source": sources}
        self._blocks.append(arrow.record_batch(columns, schema=SCHEMA))
        if sum(block.nbytes for block in self._blocks) >= _JOINED_BYTES:
            self._write_blocks()

    def control_tokens(self) -> dict[str, list[int]]:
        """Return which control tokens the examples hold so far.

        Returns:
            Those that are "used" at all, and those that are "trained" somewhere.
        """
        used, trained = ([token for token in self._control if seen[token]] for seen in self._seen)
        return {"used": used, "trained": trained}

    def skip(self, rows: Sequence[tuple[str, str]]) -> None:
        """List rows that were skipped.

        Args:
            rows: (where, reason) of each.
        """
        if rows:
            with (self.directory / SKIPPED_NAME).open("a", encoding="utf-8") as file:
                for where, reason in rows:
                    file.write(json.dumps({"where": where, "reason": reason}) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, after the last example.

        Args:
            summary: JSON types.
        """
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
def new_store(directory: Path, control: Collection[int] = ()) -> Iterator[StoreWriter]:
    """Open a writer whose files appear at `directory` when the block ends well.

    They take the place of a damaged store. What killed processes have left of their work on any store is removed. An
    OutputExistsError says that another process was as quick: its store holds the same, as its name is a hash of all
    that decides the content.

    Args:
        directory: of the store.
        control: ids of control tokens, for the writer.

    Yields:
        The writer.

    Raises:
        DiskError: the disk is full, or the directory cannot be written.
    """
    try:
        _clear(directory)
        with new_directory(directory) as work, StoreWriter(work, control) as writer:
            yield writer
    except DiskError as error:
        raise DiskError(f"{error} Or set XDG_CACHE_HOME to another folder, for prepared data.") from error


def _clear(directory: Path) -> None:
    remove_leftovers_in(directory.parent)
    with disk_errors(directory.parent):
        if directory.is_dir() and existing_store(directory) is None:
            shutil.rmtree(directory)
