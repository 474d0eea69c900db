"""Data sets of the hub and saved ones: the rows of the named split, or what there is and the line for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from advice import WAY, ways
from datasets import Dataset, DatasetDict

from qlora_trainer.common.errors import DataError
from qlora_trainer.data.reading.hub import is_saved, load_hub, load_saved

ROWS = [{"text": "a"}, {"text": "b"}]


def saved(folder: Path, *splits: str) -> Path:
    rows = Dataset.from_list(ROWS)
    (DatasetDict(dict.fromkeys(splits, rows)) if splits else rows).save_to_disk(str(folder))
    return folder


def test_a_saved_data_set_is_known_and_another_folder_is_none(tmp_path: Path) -> None:
    assert is_saved(saved(tmp_path / "one"))
    assert is_saved(saved(tmp_path / "several", "train"))
    assert not is_saved(tmp_path)
    assert not is_saved(tmp_path / "none")


def test_rows_of_a_saved_data_set_are_those_that_were_saved(tmp_path: Path) -> None:
    assert list(load_saved(saved(tmp_path / "one"), "train")) == ROWS
    folder = tmp_path / "several"
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[1:])).save_to_disk(str(folder))
    assert list(load_saved(folder, "test")) == ROWS[1:]


def test_rows_are_python_objects_with_all_columns_whatever_format_was_set(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": "a", "ids": [1, 2]}])
    rows.with_format("numpy", columns=["ids"]).save_to_disk(str(tmp_path / "one"))
    assert list(load_saved(tmp_path / "one", "train")) == [{"text": "a", "ids": [1, 2]}]


def test_a_split_that_is_not_there_is_reported_with_those_that_are_and_the_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "several", "dev", "test")
    with pytest.raises(DataError, match="has no split train; it has dev, test") as caught:
        load_saved(folder, "train")
    assert WAY.search(str(caught.value))
    assert ways(str(caught.value)) == [[f"data.train=[{{path: {folder}, split: dev}}]"]]


def test_a_split_of_rows_that_have_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without splits, and split test would have no effect"):
        load_saved(saved(tmp_path / "one"), "test")


def test_a_damaged_folder_is_reported_by_its_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one")
    for file in folder.glob("*.arrow"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match=f"{folder} cannot be read as a saved data set: "):
        load_saved(folder, "train")


def raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("datasets.load_dataset", fail)


def real_error(call: Callable[[], object]) -> Exception:
    """Return what the library itself raises, so that its words are those that are read."""
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_a_split_that_the_hub_does_not_have_is_reported_with_those_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        (tmp_path / "rows" / f"{split}.jsonl").write_text('{"text": "a"}\n')
    raising(monkeypatch, real_error(lambda: datasets.load_dataset(str(tmp_path / "rows"), split="dev")))
    with pytest.raises(DataError, match="hub data set owner/set has no split dev; it has train, test") as caught:
        load_hub("owner/set", "dev", None)
    assert ways(str(caught.value)) == [["data.train=[{path: owner/set, split: train}]"]]


@pytest.mark.parametrize("subset", [None, "nonsense"])
def test_a_subset_that_is_not_named_or_not_there_is_reported_with_those_that_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subset: str | None
) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "other"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("main", "other"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text('{"text": "a"}\n')
    raising(monkeypatch, real_error(lambda: datasets.load_dataset(str(tmp_path / "rows"), subset, split="train")))
    with pytest.raises(DataError, match="hub data set owner/set has the subsets main, other") as caught:
        load_hub("owner/set", "train", subset)
    assert ways(str(caught.value)) == [["data.train=[{path: owner/set, subset: main}]"]]


def test_whatever_else_the_hub_raises_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, RuntimeError("no way\nsecond line"))
    with pytest.raises(DataError) as caught:
        load_hub("rows.jsnl", "train", None)
    assert "There is no file rows.jsnl here" in str(caught.value)
    assert "no way" in str(caught.value)
    assert "second line" not in str(caught.value)


def test_a_data_set_is_asked_for_by_name_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[str | None, ...], dict[str, str]]] = []
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: asked.append((arguments, options)))
    load_hub("owner/set", "test", "main")
    assert asked == [(("owner/set", "main"), {"split": "test"})]
