"""Attention over documents on a CPU: torch's own values bit for bit, with one output kept, and the same in a plan."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from packed_heads import three
from random_tensors import normal
from spying import Operations, noting, unchanged
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qlora_kernels.cpu_attention import attend_to_documents, takes_documents
from qlora_kernels.saved_tensors import KeptBy
from qlora_kernels.side_by_side import run_at_once
from qlora_kernels.torch_internals import FakeTensorMode, cpu_flash_attention
from qlora_kernels.varlen_attention import varlen_attention
from qlora_trainer.planning.live_bytes import LiveBytes
from qlora_trainer.training.memory.recompute import Recomputation

SCALE = 0.3
DOCUMENTS = [[0, 37], [0, 1, 40, 41, 640], [0, 600, 1300]]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(tokens: int, query_heads: int = 6, key_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """As projections give them, heads after tokens in memory; and the output's gradient."""
    counts = (query_heads, key_heads, key_heads)
    laid_out = [normal(1, tokens, count, 16, seed=seed, dtype=dtype) for seed, count in enumerate(counts)]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in laid_out]


def by_torch(query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int]) -> Tensor:
    """A call of torch's attention for each document, and all outputs next to each other."""
    lengths = [stop - start for start, stop in pairwise(bounds)]
    attend = partial(F.scaled_dot_product_attention, is_causal=True, scale=SCALE, enable_gqa=True)
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([attend(*part).transpose(1, 2) for part in parts], dim=1)


def output_and_gradients(attention: Attention, inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = three(tensor.detach().clone().requires_grad_() for tensor in inputs)
    output = attention(*leaves)
    grad = normal(*output.shape, seed=9, dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bounds", DOCUMENTS, ids=len)
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_output_and_gradients_are_torchs_to_the_last_bit(
    bounds: list[int], query_heads: int, key_heads: int, dtype: torch.dtype
) -> None:
    inputs = heads(bounds[-1], query_heads, key_heads, dtype)
    found = output_and_gradients(partial(varlen_attention, cu_seqlens=bounds, scale=SCALE), inputs)
    assert_equal(found, output_and_gradients(partial(by_torch, bounds=bounds), inputs))


@pytest.mark.parametrize("window", [20, 21])
def test_a_window_that_no_document_exceeds_is_no_window(window: int) -> None:
    bounds = [0, 20, 25]
    with Operations() as seen:
        output = varlen_attention(*three(heads(25)), bounds, scale=SCALE, window=window)
    assert seen.seen.count(cpu_flash_attention()) == 2
    assert "aten::cat" not in seen.names
    assert torch.equal(output, by_torch(*three(heads(25)), bounds))


def test_the_kernel_is_not_called_where_torch_would_not() -> None:
    query, key, value = heads(25)
    assert takes_documents(query, key, value)
    assert not takes_documents(query, key, value[..., :8])
    assert not takes_documents(query[..., ::2], key[..., ::2], value[..., ::2])
    with Operations() as seen:
        varlen_attention(query, key, value[..., :8].contiguous(), [0, 20, 25], scale=SCALE)
    assert cpu_flash_attention() not in seen.seen


@pytest.mark.parametrize("bounds", DOCUMENTS, ids=len)
def test_the_output_is_kept_once_for_attention_and_the_layer_after_it(bounds: list[int]) -> None:
    inputs, kept = three(heads(bounds[-1])), list[Tensor]()
    weight = normal(96, 96, seed=5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        F.linear(varlen_attention(*inputs, bounds, scale=SCALE).flatten(2), weight)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for tensor in (*inputs, weight):
        assert storages.pop(tensor.untyped_storage().data_ptr())
    tokens, query_heads = bounds[-1], 6
    assert sorted(storages.values()) == [4 * tokens * query_heads, 4 * tokens * query_heads * 16]


def test_without_gradients_nothing_is_kept() -> None:
    leaves, kept = three(heads(25)), list[object]()
    noted = noting(unchanged, kept.append)
    with torch.autograd.graph.saved_tensors_hooks(noted, unchanged), KeptBy(noted, unchanged):
        varlen_attention(*three(leaf.detach() for leaf in leaves), [0, 20, 25], scale=SCALE)
        with torch.no_grad():
            assert not varlen_attention(*leaves, [0, 20, 25], scale=SCALE).requires_grad
    assert kept == []


def test_what_is_written_to_the_output_is_found_in_backward() -> None:
    output = varlen_attention(*three(heads(25)), [0, 20, 25], scale=SCALE)
    output.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        output.sum().backward()


@pytest.mark.parametrize("again", [lambda run, x: checkpoint(run, x, use_reentrant=False), None])
def test_recomputing_changes_no_bit(again: Callable[..., Tensor] | None) -> None:
    """By torch's way and by ours."""
    bounds, inputs = DOCUMENTS[1], heads(DOCUMENTS[1][-1])

    def run(query: Tensor) -> Tensor:
        return varlen_attention(query.sin(), inputs[1], inputs[2], bounds, scale=SCALE).cos()

    def recomputed(query: Tensor) -> Tensor:
        return again(run, query) if again else Recomputation(run, query).run(query)

    found = []
    for function in (run, recomputed):
        query = inputs[0].detach().clone().requires_grad_()
        output = function(query)
        found.append([output.detach(), *torch.autograd.grad(output.sum(), [query, *inputs[1:]])])
    assert_equal(*found)


def test_two_threads_at_once_give_what_each_gives_alone() -> None:
    barrier = threading.Barrier(2)
    packs = [(bounds, heads(bounds[-1])) for bounds in DOCUMENTS[1:]]

    def run(bounds: list[int], inputs: list[Tensor], waits: bool = True) -> list[Tensor]:
        if waits:
            barrier.wait()
        return output_and_gradients(partial(varlen_attention, cu_seqlens=bounds, scale=SCALE), inputs)

    alone = [run(bounds, inputs, waits=False) for bounds, inputs in packs]
    for found, expected in zip(run_at_once([partial(run, *pack) for pack in packs]), alone, strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("bounds", DOCUMENTS, ids=len)
def test_besides_inputs_and_results_one_documents_results_are_there(bounds: list[int]) -> None:
    """On tensors with memory and on those of a plan; of a document alone, the results are the kernel's own."""

    def step() -> tuple[int, int]:
        laid_out = [torch.ones(1, bounds[-1], count, 16) for count in (6, 2, 2)]
        leaves = three(tensor.transpose(1, 2).requires_grad_() for tensor in laid_out)
        grad = torch.ones(1, bounds[-1], 6, 16)
        with LiveBytes() as live:
            live.watch([*laid_out, grad], "before")
            lengths = [stop - start for start, stop in pairwise(bounds)]
            output = attend_to_documents(*leaves, lengths, SCALE)
            forward = live.peak.bytes
            torch.autograd.grad(output, leaves, grad)
        return forward, live.peak.bytes

    tokens, longest = bounds[-1], max(stop - start for start, stop in pairwise(bounds))
    of_one = 0 if len(bounds) == 2 else longest
    inputs = tokens * (6 + 2 + 2 + 6) * 16  # with the output's gradient
    results = 6 * 16 + 6  # a token's output and number
    expected = (
        4 * (inputs + (tokens + of_one) * results),
        4 * (inputs + tokens * results + (tokens + of_one) * (6 + 2 + 2) * 16),
    )
    assert step() == expected
    with FakeTensorMode():
        assert step() == expected
