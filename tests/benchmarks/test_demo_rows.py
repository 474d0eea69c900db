"""The demo's score counts unseen wording and unseen values: these tests keep the two sets of rows apart."""

import json
import re
from pathlib import Path
from string import Formatter

import pytest

from benchmarks.demo_frames import ACTIONS
from benchmarks.demo_rows import SHIPPED, SYSTEM_MESSAGE, Row, demo_rows, write_demo_rows
from benchmarks.demo_values import VALUES
from qlora_trainer.cli.demo_run import copy_demo_rows

TRAIN, EVAL = (
    [json.loads(line) for line in (SHIPPED / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("train", "eval")
)


def request(row: Row) -> str:
    return row["messages"][1]["content"]


def answer(row: Row) -> str:
    return row["messages"][2]["content"]


def slot_values(row: Row) -> dict[str, str]:
    """The values of the row's command by slot name, as they are written in the request."""
    command = json.loads(answer(row))
    slots = ACTIONS[command["action"]].slots
    return {slot: str(command[key]) for key, slot in slots.items()}


def wording(frame: str) -> list[str]:
    """A frame's words in lower case, every slot the same placeholder, punctuation dropped."""
    return re.findall(r"[a-z_]+", re.sub(r"{\w+}", " _ ", frame.lower()))


def words(text: str) -> set[str]:
    """Words, numbers and times of a text, in lower case."""
    return set(re.findall(r"[\w:'-]*\w", text.lower()))


def occurs(value: str, text: str) -> bool:
    """Return True if the value is in the text as whole words; 6 is not in 6:40."""
    return re.search(rf"(?<!\w)(?<!\d:){re.escape(value)}(?!\w|:\d)", text, re.IGNORECASE) is not None


def test_train_and_eval_have_the_promised_sizes() -> None:
    assert len(TRAIN) == 672
    assert len(EVAL) == 70
    for rows in (TRAIN, EVAL):
        counts = {action: sum(json.loads(answer(row))["action"] == action for row in rows) for action in ACTIONS}
        assert len(set(counts.values())) == 1


def test_every_action_has_ten_training_and_four_eval_frames_or_more() -> None:
    for action in ACTIONS.values():
        assert len(action.train_frames) >= 10
        assert len(action.eval_frames) >= 4


def test_no_sentence_frame_is_shared() -> None:
    train = [wording(frame) for action in ACTIONS.values() for frame in action.train_frames]
    eval_set = [wording(frame) for action in ACTIONS.values() for frame in action.eval_frames]
    assert not {tuple(frame) for frame in train} & {tuple(frame) for frame in eval_set}


def test_no_eval_frame_has_five_words_in_a_row_of_a_training_frame() -> None:
    def runs(frame: str) -> set[tuple[str, ...]]:
        found = wording(frame)
        return {tuple(found[start : start + 5]) for start in range(len(found) - 4)}

    seen = {run for action in ACTIONS.values() for frame in action.train_frames for run in runs(frame)}
    for action in ACTIONS.values():
        for frame in action.eval_frames:
            assert not runs(frame) & seen, frame


def test_no_slot_value_is_shared_whatever_the_slot() -> None:
    train = {str(value).lower() for values in VALUES.values() for value in values.train}
    eval_set = {str(value).lower() for values in VALUES.values() for value in values.eval}
    assert not train & eval_set


def test_no_word_of_an_eval_value_is_in_a_training_value() -> None:
    """Messages are compared whole: a sentence cannot do without "the" and "I"."""
    named = {slot: values for slot, values in VALUES.items() if slot != "text"}
    train = {word for values in named.values() for value in values.train for word in words(str(value))}
    eval_set = {word for values in named.values() for value in values.eval for word in words(str(value))}
    assert not train & eval_set


def test_no_eval_value_occurs_in_a_training_frame_or_request() -> None:
    frames = [frame for action in ACTIONS.values() for frame in action.train_frames]
    texts = "\n".join([*frames, *(str(value) for values in VALUES.values() for value in values.train)])
    requests = "\n".join(request(row) for row in TRAIN)
    for slot, values in VALUES.items():
        for value in values.eval:
            assert not occurs(str(value), texts), (slot, value)
            assert not occurs(str(value), requests), (slot, value)


def test_no_training_value_occurs_in_an_eval_answer() -> None:
    for row in EVAL:
        for slot, value in slot_values(row).items():
            assert value in {str(known) for known in VALUES[slot].eval}
            assert value not in {str(known) for known in VALUES[slot].train}


@pytest.mark.parametrize("rows", [TRAIN, EVAL], ids=["train", "eval"])
def test_every_answer_is_a_command_whose_values_are_in_its_request(rows: list[Row]) -> None:
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        command = json.loads(answer(row))
        assert list(command) == ["action", *ACTIONS[command["action"]].slots]
        assert answer(row) == json.dumps(command, ensure_ascii=False, separators=(",", ":"))
        for value in slot_values(row).values():
            assert occurs(value, request(row)), request(row)
            assert value in request(row), "copied as it is written"


def test_every_frame_names_each_slot_of_its_action_once() -> None:
    for action in ACTIONS.values():
        for frame in (*action.train_frames, *action.eval_frames):
            named = [field for _, field, _, _ in Formatter().parse(frame) if field is not None]
            assert sorted(named) == sorted(action.slots.values()), frame


def test_every_frame_and_every_eval_value_is_used() -> None:
    for action in ACTIONS.values():
        for frames, rows in ((action.train_frames, TRAIN), (action.eval_frames, EVAL)):
            for frame in frames:
                parts = re.split(r"{\w+}", frame)
                pattern = re.compile(".+".join(re.escape(part) for part in parts), re.IGNORECASE)
                assert any(pattern.fullmatch(request(row)) for row in rows), frame
    used = {value for row in EVAL for value in slot_values(row).values()}
    assert used == {str(value) for values in VALUES.values() for value in values.eval}


def test_no_request_occurs_twice() -> None:
    requests = [request(row).lower() for row in (*TRAIN, *EVAL)]
    assert len(set(requests)) == len(requests)


def test_the_system_message_does_not_give_the_schema_away() -> None:
    keys = {"action"} | set(ACTIONS) | {key for action in ACTIONS.values() for key in action.slots}
    assert not words(SYSTEM_MESSAGE) & keys
    assert {row["messages"][0]["content"] for row in (*TRAIN, *EVAL)} == {SYSTEM_MESSAGE}


def test_the_shipped_rows_are_those_that_the_generator_writes(tmp_path: Path) -> None:
    for path in write_demo_rows(tmp_path / "new" / "directory"):
        assert path.read_bytes() == (SHIPPED / path.name).read_bytes()


def test_the_demo_copies_the_shipped_rows(tmp_path: Path) -> None:
    copy_demo_rows(tmp_path)
    copied = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert copied == {f"{name}.jsonl": (SHIPPED / f"{name}.jsonl").read_bytes() for name in ("train", "eval")}


def test_another_seed_gives_other_rows() -> None:
    assert demo_rows(seed=0) == (TRAIN, EVAL)
    assert demo_rows(seed=1)[0] != TRAIN


@pytest.mark.parametrize("seed", range(1, 6))
def test_other_seeds_give_rows_as_different(seed: int) -> None:
    train, eval_set = demo_rows(seed)
    assert len({request(row) for row in train}) == len(TRAIN)
    assert len({request(row) for row in eval_set}) == len(EVAL)
