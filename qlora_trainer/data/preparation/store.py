"""Read prepared examples from disk: one memory-mapped Arrow file, so that a million rows need little memory.

A directory with examples.arrow (Arrow's file format, which any Arrow library opens), summary.json, and the list of
skipped rows where there are any. Left out: writing one (store_writer.py). E examples, L tokens of one.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute

from qlora_trainer.data.types import IGNORED_LABEL, Example, Row, row_from_json

EXAMPLES_NAME = "examples.arrow"
SUMMARY_NAME = "summary.json"
SKIPPED_NAME = "skipped_rows.jsonl"

SCHEMA = arrow.schema(
    [
        ("input_ids", arrow.large_list(arrow.int32())),  # (L,)
        ("trained", arrow.large_list(arrow.bool_())),  # (L,) which tokens carry loss, one bit each
        ("trained_count", arrow.int64()),  # labels that carry loss
        ("digest", arrow.uint64()),  # of the token ids and of which are trained, to find repeats
        ("prompt_digest", arrow.uint64()),  # of the token ids before the last trained span; 0 where there are none
        ("row_number", arrow.int64()),  # which row of all files it came from; a document gives several examples
        ("source", arrow.int32()),  # index of the source it came from
        ("row", arrow.large_binary()),  # the row with its place, as JSON
    ]
)


class ExampleStore:
    """Read all prepared examples of a directory.

    An OSError or pyarrow.ArrowException says that a file cannot be read.

    Args:
        directory: of the store.

    Raises:
        ValueError: the files do not fit together.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.summary: dict[str, Any] = json.loads((directory / SUMMARY_NAME).read_text(encoding="utf-8"))
        self._table = arrow.ipc.open_file(arrow.memory_map(str(directory / EXAMPLES_NAME))).read_all()
        self._table.validate(full=True)  # bounds, not tokens: a bound beyond the file would end the process
        skipped = sum(sum(source["skipped"].values()) for source in self.summary.get("sources", []))
        if self._table.schema != SCHEMA or (skipped and not self.skipped_rows.is_file()):
            raise ValueError(f"{directory} is incomplete or damaged")
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        """Count the examples.

        Returns:
            E.
        """
        return len(self._table)

    @property
    def skipped_rows(self) -> Path:
        """Return the path of the skipped rows, a JSON object a line with where and reason; it may not exist."""
        return self.directory / SKIPPED_NAME

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each example, (E,) int64."""
        if "lengths" not in self._columns:
            self._columns["lengths"] = compute.list_value_length(self._table["input_ids"]).to_numpy()
        return self._columns["lengths"]

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers, copied once from the file.

        Args:
            name: in `SCHEMA`.

        Returns:
            (E,).
        """
        if name not in self._columns:
            self._columns[name] = self._table[name].to_numpy()
        return self._columns[name]

    def example(self, index: int) -> Example:
        """Return an example as lists of Python integers.

        Args:
            index: from 0.

        Returns:
            The example.
        """
        input_ids = self._table["input_ids"][index].values.to_numpy()
        trained = self._table["trained"][index].values.to_numpy(zero_copy_only=False)
        return Example(input_ids.tolist(), np.where(trained, input_ids, IGNORED_LABEL).tolist())

    def row(self, index: int) -> tuple[str, Row]:
        """Return an example's row, with its place.

        Args:
            index: of the example, from 0.

        Returns:
            Where it came from, and the row.
        """
        value = json.loads(self._table["row"][index].as_py())
        return value["where"], row_from_json(value["row"])

    def has_conversations(self) -> bool:
        """Find out whether any row is a conversation, without reading them as JSON.

        Returns:
            True if one is. A key's quotation marks are not escaped in JSON, as those within a text are.
        """
        blocks = self._table["row"].chunks  # the first that has one ends the search
        return any(compute.any(compute.match_substring(rows, b'"messages":')).as_py() for rows in blocks)


class ExampleSet:
    """Select some of the prepared examples: a list of Example, with the rows that they show.

    Args:
        store: has them.
        indices: which, (examples of this set,) int64.
        leading_ids: of virtual tokens, which each example begins with; its length counts them.
    """

    def __init__(self, store: ExampleStore, indices: np.ndarray, leading_ids: Sequence[int] = ()) -> None:
        self._store = store
        self._indices = indices  # (examples of this set,) int64
        self.leading_ids = list(leading_ids)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._store.example(int(self._indices[index])).after(self.leading_ids)

    @property
    def control_tokens(self) -> tuple[set[int], set[int]]:
        """Return which control tokens the store's examples hold, those of other sets too: (used, trained)."""
        found = self._store.summary["control_tokens"]
        return set(found["used"]), set(found["trained"])

    @property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of each example, (len,) int64."""
        return self._store.lengths[self._indices] + len(self.leading_ids)

    def has_conversations(self) -> bool:
        """Find out whether any of the store's rows is a conversation, without reading them as JSON.

        Returns:
            True if one is.
        """
        return self._store.has_conversations()

    @property
    def trained_counts(self) -> np.ndarray:
        """Count the labels that carry loss, of each example, (len,) int64."""
        return self._store.column("trained_count")[self._indices]

    @property
    def digests(self) -> np.ndarray:
        """Return a hash of each example's tokens and labels, (len,) uint64."""
        return self._store.column("digest")[self._indices]

    @property
    def prompt_digests(self) -> np.ndarray:
        """Return a hash of the tokens before each example's last trained span, (len,) uint64; 0 if there are none."""
        return self._store.column("prompt_digest")[self._indices]

    @property
    def sources(self) -> np.ndarray:
        """Return the index of the source of each example, (len,) int32."""
        return self._store.column("source")[self._indices]

    def row(self, index: int) -> Row:
        """Return the row as it was read; of a long document, the part that this example holds.

        Args:
            index: of the example, from 0.

        Returns:
            The row.
        """
        return self._store.row(int(self._indices[index]))[1]

    def where(self, index: int) -> str:
        """Return the file and line that an example came from.

        Args:
            index: of the example, from 0.

        Returns:
            Such as "rows.jsonl, line 12".
        """
        return self._store.row(int(self._indices[index]))[0]


def existing_store(directory: Path) -> ExampleStore | None:
    """Open the store that was prepared before.

    Args:
        directory: of the store.

    Returns:
        The store, or None where there is none or it is damaged: then it is to be made anew.
    """
    try:
        return ExampleStore(directory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, arrow.ArrowException):
        return None
