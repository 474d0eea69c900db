"""Every operation of the register is a torch op as torch asks, and the register tells what computes it and why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_kernels import registry
from qlora_kernels.nf4 import quantize_nf4
from qlora_kernels.registry import NAMESPACE, UnavailableError, implementations


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nf4_tables() -> list[Tensor]:
    weight = quantize_nf4(normal(6, 64))
    return [weight.packed, weight.absmax, weight.nested_absmax, weight.nested_code, weight.offset]


def attention() -> list[Any]:
    query, key = normal(1, 4, 9, 8), normal(1, 2, 9, 8, seed=1)
    return [query, key, normal(1, 2, 9, 8, seed=2), torch.tensor(7), 0.3, 5, 2.0, 0.25]


# By operation, arguments as its callers pass them. A new operation needs a sample here.
SAMPLES: dict[str, Callable[[], list[Any]]] = {
    "blockwise_attention": attention,
    "blockwise_attention_backward": lambda: [normal(1, 9, 4, 8, seed=3), *attention()],
    "copy_to_host": lambda: [normal(3, 5)],
    "dequantize_nf4": lambda: [*nf4_tables(), 65, 64, 256, torch.empty(88, dtype=torch.float16)],
    "gated_gradients": lambda: [normal(3, 5), normal(3, 5, seed=1), normal(3, 5, seed=2), "gelu_tanh"],
    "gated_product": lambda: [normal(3, 10)[:, :5], normal(3, 5, seed=1), "silu"],
    "keep_mask": lambda: [normal(3, 5), 7, 0.25, torch.tensor(11)],
    "label_rows": lambda: [torch.tensor([4, 5, 6])],  # a label on every row: else a fake one has more
    "nf4_matmul_few": lambda: [normal(3, 64), *nf4_tables(), normal(6), torch.zeros(200), 6, 64, 256],
    "rms_norm": lambda: [normal(3, 5), normal(5, seed=1), 1e-5, "scale_after_cast"],
    "rms_norm_backward": lambda: [normal(3, 5), normal(3, 5), normal(3, 1).exp(), normal(5), "scale_before_cast"],
    "rotate": lambda: [normal(2, 5, 3, 8).transpose(1, 2), normal(1, 5, 8), normal(1, 5, 8, seed=1), True],
    "quantize_nf4": lambda: [normal(130), torch.empty(65, dtype=torch.uint8), torch.empty(3)],
}


def test_every_operation_has_a_sample() -> None:
    assert sorted(SAMPLES) == sorted(implementations("cpu")) == sorted(implementations("cuda"))


def operation(name: str) -> Any:
    implementations("cpu")  # knows all
    return getattr(getattr(torch.ops, NAMESPACE), name)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_operation_is_registered_as_torch_asks(name: str) -> None:
    """Schema against what it changes and shares, fake results against real ones, and tracing with changing shapes."""
    torch.library.opcheck(operation(name).default, tuple(SAMPLES[name]()))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_reference_gives_what_the_cpu_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[list[Tensor], Any]:
        torch.manual_seed(0)
        arguments = SAMPLES[name]()
        result = operation(name)(*arguments)
        return [argument for argument in arguments if isinstance(argument, Tensor)], result

    monkeypatch.setenv("QLORA_KERNELS", "auto")
    found = run()
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    torch.testing.assert_close(found, run(), rtol=0, atol=0)


def test_register_says_why_an_operation_is_not_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> Callable[..., None]:
        raise UnavailableError("no compiler: install one")

    monkeypatch.setattr(
        registry,
        "_OPS",
        {
            "plain": registry.Op("plain", torch.neg, {}),
            "made": registry.Op("made", torch.neg, {"cpu": lambda: torch.abs}),
            "missing": registry.Op("missing", torch.neg, {"cpu": unavailable}),
        },
    )
    monkeypatch.setenv("QLORA_KERNELS", "auto")
    assert implementations("cpu") == {
        "plain": "reference: plain torch is the only version",
        "made": "fast",
        "missing": "reference: no compiler: install one",
    }
    assert set(implementations("cuda").values()) == {"reference: plain torch is the only version"}
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    assert set(implementations("cpu").values()) == {"reference: QLORA_KERNELS=reference"}


def test_what_was_asked_to_be_fast_and_cannot_be_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> Callable[..., None]:
        raise UnavailableError("no compiler: install one")

    monkeypatch.setenv("QLORA_KERNELS", "fast")
    with pytest.raises(UnavailableError, match=r"missing has no fast version here: no compiler"):
        registry.Op("missing", torch.neg, {"cpu": unavailable}).run("cpu", torch.ones(1))
