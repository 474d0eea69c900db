"""Attention over packed documents: the dense mask's values, no leak between documents, no mask over all tokens."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from packed_heads import BOUNDS, TOKENS, heads, three
from random_tensors import normal64
from spying import TensorSizes
from torch import Tensor

from qlora_kernels import blockwise_attention
from qlora_kernels.card import Card
from qlora_kernels.varlen_attention import varlen_attention


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The definition, token by token in one (T, T) mask."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    document = torch.cat([torch.full((stop - start,), n) for n, (start, stop) in enumerate(pairwise(bounds))])
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])[None]
    seen = (document[:, None] == document[None]) & (j <= i)
    if window is not None:
        seen &= j > i - window
    scores = (query @ key.mT) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 5},
    {"window": 19},
    {"window": 20},
    {"window": 1000},
    {"softcap": 0.7},
    {"softcap": 2.0, "window": 5},
]


@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("options", OPTIONS)
def test_output_and_gradients_are_those_of_the_dense_mask(
    options: dict[str, Any], query_heads: int, key_heads: int
) -> None:
    ours = three(tensor.requires_grad_() for tensor in heads(query_heads, key_heads))
    theirs = three(tensor.detach().clone().requires_grad_() for tensor in ours)
    output = varlen_attention(*ours, BOUNDS, scale=0.3, **options)
    wanted = dense_attention(*theirs, BOUNDS, scale=0.3, **options)
    grad = normal64(1, TOKENS, query_heads, 16, seed=9)
    output.backward(grad)
    wanted.backward(grad)
    assert output.shape == (1, TOKENS, query_heads, 16)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-13)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("head_dim", [1, 37, 40, 80, 96])
def test_head_sizes_need_not_be_powers_of_two(head_dim: int) -> None:
    tensors = heads(head_dim=head_dim)
    output = varlen_attention(*tensors, BOUNDS, scale=head_dim**-0.5)
    wanted = dense_attention(*tensors, BOUNDS, scale=head_dim**-0.5)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}])
def test_lower_precision_errs_little_more_than_the_dense_mask(options: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = heads(dtype=dtype)
    exact = dense_attention(*three(tensor.double() for tensor in tensors), BOUNDS, scale=0.25, **options)
    dense = dense_attention(*tensors, BOUNDS, scale=0.25, **options)
    output = varlen_attention(*tensors, BOUNDS, scale=0.25, **options)
    assert output.dtype == dtype
    assert (output - exact).norm() <= 1.2 * (dense - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_soft_cap_and_softmax_are_taken_in_fp32(dtype: torch.dtype) -> None:
    tensors = heads(dtype=dtype)
    options: dict[str, Any] = {"scale": 2.0, "softcap": 30.0}  # scores large enough for rounding to show
    exact = dense_attention(*three(tensor.double() for tensor in tensors), BOUNDS, **options)
    all_in_dtype = dense_attention(*tensors, BOUNDS, **options)
    output = varlen_attention(*tensors, BOUNDS, **options)
    assert (output - exact).norm() <= 0.75 * (all_in_dtype - exact).norm()


@pytest.mark.parametrize("options", OPTIONS)
def test_changing_one_document_changes_no_bit_of_another(options: dict[str, Any]) -> None:
    def outputs_and_gradients(tensors: Iterable[Tensor]) -> list[Tensor]:
        leaves = three(tensor.clone().requires_grad_() for tensor in tensors)
        output = varlen_attention(*leaves, BOUNDS, scale=0.3, **options)
        output.square().sum().backward()
        return [output.transpose(1, 2).detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    tensors = heads(dtype=torch.float32)
    changed = tuple(tensor.clone() for tensor in tensors)
    for tensor in changed:
        tensor[:, :, 1:8] = 1e3 * tensor[:, :, 1:8].flip(-1)  # document 2
    others = [*range(1), *range(8, TOKENS)]
    for before, after in zip(outputs_and_gradients(tensors), outputs_and_gradients(changed), strict=True):
        assert torch.equal(before[:, :, others], after[:, :, others])
        # A token that sees itself alone gives its query and key no gradient: there is nothing to change.
        assert not torch.equal(before, after) or options.get("window") == 1


def test_bounds_may_be_a_tensor_or_a_list() -> None:
    tensors = heads()
    from_list = varlen_attention(*tensors, BOUNDS, scale=0.3)
    assert torch.equal(from_list, varlen_attention(*tensors, torch.tensor(BOUNDS, dtype=torch.int32), scale=0.3))
    with pytest.raises(AssertionError, match="cu_seqlens"):
        varlen_attention(*tensors, BOUNDS[:-1], scale=0.3)
    with pytest.raises(AssertionError, match="cu_seqlens"):
        varlen_attention(*tensors, [0, 5, 5, TOKENS], scale=0.3)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_drops_weights_and_keeps_the_mean(softcap: float | None) -> None:
    tensors = heads(head_dim=4, dtype=torch.float32)
    kept = varlen_attention(*tensors, BOUNDS, scale=0.3, softcap=softcap).view(TOKENS, -1)
    torch.manual_seed(0)
    many = three(tensor.repeat(1, 1600, 1, 1) for tensor in tensors)  # the same heads, each time dropped otherwise
    runs = varlen_attention(*many, BOUNDS, scale=0.3, softcap=softcap, dropout=0.2).view(TOKENS, 1600, -1)
    assert not torch.equal(runs[:, 0], runs[:, 1])
    assert (runs.mean(1) - kept).norm() < 0.03 * kept.norm()  # noise: 0.5 / sqrt(1600) where one weight is all


@pytest.mark.parametrize("options", [{}, {"window": 8}, {"softcap": 3.0}, {"dropout": 0.1}])
def test_no_tensor_is_of_the_size_tokens_by_tokens(options: dict[str, Any]) -> None:
    tokens, bounds = 1024, list(range(0, 1025, 32))
    query, key, value = (normal64(1, 2, tokens, 8, seed=seed).requires_grad_() for seed in range(3))
    with TensorSizes() as made:
        varlen_attention(query, key, value, bounds, scale=0.3, **options).sum().backward()
    assert max(made.sizes) == query.numel()


@pytest.mark.parametrize(
    "options", [{}, {"window": 16}, {"softcap": 3.0}, {"softcap": 3.0, "window": 16}, {"dropout": 0.1}]
)
def test_one_long_document_makes_no_matrix_of_its_tokens_either(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the op does inside is seen where its functions are called in its place.
    monkeypatch.setattr(torch.ops.qlora_kernels, "blockwise_attention", blockwise_attention._attend)
    monkeypatch.setattr(torch.ops.qlora_kernels, "blockwise_attention_backward", blockwise_attention._backward)
    tensors = three(normal64(1, 2, 1024, 8, seed=seed).requires_grad_() for seed in range(3))
    with TensorSizes() as made:
        varlen_attention(*tensors, [0, 1024], scale=0.3, **options).sum().backward()
    assert max(made.sizes) <= 2 * 1024 * 128, "a block of 128 queries with all they see, of both heads"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 1000}, {"softcap": 2.0}])
def test_cuda_errs_little_more_than_the_dense_mask(
    options: dict[str, Any], head_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    scale = head_dim**-0.5
    leaves = three(tensor.to("cuda", dtype).requires_grad_() for tensor in heads(head_dim=head_dim))
    exact_leaves = three(leaf.detach().cpu().double().requires_grad_() for leaf in leaves)
    dense_leaves = three(leaf.detach().cpu().requires_grad_() for leaf in leaves)
    if "softcap" not in options and torch.cuda.get_device_capability() >= (8, 0):
        assert Card.of(leaves[0].device).flash_refusal(dtype, head_dim) is None, "flash should be taken here"
    output = varlen_attention(*leaves, BOUNDS, scale=scale, **options)
    exact = dense_attention(*exact_leaves, BOUNDS, scale=scale, **options)
    dense = dense_attention(*dense_leaves, BOUNDS, scale=scale, **options)
    grad = normal64(1, TOKENS, 4, head_dim, seed=9)
    output.backward(grad.to(output))
    exact.backward(grad)
    dense.backward(grad.to(dtype))
    assert (output.cpu() - exact).norm() <= 1.5 * (dense - exact).norm()
    for leaf, exact_leaf, dense_leaf in zip(leaves, exact_leaves, dense_leaves, strict=True):
        assert leaf.grad is not None
        assert exact_leaf.grad is not None
        assert dense_leaf.grad is not None
        error, dense_error = (leaf.grad.cpu() - exact_leaf.grad).norm(), (dense_leaf.grad - exact_leaf.grad).norm()
        assert error <= 2 * dense_error
