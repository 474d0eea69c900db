"""Promises of the way out that a bad row's message names: it leads on, and counts every bad row that was seen."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from advice import prepared, refusal, ways
from preparing import run, write

from qlora_trainer.common.errors import ConfigError, DataError
from qlora_trainer.data.preparation import record_groups
from qlora_trainer.data.preparation.reports import count_reasons

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
BAD: dict[str, dict[str, Any]] = {
    "null": {"question": "q", "answer": None},
    "unknown role": {"messages": [{"role": "Narrator", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "no answer": {"messages": [{"role": "user", "content": "a"}]},
    "tools": {**GOOD, "tools": TOOLS},
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("count", [1, 3])
def test_where_every_row_is_bad_nobody_is_advised_to_skip_them(tmp_path: Path, kind: str, count: int) -> None:
    message = refusal(tmp_path, [BAD[kind]] * count, ["data.format=question_answer"] if kind == "null" else [])
    assert "Correct it" in message
    assert "on_bad_row" not in message
    assert ("(and 2 more: lines 2, 3)" in message) == (count == 3)


@pytest.mark.parametrize("kind", ["no answer", "tools"])
def test_the_settings_of_the_message_skip_all_bad_rows_at_once(tmp_path: Path, kind: str) -> None:
    rows = [GOOD] * 5 + [BAD[kind]] * 10
    message = refusal(tmp_path, rows)
    assert "(and 9 more: lines 7, 8, 9, …)" in message
    assert len(prepared(tmp_path, rows, ways(message)[-1]).train) == 5


def test_bad_rows_at_the_end_of_a_long_file_are_advised_to_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_groups, "_CHUNK_ROWS", 20)
    rows = [GOOD] * 20 + [BAD["no answer"]]
    message = refusal(tmp_path, rows)
    assert "on_bad_row" in message
    assert len(prepared(tmp_path, rows, ways(message)[-1]).train) == 20


def test_a_command_of_a_message_ends_with_its_line(tmp_path: Path) -> None:
    """As the repair of CESU-8, which is pasted into a shell."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"question":"x","answer":"y"}\n{"question":"y","answer":"\xed\xa0\xbd\xed\xb8\x80 smile"}\n')
    with pytest.raises(DataError) as raised:
        run(tmp_path, str(path))
    (line,) = [line for line in str(raised.value).splitlines() if "python3 -c" in line]
    assert line.endswith("x.utf8.jsonl")


def test_reasons_keep_the_names_that_hold_digits() -> None:
    found: Counter[str] = Counter()
    reasons = ["byte 197 (0xe9) is not UTF-8 text.", "not JSON: Expecting value at column 29 (byte 193), near 'x'."]
    count_reasons(found, [(f"x.jsonl, line {n}", f"x.jsonl, line {n}: {text}") for n, text in enumerate(reasons)])
    assert list(found) == ["byte … is not UTF-8 text", "not JSON: Expecting value at column …, near …"]


def test_a_file_without_a_usable_row_names_the_lines_of_each_reason(tmp_path: Path) -> None:
    empty = {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}
    message = refusal(tmp_path, [empty] * 4)
    assert "none of the 4 rows" in message
    assert "a turn of the user or the assistant is empty (4: lines 1, 2, 3, …)" in message


ROW: dict[str, Any] = {"talk": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}], "n": [1, 2]}
FIRST = {"question": "talk.0.input", "answer": "talk.0.output"}
BOTH = {"question": "talk.0.input", "answer": "talk.-1.output"}


def test_items_of_a_list_that_no_column_takes_are_reported_with_their_rows(tmp_path: Path) -> None:
    one = {"talk": ROW["talk"][:1], "n": [1, 2]}
    path = write(tmp_path, "x.jsonl", [ROW, one, ROW])
    assert (
        "x.jsonl: 2 of 3 rows: talk holds more items than are read of it"
        in run(tmp_path, path, columns=FIRST).report.warnings
    )
    template = {"question": "{talk.0.input} {n.0}"}
    found = run(tmp_path, path, columns={"answer": "talk.0.output"}, template=template).report.warnings
    assert "x.jsonl: 2 of 3 rows: talk holds more items than are read of it" in found
    assert not [text for text in run(tmp_path, path, columns=BOTH).report.warnings if "more items" in text]


def test_columns_of_one_of_many_rows_inside_a_file_are_a_mistake_of_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"canary": "x", "examples": [{"input": "a", "target": "b"}, {"input": "c", "target": "d"}]}')
    columns = {"question": "examples.0.input", "answer": "examples.0.target"}
    with pytest.raises(ConfigError, match=r"2 rows inside it.*'data\.rows=examples'$"):
        run(tmp_path, str(path), columns=columns)
