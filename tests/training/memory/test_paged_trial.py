"""The trial of paged memory asks the driver first, and says why paging is refused."""

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_trainer.training.memory import paged_trial
from qlora_trainer.training.memory.paged_trial import has_concurrent_access, try_paging


def driver(monkeypatch: pytest.MonkeyPatch, answer: int, failing: str = "") -> list[Any]:
    """Put a driver of one card in the place of libcuda.so.1; return what it is asked."""
    asked: list[Any] = []

    def ended(name: str) -> int:
        return 100 if name == failing else 0

    def get_device(device: Any, index: int) -> int:
        asked.append(index)
        device._obj.value = 7
        return ended("cuDeviceGet")

    def get_attribute(value: Any, attribute: int, device: ctypes.c_int) -> int:
        asked.append((attribute, device.value))
        value._obj.value = answer
        return ended("cuDeviceGetAttribute")

    library = SimpleNamespace(
        cuInit=lambda flags: ended("cuInit"), cuDeviceGet=get_device, cuDeviceGetAttribute=get_attribute
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library if name == "libcuda.so.1" else None)
    return asked


@pytest.mark.parametrize(("answer", "expected"), [(1, True), (0, False)])
def test_the_driver_is_asked_for_the_device_and_believed(
    monkeypatch: pytest.MonkeyPatch, answer: int, expected: bool
) -> None:
    asked = driver(monkeypatch, answer)
    assert has_concurrent_access(3) is expected
    assert asked == [3, (89, 7)]  # CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS = 89, of NVIDIA's cuda.h


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGet", "cuDeviceGetAttribute"])
def test_a_driver_that_cannot_answer_leaves_it_to_the_trial(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    driver(monkeypatch, 0, failing)
    assert has_concurrent_access(0)


def test_without_a_driver_the_trial_itself_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert has_concurrent_access(0)


def test_a_card_without_concurrent_access_ends_the_trial_before_anything_is_paged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged_trial, "has_concurrent_access", lambda index: False)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # an import would fail
    with pytest.raises(SystemExit, match="the card's concurrentManagedAccess is 0"):
        try_paging(0)
