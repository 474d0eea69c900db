"""Flash attention as one node computes attention over packed documents, and keeps what torch's function keeps."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from packed_heads import BOUNDS, TOKENS, heads, three
from random_tensors import normal64
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from qlora_kernels import flash_attention as module
from qlora_kernels import varlen_attention as caller
from qlora_kernels.card import Card
from qlora_kernels.flash_attention import flash_attention
from qlora_kernels.saved_tensors import KeptBy
from qlora_kernels.torch_internals import FakeTensorMode
from qlora_kernels.varlen_attention import varlen_attention

LONGEST = max(stop - start for start, stop in pairwise(BOUNDS))
RANDOM = torch.zeros(2, dtype=torch.uint64)  # as the state of a generator that nothing was drawn from


def forward_on_a_cpu(
    query: Tensor,  # (T, Hq, D)
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor, ...]:
    """The operation by its definition."""
    assert (cum_seq_q.tolist(), cum_seq_k.tolist(), max_q, max_k) == (BOUNDS, BOUNDS, LONGEST, LONGEST)
    assert (dropout_p, return_debug_mask, window_size_right) == (0.0, False, 0)
    assert is_causal == (window_size_left == -1)
    window = None if is_causal else window_size_left + 1
    batched = three(tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output = varlen_attention(*batched, BOUNDS, scale=scale, window=window)[0]
    return output, torch.zeros(query.shape[1], query.shape[0]), RANDOM, torch.empty(0), torch.empty(0)


def backward_on_a_cpu(
    grad_out: Tensor,  # (T, Hq, D)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    **sides: Any,
) -> tuple[Tensor, ...]:
    assert rng_state is RANDOM
    assert logsumexp.shape == (query.shape[1], query.shape[0])
    leaves = three(tensor.detach().requires_grad_() for tensor in (query, key, value))
    with torch.enable_grad():
        again, *_ = forward_on_a_cpu(
            *leaves, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask=False, **sides
        )
    assert torch.equal(again, out)
    return torch.autograd.grad(again, leaves, grad_out)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "flash_attention_operations", lambda: (forward_on_a_cpu, backward_on_a_cpu))


def attend(inputs: tuple[Tensor, Tensor, Tensor], window: int | None = None) -> Tensor:
    return flash_attention(*inputs, torch.tensor(BOUNDS, dtype=torch.int32), LONGEST, 0.3, window)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (4, 2)])
def test_output_and_gradients_are_those_of_attention_over_packed_documents(
    query_heads: int, key_heads: int, window: int | None
) -> None:
    leaves = three(tensor.requires_grad_() for tensor in heads(query_heads, key_heads))
    grad = normal64(1, TOKENS, query_heads, 16, seed=9)
    expected = varlen_attention(*leaves, BOUNDS, scale=0.3, window=window)
    expected_gradients = torch.autograd.grad(expected, leaves, grad)
    output = attend(leaves, window)
    assert torch.equal(output, expected)
    for found, wanted in zip(torch.autograd.grad(output, leaves, grad), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("on_a_cpu")
def test_it_is_one_node_between_its_inputs_and_its_output() -> None:
    leaves = three(tensor.requires_grad_() for tensor in heads())
    node = attend(leaves).grad_fn
    assert node is not None
    assert [type(following).__name__ for following, _ in node.next_functions if following] == ["AccumulateGrad"] * 3


@pytest.mark.usefixtures("on_a_cpu")
def test_views_of_the_inputs_are_kept_and_not_copies_of_them() -> None:
    """And the output, its normalizers, the documents' bounds and the generator's state: what torch's function keeps."""
    kept: list[Tensor] = []
    leaves = three(tensor.requires_grad_() for tensor in heads())
    with KeptBy(lambda tensors: kept.extend(t for t in tensors if t is not None), lambda _: ()):
        output = attend(leaves)
    addresses = [tensor.data_ptr() for tensor in kept]
    assert addresses[:4] == [tensor.data_ptr() for tensor in (*leaves, output)]
    assert [tuple(tensor.shape) for tensor in kept[4:]] == [(4, TOKENS), (len(BOUNDS),), (2,)]


@pytest.mark.usefixtures("on_a_cpu")
def test_without_a_gradient_nothing_is_kept() -> None:
    def refuse(tensors: Any) -> Any:
        raise AssertionError("kept")

    leaves = three(tensor.requires_grad_() for tensor in heads())
    with KeptBy(refuse, refuse), torch.no_grad():
        assert not attend(leaves).requires_grad
    with KeptBy(refuse, refuse):
        attend(heads())


@pytest.fixture
def flash_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    device = torch.device("cuda")
    if Card.of(device).flash_refusal(torch.bfloat16, 64) is not None:
        pytest.skip("this card has no flash attention")
    torch.use_deterministic_algorithms(True)
    yield device
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 5])
def test_a_card_gives_the_bits_of_torchs_function_and_keeps_as_many_bytes(
    flash_here: torch.device, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [tensor.to(flash_here, torch.bfloat16) for tensor in heads(head_dim=64)]
    grad = normal64(1, TOKENS, 4, 64, seed=9).to(inputs[0])
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    def run() -> tuple[list[Tensor], int]:
        kept.clear()
        leaves = three(tensor.clone().requires_grad_() for tensor in inputs)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = varlen_attention(*leaves, BOUNDS, scale=0.3, window=window)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)], sum(kept)

    found, bytes_kept = run()
    monkeypatch.setattr(caller, "has_flash_attention", lambda: False)
    expected, by_torch = run()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert bytes_kept <= by_torch


def test_without_memory_it_makes_what_torchs_function_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which a plan counts: shapes, strides and bytes of the output and of the gradients."""

    def made() -> list[tuple[Any, ...]]:
        leaves = three(
            torch.empty(1, TOKENS, count, 16, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for count in (4, 2, 2)
        )
        output = caller._flash_varlen(*leaves, torch.empty(6, dtype=torch.int32), LONGEST, 0.3, None)
        tensors = output, *torch.autograd.grad(output, leaves, torch.empty_like(output))
        return [(tuple(t.shape), t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in tensors]

    with FakeTensorMode():
        found = made()
        monkeypatch.setattr(caller, "has_flash_attention", lambda: False)
        assert found == made()
