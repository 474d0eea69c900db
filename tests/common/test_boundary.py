"""Promises of the boundary to libraries: what says nothing about a file passes as it was raised, all else names it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.common.boundary import is_from_library, key_at_fault, library_boundary
from qlora_trainer.common.errors import DataError, ModelError

PASSES = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    KeyboardInterrupt(),
    SystemExit(130),
    DataError("ours"),
]


@pytest.mark.parametrize("error", PASSES, ids=lambda error: type(error).__name__)
def test_what_says_nothing_about_a_file_passes_unchanged(error: BaseException) -> None:
    tried: list[dict[str, Any]] = []
    assert not is_from_library(error)
    with pytest.raises(type(error)) as caught, library_boundary("a file cannot be read", {"key": 1}, tried.append):
        raise error
    assert caught.value is error
    assert tried == []


@pytest.mark.parametrize("error", PASSES[:2], ids=lambda error: type(error).__name__)
def test_a_device_that_fails_while_a_key_is_looked_for_is_reported(error: Exception) -> None:
    def attempt(values: dict[str, Any]) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        key_at_fault({"key": 1}, attempt, ValueError("wrong"))
    assert caught.value is error


def test_whatever_else_is_raised_names_the_file_and_the_key(tmp_path: Path) -> None:
    class AcceleratorError(RuntimeError):
        """Of another library than torch."""

    def attempt(values: dict[str, Any]) -> None:
        if "wrong" in values:
            raise ValueError("not so")

    for error in (ValueError("not so"), AssertionError(), AcceleratorError("not so")):
        with (
            pytest.raises(ModelError, match=r"^config cannot be read: .*The key at fault is wrong: 1\.$"),
            library_boundary("config cannot be read", {"right": 0, "wrong": 1}, attempt),
        ):
            raise error
