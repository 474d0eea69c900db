"""Prepared examples on disk, memory-mapped, so a million rows need little memory: what is there, and reading it.

A directory of flat .npy arrays, the rows themselves as JSON lines, and the rows that were skipped. Left out: writing
one (store_writer.py). E examples, N tokens of all examples end to end.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from qlora_trainer.data.types import IGNORED_LABEL, Example, Row, row_from_json

SKIPPED_NAME = "skipped_rows.jsonl"

ARRAYS: dict[str, type] = {
    "tokens": np.int32,  # (N,)
    "trained": np.bool_,  # (N,)
    "bounds": np.int64,  # (E + 1,) where each example begins in tokens, and the last ends
    "trained_counts": np.int64,  # (E,) labels that carry loss
    "digests": np.uint64,  # (E,) of the token ids and labels, to find duplicates
    "prompts": np.uint64,  # (E,) of the token ids before the last trained span; 0 where there are none
    "units": np.int64,  # (E,) which row of the files it came from; a document gives several examples
    "sources": np.int32,  # (E,) which source it came from
    "row_bounds": np.int64,  # (E + 1,) bytes in rows.jsonl
    "duplicates": np.int64,  # (E,) the first example with the same tokens and labels, maybe itself
    "prompt_duplicates": np.int64,  # (E,) the first one with the same prompt; -1 where there is none
}
# Found when all is written, so that a later start need not sort a million hashes again.
DUPLICATES = {"duplicates": "digests", "prompt_duplicates": "prompts"}


class ExampleStore:
    """Everything prepared, read-only. Raises ValueError or OSError where files are missing or do not fit together."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        self.summary: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        if not self._fits():
            raise ValueError(f"{directory} is incomplete or damaged")

    def _fits(self) -> bool:
        """What can be seen without reading all tokens: kinds, lengths, and bounds that rise from 0 to the end."""
        if any(array.dtype != ARRAYS[name] or array.ndim != 1 for name, array in self.arrays.items()):
            return False
        count = len(self.arrays["units"])
        ends = {"bounds": len(self.arrays["tokens"]), "row_bounds": (self.directory / "rows.jsonl").stat().st_size}
        for name, end in ends.items():
            bounds = self.arrays[name]
            if len(bounds) != count + 1 or bounds[0] != 0 or bounds[-1] != end or np.any(bounds[1:] <= bounds[:-1]):
                return False
        each = ("trained_counts", "digests", "prompts", "sources", *DUPLICATES)
        listed = sum(sum(source["skipped"].values()) for source in self.summary.get("sources", []))
        return (
            len(self.arrays["trained"]) == len(self.arrays["tokens"])
            and all(len(self.arrays[name]) == count for name in each)
            and all(np.all(self.arrays[name] < count) for name in DUPLICATES)
            and (not listed or self.skipped_rows.is_file())
        )

    @property
    def skipped_rows(self) -> Path:
        """The list of skipped rows, one JSON object a line with where and reason; no file where there are none."""
        return self.directory / SKIPPED_NAME

    def example(self, index: int) -> Example:
        begin, end = self.arrays["bounds"][index : index + 2]
        tokens = np.asarray(self.arrays["tokens"][begin:end], dtype=np.int64)
        labels = np.where(self.arrays["trained"][begin:end], tokens, IGNORED_LABEL)
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
    def trained_counts(self) -> np.ndarray:
        """Labels that carry loss, of each example, (len,) int64."""
        return self._store.arrays["trained_counts"][self._indices]

    @property
    def digests(self) -> np.ndarray:
        """A hash of each example's tokens and labels, (len,) uint64."""
        return self._store.arrays["digests"][self._indices]

    @property
    def duplicates(self) -> np.ndarray:
        """Equal for examples of one store with the same tokens and labels, (len,) int64."""
        return self._store.arrays["duplicates"][self._indices]

    @property
    def prompt_duplicates(self) -> np.ndarray:
        """Equal for examples of one store that have the same prompt, (len,) int64; -1 where there is none."""
        return self._store.arrays["prompt_duplicates"][self._indices]

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


def existing_store(directory: Path) -> ExampleStore | None:
    """The store prepared before, or None where there is none or it is damaged: then it is to be made anew."""
    try:
        return ExampleStore(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
