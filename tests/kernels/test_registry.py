"""The register of operations: the fast version where there is one, the reference where not, and why."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_kernels import registry
from qlora_kernels.registry import UnavailableError, define, implementations, kernel_choice, other_versions
from qlora_kernels.torch_internals import FakeTensorMode


@pytest.fixture(scope="module")
def doubling() -> dict[str, Any]:
    """An op with a reference and a CPU version that can be distinguished, and whether the latter can be had."""
    state: dict[str, Any] = {"available": True, "made": 0}

    def make() -> Callable[..., Tensor]:
        state["made"] += 1
        if not state["available"]:
            raise UnavailableError("no compiler")
        return lambda x: x * 2 + 1000

    define("double_for_test(Tensor x) -> Tensor", lambda x: x * 2, torch.empty_like, cpu=make)
    return state


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, doubling: dict[str, Any]) -> Iterator[None]:
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    doubling.update(available=True, made=0)
    with other_versions("cpu", {"double_for_test": None}):
        yield


def double(value: float) -> float:
    return float(torch.ops.qlora_kernels.double_for_test(torch.tensor(value)))


def test_the_fast_version_is_made_once_and_taken(doubling: dict[str, Any]) -> None:
    assert double(1.0) == double(1.0) == 1002.0
    assert doubling["made"] == 1
    assert implementations("cpu")["double_for_test"] == "fast"


def test_reference_is_taken_where_asked_for(monkeypatch: pytest.MonkeyPatch, doubling: dict[str, Any]) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    assert double(1.0) == 2.0
    assert doubling["made"] == 0
    assert implementations("cpu")["double_for_test"] == "reference: QLORA_KERNELS=reference"


def test_reference_is_taken_where_the_fast_version_cannot_be_had(doubling: dict[str, Any]) -> None:
    doubling["available"] = False
    assert double(1.0) == double(1.0) == 2.0
    assert doubling["made"] == 1, "what failed once is not tried at every call"
    assert implementations("cpu")["double_for_test"] == "reference: no compiler"
    assert implementations("cuda")["double_for_test"] == "reference: plain torch is the only version"


def test_fast_asked_for_and_not_to_be_had_is_an_error(
    monkeypatch: pytest.MonkeyPatch, doubling: dict[str, Any]
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "fast")
    assert double(1.0) == 1002.0
    doubling["available"] = False
    refused = pytest.raises(UnavailableError, match="double_for_test has no fast version here: no compiler")
    with other_versions("cpu", {"double_for_test": None}), refused:
        double(1.0)


def test_other_versions_are_taken_within_their_block_alone(doubling: dict[str, Any]) -> None:
    assert double(1.0) == 1002.0
    with other_versions("cpu", {"double_for_test": lambda x: x * 3}):
        assert double(1.0) == 3.0
        with other_versions("cpu", {"double_for_test": None}):
            assert double(1.0) == 1002.0
        assert double(1.0) == 3.0
    assert double(1.0) == 1002.0
    assert doubling["made"] == 2, "what was made before the block is kept"


def test_a_fake_tensor_meets_neither_version(doubling: dict[str, Any]) -> None:
    with FakeTensorMode():
        assert torch.ops.qlora_kernels.double_for_test(torch.ones(3)).shape == (3,)
    assert doubling["made"] == 0


def test_a_wrong_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_choice() == "auto"
    monkeypatch.setenv("QLORA_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"QLORA_KERNELS is 'cuda'; it can be auto, reference, fast"):
        kernel_choice()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "Triton is not installed: pip install triton"),
        (
            ImportError("libcuda.so.1: cannot open shared object file"),
            r"gated_triton cannot be imported: libcuda\.so\.1",
        ),
    ],
)
def test_why_a_triton_kernel_cannot_be_had_is_reported_as_it_is(
    error: ImportError, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise error

    monkeypatch.setattr(registry.importlib, "import_module", refuse)
    with pytest.raises(UnavailableError, match=reason):
        registry.from_triton("gated_triton", "product_triton")()
