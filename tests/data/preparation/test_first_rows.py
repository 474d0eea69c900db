"""The first rows are read before there is a tokenizer, and their faults reported in the words of the preparation."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import ConfigError, DataError, FileMissingError
from qlora_trainer.config.data_schema import DataConfig
from qlora_trainer.data.preparation import first_rows
from qlora_trainer.data.preparation.first_rows import check_first_rows
from qlora_trainer.data.preparation.prepare import prepare

GOOD = {"prompt": "a", "completion": "b"}


def config_of(path: Path, rows: list[Any], **settings: Any) -> DataConfig:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return DataConfig(train=str(path), max_length=64, **settings)


@pytest.mark.parametrize(
    "rows",
    [
        [GOOD, "{", GOOD, {"prompt": 3}],
        [{"messages": [{"role": "nobody", "content": "x"}]}],
        [{"x": 1}],
        [{**GOOD, "label": False}],
    ],
)
def test_a_fault_is_reported_in_the_words_of_the_preparation(tmp_path: Path, rows: list[Any]) -> None:
    config = config_of(tmp_path / "x.jsonl", rows)
    reported = []
    for read in (
        lambda: check_first_rows(config),
        lambda: prepare(config, tiny_tokenizer("smollm2"), max_positions=64, seed=0, cache_dir=tmp_path),
    ):
        with pytest.raises((ConfigError, DataError)) as raised:
            read()
        reported.append((type(raised.value), str(raised.value)))
    assert reported[0] == reported[1]


def test_bad_rows_that_are_skipped_are_left_to_the_preparation(tmp_path: Path) -> None:
    check_first_rows(config_of(tmp_path / "x.jsonl", [GOOD, "{"], on_bad_row="skip"))


def test_only_the_first_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_rows, "FIRST_ROWS", 300)  # the second chunk of 256 has the 300th
    check_first_rows(config_of(tmp_path / "x.jsonl", [GOOD] * 512 + ["{"]))
    with pytest.raises(DataError, match="line 512"):
        check_first_rows(config_of(tmp_path / "x.jsonl", [GOOD] * 511 + ["{"]))


def test_files_of_evaluation_are_read_too(tmp_path: Path) -> None:
    bad = tmp_path / "eval.jsonl"
    with pytest.raises(FileMissingError, match=r"data\.eval"):
        check_first_rows(config_of(tmp_path / "x.jsonl", [GOOD], eval=str(bad)))
    bad.write_text("{")
    with pytest.raises(DataError, match=r"eval\.jsonl, line 1"):
        check_first_rows(config_of(tmp_path / "x.jsonl", [GOOD], eval=str(bad)))


def test_a_data_set_of_the_hub_is_left_to_the_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_rows, "open_sources", lambda *_: pytest.fail("it is opened"))
    check_first_rows(DataConfig(train="someone/some-rows"))
