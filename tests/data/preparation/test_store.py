import dataclasses
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.common.errors import DiskError
from qlora_trainer.data.batching.packing import Example
from qlora_trainer.data.preparation.store import ExampleSet, ExampleStore, existing_store
from qlora_trainer.data.preparation.store_writer import _first_equal, make_block, new_store
from qlora_trainer.data.types import Conversation, Document, Message, PromptCompletion, Row

ROWS: list[Row] = [
    Document("a line\u2028 and\nanother"),
    PromptCompletion("p", "c"),
    Conversation((Message("user", "é"), Message("assistant", "a", learn=False))),
]
EXAMPLES = [Example(list(range(n + 2)), [-100, *range(1, n + 2)]) for n in range(3)]


def write_store(directory, summary=None) -> None:
    """Three examples in two batches, of two sources; the second batch begins with a row that gives none."""
    items = [(f"x, line {n}", example, row) for n, (example, row) in enumerate(zip(EXAMPLES, ROWS, strict=True))]
    with new_store(directory) as writer:
        writer.append(make_block([(0, *items[0])]), source=0, first_unit=1)
        writer.append(make_block([(1, *items[1]), (2, *items[2])]), source=1, first_unit=2)
        writer.skip([("x, line 3", "no\u2028text")])
        writer.skip([])
        writer.skip([("x, line 4", "no text")])
        writer.finish(summary or {})


def test_examples_and_rows_come_back_as_they_were_written(tmp_path):
    write_store(tmp_path / "set", {"found": 3})
    store = ExampleStore(tmp_path / "set")
    assert [store.example(i) for i in range(3)] == EXAMPLES
    assert [store.row(i) for i in range(3)] == [(f"x, line {i}", row) for i, row in enumerate(ROWS)]
    assert store.summary == {"found": 3}
    assert store.arrays["units"].tolist() == [1, 3, 4]
    assert store.arrays["sources"].tolist() == [0, 1, 1]
    assert store.arrays["trained_counts"].tolist() == [example.trained_tokens for example in EXAMPLES]
    lines = store.skipped_rows.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"where": "x, line 3", "reason": "no\u2028text"},
        {"where": "x, line 4", "reason": "no text"},
    ]


def test_equal_examples_have_equal_hashes_and_others_do_not():
    long = Example([1, 2, 3, 4, 5], [-100, 2, -100, 4, 5])
    items = [
        long,
        dataclasses.replace(long),
        dataclasses.replace(long, labels=[-100, -100, -100, 4, 5]),
        dataclasses.replace(long, input_ids=[1, 2, 3, 4, 6], labels=[-100, 2, -100, 4, 6]),
        dataclasses.replace(long, input_ids=[1, 2, 9, 4, 5]),
        Example([1, 2, 3], [1, 2, 3]),
    ]
    block = make_block([(n, "", item, ROWS[0]) for n, item in enumerate(items)])
    digests, prompts = block.digests.tolist(), block.prompts.tolist()
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5
    # A prompt is what is before the last answer; a text that is trained from its first token on has none.
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3]
    assert prompts[4] not in (prompts[0], 0)
    assert prompts[5] == 0


@given(st.lists(st.integers(0, 4), max_size=20))
def test_duplicates_are_the_first_of_equals(hashes):
    expected = [hashes.index(value) if value else -1 for value in hashes]
    assert _first_equal(np.array(hashes, dtype=np.uint64)).tolist() == expected


def test_a_failed_preparation_leaves_nothing_and_spares_what_was_there(tmp_path):
    write_store(tmp_path / "set", {"found": 0})
    with pytest.raises(KeyboardInterrupt), new_store(tmp_path / "set"):
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert ExampleStore(tmp_path / "set").summary == {"found": 0}


def test_what_a_killed_preparation_left_is_removed_when_it_is_old(tmp_path):
    old, alive = tmp_path / ".other.partial-0123abcd", tmp_path / ".another.partial-4567cdef"
    for directory in (old, alive):
        directory.mkdir()
        (directory / "tokens.npy").write_bytes(b"half")
        os.utime(directory, (0, 0))
    os.utime(old / "tokens.npy", (0, 0))
    write_store(tmp_path / "set")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [alive.name, "set"]


def test_a_cache_that_is_a_file_is_a_message(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(DiskError, match="set XDG_CACHE_HOME to another folder"), new_store(tmp_path / "cache" / "set"):
        raise AssertionError("there is nowhere to write")


def test_an_empty_store_is_readable(tmp_path):
    with new_store(tmp_path / "set") as writer:
        writer.finish({})
    assert len(ExampleStore(tmp_path / "set").arrays["units"]) == 0


def test_two_processes_that_write_one_store_do_not_meet(tmp_path):
    """The second to end finds the first one's store, which holds the same, and leaves it to those who read it."""
    with new_store(tmp_path / "set") as first:
        first.finish({"made by": "first"})
        write_store(tmp_path / "set", {"made by": "second"})
        reading = ExampleSet(ExampleStore(tmp_path / "set"), np.arange(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert ExampleStore(tmp_path / "set").summary == {"made by": "second"}
    assert reading.row(2) == ROWS[2]
    assert reading[1] == EXAMPLES[1]


def test_a_damaged_store_is_replaced(tmp_path):
    write_store(tmp_path / "set")
    (tmp_path / "set" / "tokens.npy").unlink()
    write_store(tmp_path / "set")
    assert existing_store(tmp_path / "set")
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def rewrite(directory, name, change) -> None:
    array = np.load(directory / f"{name}.npy")
    np.save(directory / f"{name}.npy", change(array))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda array: array[:-1]),
        ("tokens", lambda array: array.astype(np.int64)),
        ("trained", lambda array: array[1:]),
        ("bounds", lambda array: array[[0, 2, 1, 3]]),
        ("bounds", lambda array: array - 1),
        ("bounds", lambda array: array[:-1]),
        ("row_bounds", lambda array: array * 2),
        ("units", lambda array: array[:2]),
        ("sources", lambda array: array[:2]),
        ("prompts", lambda array: array[:2]),
        ("duplicates", lambda array: array + 3),
        ("prompt_duplicates", lambda array: array[:2]),
        ("digests", lambda array: array[None]),
    ],
)
def test_arrays_that_do_not_fit_together_are_noticed(tmp_path, name, change):
    write_store(tmp_path / "set")
    rewrite(tmp_path / "set", name, change)
    assert existing_store(tmp_path / "set") is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"sources": [1]}', '{"sources": 3}'])
def test_a_damaged_summary_is_noticed(tmp_path, content):
    write_store(tmp_path / "set")
    (tmp_path / "set" / "summary.json").write_text(content)
    assert existing_store(tmp_path / "set") is None


def test_a_lost_list_of_skipped_rows_is_noticed(tmp_path):
    write_store(tmp_path / "set", {"sources": [{"skipped": {"no text": 2}}]})
    assert existing_store(tmp_path / "set")
    (tmp_path / "set" / "skipped_rows.jsonl").unlink()
    assert existing_store(tmp_path / "set") is None
