import pytest

from qlora_trainer.data.messages import Conversation, Document, Message, PromptCompletion
from qlora_trainer.data.packing import Example
from qlora_trainer.data.store import ExampleStore, new_store

ROWS = [
    Document("a line\u2028 and\nanother"),
    PromptCompletion("p", "c"),
    Conversation((Message("user", "é"), Message("assistant", "a", learn=False))),
]


def test_examples_and_rows_come_back_as_they_were_written(tmp_path):
    examples = [Example(list(range(n + 2)), [-100, *range(1, n + 2)]) for n in range(3)]
    with new_store(tmp_path / "set") as writer:
        for unit, (example, row) in enumerate(zip(examples, ROWS, strict=True)):
            writer.append(example, row, where=f"x, line {unit}", unit=unit, for_heldout=unit == 2)
        writer.finish({"rows": 3})
    store = ExampleStore(tmp_path / "set")
    assert [store.example(i) for i in range(3)] == examples
    assert [store.row(i) for i in range(3)] == [(f"x, line {i}", row) for i, row in enumerate(ROWS)]
    assert store.summary == {"rows": 3}
    assert store.arrays["for_heldout"].tolist() == [False, False, True]


def test_a_failed_preparation_leaves_nothing_and_spares_what_was_there(tmp_path):
    with new_store(tmp_path / "set") as writer:
        writer.finish({"rows": 0})
    with pytest.raises(KeyboardInterrupt), new_store(tmp_path / "set"):
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert ExampleStore(tmp_path / "set").summary == {"rows": 0}


def test_an_empty_store_is_readable(tmp_path):
    with new_store(tmp_path / "set") as writer:
        writer.finish({})
    assert len(ExampleStore(tmp_path / "set").arrays["units"]) == 0
