"""Every operation of the register is a torch op as torch asks, and gives on a GPU what its reference gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_tensors import normal
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qlora_kernels.nf4 import quantize_nf4
from qlora_kernels.registry import NAMESPACE, implementations


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
    "linear": lambda: [normal(9, 5), normal(5, 7, seed=1).T, normal(7, seed=2)],
    "label_rows": lambda: [torch.tensor([4, 5, 6])],  # a label on every row: else a fake one has more
    "nf4_matmul_few": lambda: [normal(3, 64), *nf4_tables(), normal(6), torch.zeros(200), 6, 64, 256],
    "product": lambda: [normal(9, 5), normal(7, 5, seed=1).T],
    "rms_norm": lambda: [normal(2, 3, 5), normal(5, seed=1), 1e-5, "scale_after_cast"],
    "rms_norm_backward": lambda: [*(2 * [normal(2, 3, 5)]), normal(6, 1).exp(), normal(5), "scale_before_cast"],
    "rotate": lambda: [normal(2, 5, 3, 8).transpose(1, 2), normal(1, 5, 8), normal(1, 5, 8, seed=1), True],
    "softmax_loss": lambda: [normal(3, 70), torch.tensor([[0], [69], [5]]), normal(70, seed=1), 2.0, 0.5, True],
    "uniform_noise": lambda: [normal(3, 5), torch.tensor(11)],
    "quantize_nf4": lambda: [normal(130), torch.empty(65, dtype=torch.uint8), torch.empty(3)],
}


WORKSPACE_OF_FEW = 7  # the place of nf4_matmul_few's workspace


def test_every_operation_has_a_sample() -> None:
    for device_type in ("cpu", "cuda"):
        known = implementations(device_type)
        assert sorted(SAMPLES) == [name for name in sorted(known) if not name.endswith("_for_test")]


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
    tolerance = 1e-6 if name in ("linear", "product") else 0.0  # its sums may be in another order
    torch.testing.assert_close(found, run(), rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_operation_on_cuda_gives_what_its_reference_gives(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the rounding of the dtype, of each result's largest value: sums in another order lose other last bits."""

    def on_cuda(argument: Any) -> Any:
        if not isinstance(argument, Tensor) or (argument.ndim == 0 and not argument.is_floating_point()):
            return argument  # a seed, which lives on the CPU
        # What stays fp32 whatever is computed in: scales and tables, one number a row.
        stays = name in ("dequantize_nf4", "quantize_nf4") or argument.shape in [(256,), (1,), (), (3, 1)]
        return argument.cuda() if stays or not argument.is_floating_point() else argument.to("cuda", dtype)

    def run() -> list[Tensor]:
        arguments = [on_cuda(argument) for argument in SAMPLES[name]()]
        result = operation(name)(*arguments)
        torch.cuda.synchronize()  # a copy to the host has begun, not ended, when it returns
        if name == "nf4_matmul_few":
            arguments[WORKSPACE_OF_FEW] = None  # which a fast version needs not, and the reference overwrites
        return [tensor for tensor in (*arguments, *tree_leaves(result)) if isinstance(tensor, Tensor)]

    monkeypatch.setenv("QLORA_KERNELS", "auto")
    found = run()
    version = implementations("cuda")[name]
    assert version in ("fast", "reference: plain torch is the only version"), version
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    for one, other in zip(found, run(), strict=True):
        largest = float(other.abs().max()) if other.is_floating_point() and other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0.0, atol=8 * torch.finfo(dtype).eps * largest)
