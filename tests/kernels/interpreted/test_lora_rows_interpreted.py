"""The kernels of LoRA by segments of rows, interpreted: they err little more against fp64 than plain torch does."""

import pytest
import torch
from random_tensors import normal
from torch import Tensor
from triton_support import between_guards

from qlora_kernels.lora_rows import LoraStack, RowSegments, add_lora_rows_torch
from qlora_kernels.lora_rows_triton import IN_FEATURES_PER_PART, add_lora_rows_triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SLACK = {torch.float32: 3e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}
"""Relative: what is added is rounded once less by plain torch where it adds into the output, and sums differ in order.

A rounding of the output to 16 bits is a tenth of what one of the factors left out would change."""

# (adapter of each row, tokens of a row, in features, out features, ranks): one of each; several programs of each, none
# of them full; ranks of several turns; in features of several parts; an adapter without LoRA, and rows without any.
CASES = [
    ([0], 1, 1, 1, (1,)),
    ([0, 1, 0, -1], 1, 64, 129, (16, 3)),
    ([1, 1, 0], 13, 130, 70, (5, 40)),
    ([-1, 2, 0, 0], 7, IN_FEATURES_PER_PART + 65, 40, (8, 0, 17)),
]


def arguments(
    places: list[int], tokens: int, inputs: int, outputs: int, ranks: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, LoraStack, RowSegments]:
    total = sum(ranks)
    x, output = normal(len(places), tokens, inputs), normal(len(places), tokens, outputs, seed=1)
    A, B = normal(total, inputs, seed=2) / inputs**0.5, normal(total, outputs, seed=3)
    tensors = [between_guards(tensor.to(dtype)) for tensor in (output, x, A, B)]
    scalings = tuple(0.5 + place for place in range(len(ranks)))
    return tensors[0], tensors[1], LoraStack(tensors[2], tensors[3], ranks, scalings), RowSegments.of(places)


def added(function: object, output: Tensor, x: Tensor, stack: LoraStack, segments: RowSegments) -> Tensor:
    changed = between_guards(output)
    assert callable(function)
    function(changed, x, stack.A, stack.B, segments.rows, segments.adapters, stack.ranks, stack.scalings)
    return changed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_rows_have_the_outputs_of_their_adapters(
    case: tuple[list[int], int, int, int, tuple[int, ...]], dtype: torch.dtype
) -> None:
    output, x, stack, segments = arguments(*case, dtype)
    found = added(add_lora_rows_triton, output, x, stack, segments)
    plain = added(add_lora_rows_torch, output, x, stack, segments)
    wide = stack._replace(A=stack.A.double(), B=stack.B.double())
    exact = added(add_lora_rows_torch, output.double(), x.double(), wide, segments)
    error, allowed = ((value.double() - exact).norm() for value in (found, plain))
    assert error <= 1.1 * allowed + SLACK[dtype] * exact.norm()
    if dtype == torch.float32:
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    for row, place in enumerate(case[0]):
        if place < 0 or not case[4][place]:
            assert torch.equal(found[row], output[row]), "rows without LoRA are not written"


def test_nothing_around_the_output_is_written() -> None:
    *rest, stack, segments = arguments([0, 1], 3, 70, 33, (3, 18), torch.float32)
    buffer = torch.full((64 + rest[0].numel() + 64,), 7.0)
    inner = buffer[64:-64].view(rest[0].shape).copy_(rest[0])
    layout = (segments.rows, segments.adapters, stack.ranks, stack.scalings)
    add_lora_rows_triton(inner, rest[1], stack.A, stack.B, *layout)
    assert (buffer[:64] == 7.0).all()
    assert (buffer[-64:] == 7.0).all()


def test_inputs_that_are_not_contiguous_no_tokens_no_lora_and_fp64() -> None:
    output, x, stack, segments = arguments([0, -1], 4, 66, 20, (5,), torch.float32)
    apart = x.mT.contiguous().mT
    assert not apart.is_contiguous()
    whole = added(add_lora_rows_triton, output, x, stack, segments)
    assert torch.equal(added(add_lora_rows_triton, output, apart, stack, segments), whole)
    nothing = added(add_lora_rows_triton, output[:, :0], x[:, :0], stack, segments)
    assert nothing.shape == (2, 0, 20)
    assert torch.equal(added(add_lora_rows_triton, output, x, stack, RowSegments.of([-1, -1])), output)
    wide = stack._replace(A=stack.A.double(), B=stack.B.double())
    pair = [added(f, output.double(), x.double(), wide, segments) for f in (add_lora_rows_triton, add_lora_rows_torch)]
    assert torch.equal(*pair)
