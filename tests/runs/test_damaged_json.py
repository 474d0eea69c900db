"""A JSON file of a run or model that is damaged, or made by anyone, is an error of ours: its name, and what to do."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qlora_trainer.adapters.peft_format import read_config
from qlora_trainer.common.errors import AdapterError, CheckpointError, ModelError, QLoRATrainerError
from qlora_trainer.runs.checkpoint import load_checkpoint
from qlora_trainer.runs.directory import read_base_record, read_samples
from qlora_trainer.weights.listing import read_json_object

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DAMAGES = {
    "empty": (b"", "is not JSON"),
    "not JSON": (b"{", "is not JSON"),
    "deeply nested": (b"[" * 200_000, "is not JSON"),
    "not UTF-8": ('{"key": "é"}'.encode("latin-1"), "is not JSON"),
    "a number": (b"1", "but holds a int"),
}


class File(NamedTuple):
    """A file by what reads it, and how a damaged one is reported."""

    read: Callable[[Path], Any]  # the file
    error: type[QLoRATrainerError]
    advice: str
    most_mib: int
    another: bytes = b"[]"


FILES = {
    "config.json": File(read_json_object, ModelError, "Fetch the model again.", 100),
    "manifest.json": File(lambda path: load_checkpoint(path.parent), CheckpointError, "use another one.", 64),
    "adapter_config.json": File(read_config, AdapterError, "Fetch or save the adapter again.", 1),
    "base.json": File(lambda path: read_base_record(path.parent), CheckpointError, "Restore it.", 64),
    "samples.json": File(lambda path: read_samples(path.parent), CheckpointError, "Restore or delete it", 64, b"{}"),
}
pytestmark = pytest.mark.parametrize("name", FILES)


def reported(path: Path) -> str:
    file = FILES[path.name]
    with pytest.raises(file.error) as caught:
        file.read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_with_what_to_do(name: str, damage: str, tmp_path: Path) -> None:
    content, reason = DAMAGES[damage]
    (tmp_path / name).write_bytes(content)
    message = reported(tmp_path / name)
    assert reason in message
    assert FILES[name].advice in message


def test_a_list_for_an_object_and_an_object_for_a_list_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name].another)
    message = reported(tmp_path / name)
    assert "should hold a JSON" in message
    assert FILES[name].advice in message


def test_a_file_that_is_too_large_is_not_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    most = FILES[name].most_mib * 2**20
    os.truncate(tmp_path / name, most + 1)
    message = reported(tmp_path / name)
    assert f"more than the {most} that are read" in message
    assert FILES[name].advice in message


def test_a_file_that_git_lfs_has_not_fetched_is_named_with_the_command(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(POINTER)
    assert f"git -C {tmp_path} lfs pull" in reported(tmp_path / name)


def test_a_missing_file_is_reported_or_was_never_needed(name: str, tmp_path: Path) -> None:
    if name in ("base.json", "samples.json"):
        assert not FILES[name].read(tmp_path / name)
    else:
        assert "is missing" in reported(tmp_path / name)
        assert FILES[name].advice in reported(tmp_path / name)
