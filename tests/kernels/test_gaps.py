"""Products read past their rows on some processors: what lies there, after a row of a view, is finite in ours.

On a processor with AMX, oneDNN multiplies 16-bit numbers in pairs: of a row that has an odd length it reads the one
after it, and multiplies that by zero, which is NaN where the bits there are infinite or NaN. So each operand that is a
view with a gap after each row is looked at here, on any processor, with all memory that nobody wrote filled with NaN.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from random_tensors import normal
from torch import Tensor

from qlora_kernels import blockwise_attention as blockwise
from qlora_kernels.adapter import Adapter
from qlora_kernels.dropout import draw_seed
from qlora_kernels.head_rows import DenseRows, head_logits
from qlora_kernels.linear_cross_entropy import linear_cross_entropy
from qlora_kernels.lora_linear import nf4_linear
from qlora_kernels.nf4 import quantize_nf4
from qlora_kernels.torch_internals import TorchDispatchMode

LOOKED_AT = 64  # columns of a gap
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "product")


def gap(operand: Tensor) -> Tensor:
    """What lies after each row but the last of a matrix, (M - 1, columns); empty for one without gaps."""
    matrix = operand if operand.dim() == 2 else operand[0]
    matrix = matrix if matrix.stride(1) == 1 else matrix.T
    rows, width, step = len(matrix), matrix.shape[1], matrix.stride(0)
    columns = min(step - width, LOOKED_AT) if matrix.stride(1) == 1 else 0
    if rows < 2 or columns <= 0:
        return operand.new_empty(0)
    return operand.as_strided((rows - 1, columns), (step, 1), matrix.storage_offset() + width)


class Gaps(TorchDispatchMode):
    """Counts the operands with gaps, and refuses one in whose gap there is a number that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.with_gaps = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.overloadpacket.__name__ in PRODUCTS:
            for operand in arguments:
                if isinstance(operand, Tensor) and operand.dim() > 1 and operand.dtype.itemsize == 2:
                    self.with_gaps += len(gap(operand)) > 0
                    assert torch.isfinite(gap(operand)).all(), f"{function} reads what is no number"
        return function(*arguments, **(options or {}))


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """With memory that nobody wrote full of NaN, and operations as they are, so that each product is seen."""
    torch.use_deterministic_algorithms(True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def losses(dtype: torch.dtype) -> None:
    matrix = normal(1001, 64, dtype=dtype)
    for head in (DenseRows(matrix), DenseRows(matrix.float())):  # taken whole, and in blocks
        hidden = normal(65, 64, dtype=dtype).requires_grad_()
        linear_cross_entropy(hidden, head, torch.arange(65) % 7).backward()
        head_logits(hidden, head).sum().backward()


def layer(dtype: torch.dtype) -> None:
    """Its weight in blocks of 64 rows, its gradient a part of a larger one, as of joint projections."""
    weight = replace(quantize_nf4(normal(193, 64)), workspace=torch.empty(64 * 64, dtype=dtype))
    x = normal(65, 64, dtype=dtype).requires_grad_()
    adapter = Adapter(normal(3, 64).requires_grad_(), normal(193, 3).requires_grad_(), 2.0, 0.1, draw_seed())
    nf4_linear(x, weight, normal(193), adapter).backward(normal(65, 400, seed=1, dtype=dtype)[:, :193])


def attention(dtype: torch.dtype) -> None:
    joint = normal(1, 65, 3, 4, 32, dtype=dtype).requires_grad_()
    query, key, value = (joint[:, :, part].transpose(1, 2) for part in range(3))
    output = blockwise.blockwise_attention(query, key, value, scale=0.2, softcap=5.0, window=21, dropout=0.1)
    output.backward(normal(*output.shape, seed=1, dtype=dtype))


@pytest.mark.parametrize("run", [losses, layer, attention])
def test_no_product_of_16_bits_has_other_than_numbers_after_its_rows(
    run: Callable[[torch.dtype], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, within in {"": blockwise._attend, "_backward": blockwise._backward}.items():  # an operation hides its own
        monkeypatch.setattr(torch.ops.qlora_kernels, f"blockwise_attention{name}", within)
    with Gaps() as seen:
        run(dtype)
    assert seen.with_gaps, "there are views with gaps among the operands"
