"""A prefix before each packed document: what is in which place, the dense mask's values, and gradients."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from packed_heads import BOUNDS, TOKENS, heads
from random_tensors import normal64
from torch import Tensor

from qlora_kernels.prefix_layout import outputs_of_tokens, prefix_layout, queries_in_places, with_prefixes
from qlora_kernels.varlen_attention import varlen_attention

CPU = torch.device("cpu")


def attention(
    tensors: list[Tensor], bounds: list[int], **settings: Any
) -> Tensor:  # of query, key, value, prefix of keys, prefix of values
    query, key, value, prefix_key, prefix_value = tensors
    layout = prefix_layout(prefix_key.shape[1], bounds, CPU)
    output = varlen_attention(
        queries_in_places(query, layout),
        with_prefixes(prefix_key, key, layout),
        with_prefixes(prefix_value, value, layout),
        layout.bounds,
        scale=0.3,
        **settings,
    )
    return outputs_of_tokens(output, layout)


def dense(tensors: list[Tensor], bounds: list[int], window: int | None = None, softcap: float | None = None) -> Tensor:
    """The definition, document by document: token i is at position P + i, and a prefix at 0 to P - 1."""
    query, key, value, *prefixes = tensors
    count, group = prefixes[0].shape[1], query.shape[1] // key.shape[1]
    outputs = []
    for start, stop in pairwise(bounds):
        keys, values = (
            torch.cat([before[None], tokens[:, :, start:stop]], dim=2).repeat_interleave(group, 1)
            for before, tokens in zip(prefixes, (key, value), strict=True)
        )
        scores = 0.3 * query[:, :, start:stop] @ keys.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        age = count + torch.arange(stop - start)[:, None] - torch.arange(count + stop - start)
        unseen = (age < 0) | (age >= (window or age.numel()))
        outputs.append(scores.masked_fill(unseen, float("-inf")).softmax(-1) @ values)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def inputs(prefix: int = 3, query_heads: int = 4, key_heads: int = 2) -> list[Tensor]:
    prefixes = [normal64(key_heads, prefix, 16, seed=seed) for seed in (5, 6)]
    return [*heads(query_heads, key_heads), *prefixes]


def test_each_document_begins_with_the_prefix() -> None:
    layout = prefix_layout(2, [0, 3, 4], CPU)
    assert layout.bounds == layout.bounds_on_device.tolist() == [0, 5, 8]
    assert layout.bounds_on_device.dtype == torch.int32
    assert layout.prefixes.tolist() == [0, 1, 5, 6]
    assert layout.tokens.tolist() == [2, 3, 4, 7]
    assert layout.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 5], "of [prefix, tokens]"
    assert layout.queries.tolist() == [0, 0, 0, 1, 2, 3, 3, 3], "the first token's in the prefix's places"
    known = prefix_layout(2, [0, 3, 4], CPU, torch.tensor([0, 3, 4], dtype=torch.int32))
    assert known.bounds == layout.bounds
    assert torch.equal(known.keys, layout.keys)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 22}, {"softcap": 0.7, "window": 4}], ids=str)
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 2), (3, 1), (4, 4)])
def test_output_and_gradients_are_those_of_the_dense_mask(
    options: dict[str, Any], query_heads: int, key_heads: int
) -> None:
    ours = [tensor.requires_grad_() for tensor in inputs(query_heads=query_heads, key_heads=key_heads)]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    output, wanted = attention(ours, BOUNDS, **options), dense(theirs, BOUNDS, **options)
    grad = normal64(1, TOKENS, query_heads, 16, seed=9)
    output.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-13)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-12)


def test_the_gradient_of_everything_is_right_in_fp64() -> None:
    tensors = [normal64(1, 2, 5, 4, seed=seed).requires_grad_() for seed in range(3)]
    prefixes = [normal64(2, 2, 4, seed=seed).requires_grad_() for seed in (3, 4)]
    assert torch.autograd.gradcheck(lambda *given: attention([*given], [0, 2, 5]), (*tensors, *prefixes))


def test_the_prefixs_gradient_is_summed_over_documents_in_fp32() -> None:
    """A sum in bf16 of 257 ones is 256."""
    count = 257
    layout = prefix_layout(1, list(range(count + 1)), CPU)
    prefix = torch.zeros(1, 1, 1, requires_grad=True)
    tokens = torch.zeros(1, 1, count, 1, dtype=torch.bfloat16)
    laid_out = with_prefixes(prefix, tokens, layout)
    assert laid_out.dtype == torch.bfloat16
    laid_out.backward(torch.ones_like(laid_out))
    assert prefix.grad is not None
    assert prefix.grad.item() == count


def test_what_attention_gives_in_the_prefixs_places_has_no_gradient() -> None:
    layout = prefix_layout(2, [0, 3, 4], CPU)
    output = torch.zeros(1, 8, 1, 1, requires_grad=True)
    outputs_of_tokens(output, layout).backward(torch.ones(1, 4, 1, 1))
    assert output.grad is not None
    assert output.grad.flatten().tolist() == [0, 0, 1, 1, 1, 0, 0, 1]
