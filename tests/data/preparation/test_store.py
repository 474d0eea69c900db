import dataclasses
import json

import datasets
import numpy as np
import pyarrow as arrow
import pytest

from qlora_trainer.common.errors import DiskError, OutputExistsError
from qlora_trainer.data.preparation import store_writer
from qlora_trainer.data.preparation.store import EXAMPLES_NAME, ExampleSet, ExampleStore, existing_store
from qlora_trainer.data.preparation.store_writer import make_block, new_store
from qlora_trainer.data.types import Conversation, Document, Example, Message, PromptCompletion, Row

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
        writer.append(make_block([(0, *items[0])]), source=0, first_row=1)
        writer.append(make_block([(1, *items[1]), (2, *items[2])]), source=1, first_row=2)
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
    assert store.column("row_number").tolist() == [1, 3, 4]
    assert store.column("source").tolist() == [0, 1, 1]
    assert store.column("trained_count").tolist() == [example.trained_tokens for example in EXAMPLES]
    assert store.lengths.tolist() == [len(example.input_ids) for example in EXAMPLES]
    lines = store.skipped_rows.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"where": "x, line 3", "reason": "no\u2028text"},
        {"where": "x, line 4", "reason": "no text"},
    ]


def test_a_writer_knows_which_control_tokens_the_examples_hold_and_which_are_trained(tmp_path):
    with new_store(tmp_path / "set", control={9, 2, 0}) as writer:
        for number, example in enumerate(EXAMPLES):
            writer.append(make_block([(number, "x", example, ROWS[0])]), source=0, first_row=1)
        assert writer.control_tokens() == {"used": [0, 2], "trained": [2]}, "0 begins each, and carries no loss"
        writer.finish({})


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
    digests, prompts = block["digest"].to_pylist(), block["prompt_digest"].to_pylist()
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5
    # A prompt is what is before the last answer; a text that is trained from its first token on has none.
    assert prompts[0] == prompts[1] == prompts[2] == prompts[3]
    assert prompts[4] not in (prompts[0], 0)
    assert prompts[5] == 0


def test_blocks_are_joined_before_they_are_written_and_come_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "_JOINED_BYTES", 2_000)
    examples = [Example(list(range(n, n + 50)), [-100] * 20 + list(range(n + 20, n + 50))) for n in range(100)]
    with new_store(tmp_path / "set") as writer:
        for n, example in enumerate(examples):
            writer.append(make_block([(0, f"x, line {n}", example, Document(f"{n}"))]), source=n, first_row=n)
        writer.finish({})
    with arrow.OSFile(str(tmp_path / "set" / EXAMPLES_NAME)) as file:
        assert 5 < arrow.ipc.open_file(file).num_record_batches < 50
    store = ExampleStore(tmp_path / "set")
    assert [store.example(n) for n in range(100)] == examples
    assert [store.row(n) for n in range(100)] == [(f"x, line {n}", Document(f"{n}")) for n in range(100)]
    assert store.column("source").tolist() == store.column("row_number").tolist() == list(range(100))


def test_any_arrow_library_opens_the_examples(tmp_path):
    write_store(tmp_path / "set")
    path, cache = str(tmp_path / "set" / EXAMPLES_NAME), str(tmp_path / "cache")
    loaded = datasets.load_dataset("arrow", data_files=path, split="train", cache_dir=cache)
    assert loaded["input_ids"][:] == [example.input_ids for example in EXAMPLES]


def test_a_failed_preparation_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_store(tmp_path / "set"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_sound_store_is_not_replaced(tmp_path):
    write_store(tmp_path / "set", {"found": 0})
    with pytest.raises(OutputExistsError):
        write_store(tmp_path / "set", {"found": 1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert ExampleStore(tmp_path / "set").summary == {"found": 0}


def test_what_killed_preparations_left_is_removed_and_the_work_of_living_ones_is_not(tmp_path):
    left = tmp_path / ".other.partial-0123abcd"
    left.mkdir()
    (left / EXAMPLES_NAME).write_bytes(b"half")
    with new_store(tmp_path / "another"):
        (alive,) = tmp_path.glob(".another.partial-*")
        write_store(tmp_path / "set")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [alive.name, "set"]


def test_a_cache_that_is_a_file_ends_with_an_error_message(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(DiskError, match="set XDG_CACHE_HOME to another folder"), new_store(tmp_path / "cache" / "set"):
        raise AssertionError("there is nowhere to write")


def test_an_empty_store_is_readable(tmp_path):
    with new_store(tmp_path / "set") as writer:
        writer.finish({})
    store = ExampleStore(tmp_path / "set")
    assert len(store) == len(store.lengths) == len(store.column("digest")) == 0


def test_of_two_processes_that_write_one_store_the_second_to_end_finds_the_first(tmp_path):
    """The first one's store, which holds the same, is left to those who read it."""
    readers = []

    def write_meanwhile() -> None:
        with new_store(tmp_path / "set") as writer:
            writer.finish({"made by": "the second to end"})
            write_store(tmp_path / "set", {"made by": "the first to end"})
            readers.append(ExampleSet(ExampleStore(tmp_path / "set"), np.arange(3)))

    with pytest.raises(OutputExistsError):
        write_meanwhile()
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert ExampleStore(tmp_path / "set").summary == {"made by": "the first to end"}
    assert readers[0].row(2) == ROWS[2]
    assert readers[0][1] == EXAMPLES[1]


def test_a_damaged_store_is_replaced(tmp_path):
    write_store(tmp_path / "set")
    (tmp_path / "set" / EXAMPLES_NAME).unlink()
    write_store(tmp_path / "set")
    assert existing_store(tmp_path / "set")
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def one_bound_is_beyond_the_tokens(table: arrow.Table) -> arrow.Table:
    (chunk,) = table["input_ids"].chunks
    bounds = np.array(chunk.offsets.to_numpy())
    bounds[1] = 10**9
    broken = arrow.Array.from_buffers(chunk.type, len(chunk), [None, arrow.py_buffer(bounds)], children=[chunk.values])
    return table.set_column(0, "input_ids", broken)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["trained"]),
        lambda table: table.rename_columns(["tokens", *table.column_names[1:]]),
        lambda table: table.set_column(6, "source", table["source"].cast("int64")),
        one_bound_is_beyond_the_tokens,
    ],
)
def test_examples_of_another_shape_are_refused(tmp_path, change):
    write_store(tmp_path / "set")
    path = tmp_path / "set" / EXAMPLES_NAME
    with arrow.OSFile(str(path)) as file:
        table = change(arrow.ipc.open_file(file).read_all())
    with arrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    assert existing_store(tmp_path / "set") is None


@pytest.mark.parametrize("kept", [0, 1, 8, 200, -1, -8, -200])
def test_cut_off_examples_are_refused(tmp_path, kept):
    write_store(tmp_path / "set")
    path = tmp_path / "set" / EXAMPLES_NAME
    path.write_bytes(path.read_bytes()[:kept])
    assert existing_store(tmp_path / "set") is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"sources": [1]}', '{"sources": 3}'])
def test_a_damaged_summary_is_refused(tmp_path, content):
    write_store(tmp_path / "set")
    (tmp_path / "set" / "summary.json").write_text(content)
    assert existing_store(tmp_path / "set") is None


def test_a_lost_list_of_skipped_rows_is_refused(tmp_path):
    write_store(tmp_path / "set", {"sources": [{"skipped": {"no text": 2}}]})
    assert existing_store(tmp_path / "set")
    (tmp_path / "set" / "skipped_rows.jsonl").unlink()
    assert existing_store(tmp_path / "set") is None
