"""Attention over packed documents on each kind of card: which kernel is taken, and what it takes inside."""

from typing import Any

import pytest
import torch
from packed_heads import BOUNDS, TOKENS, heads, three
from random_tensors import normal64
from spying import noting
from torch import Tensor

from qlora_kernels import varlen_attention as module
from qlora_kernels.card import Card, planned_for
from qlora_kernels.torch_internals import FakeTensorMode, TorchDispatchMode
from qlora_kernels.varlen_attention import varlen_attention


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 3.0}])
def test_heads_a_few_at_a_time_give_the_same_output_and_gradients(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = heads(query_heads=6, key_heads=3)
    monkeypatch.setattr(module, "takes_documents", lambda *_: False)  # it takes all heads, and little inside

    def run() -> list[Tensor]:
        leaves = three(tensor.clone().requires_grad_() for tensor in inputs)
        output = varlen_attention(*leaves, BOUNDS, scale=0.3, **options)
        return [output, *torch.autograd.grad((output * normal64(*output.shape, seed=9)).sum(), leaves)]

    expected = run()
    calls = []
    monkeypatch.setattr(module, "_attend", noting(module._attend, lambda query, *_, **__: calls.append(query.shape[1])))
    monkeypatch.setattr(module, "MOST_BACKWARD_BYTES", module.flash_backward_bytes(TOKENS, 6, 3, 16, 8) * 2 // 3)
    found = run()
    assert set(calls) == {4, 2}, "two of the three key heads, then the last"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [2_048, 16_384, 131_072])
def test_attention_takes_as_many_heads_as_its_backward_has_space_for_inside(tokens: int) -> None:
    query, key = (torch.empty(1, count, tokens, 128, dtype=torch.bfloat16, device="meta") for count in (32, 8))
    count = module.key_heads_at_a_time(query, key)
    inside = [module.flash_backward_bytes(tokens, 4 * heads, heads, 128, 2) for heads in range(1, 9)]
    assert count == max([1, *(heads for heads in range(1, 9) if inside[heads - 1] <= module.MOST_BACKWARD_BYTES)])
    assert (count == 8) == (tokens == 2_048)


class Seen(TorchDispatchMode):
    """The names of operations; the documents of flash attention, the key heads of the one for other cards."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.documents = self.key_heads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        if func.name() == "aten::_flash_attention_backward":
            self.documents = len(args[6]) - 1
        if func.name() == "aten::_scaled_dot_product_efficient_attention":
            self.key_heads = args[1].shape[1]
        return func(*args, **(kwargs or {}))


FLASH = {"aten::_flash_attention_forward", "aten::_flash_attention_backward"}


EFFICIENT = {"aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_efficient_attention_backward"}


BLOCKWISE = {"qlora_kernels::blockwise_attention", "qlora_kernels::blockwise_attention_backward"}


CPU = {f"aten::_scaled_dot_product_flash_attention_for_cpu{end}" for end in ("", "_backward")}


@pytest.mark.parametrize(
    ("card", "dtype", "options", "taken"),
    [
        (Card((8, 0), 128), torch.bfloat16, {}, FLASH),
        (Card((8, 0), 128), torch.bfloat16, {"window": 5}, FLASH),
        (Card((8, 0), 128), torch.bfloat16, {"softcap": 3.0}, BLOCKWISE),
        (Card((8, 0), 128), torch.bfloat16, {"dropout": 0.1}, EFFICIENT),
        (Card((8, 0), 128), torch.bfloat16, {"dropout": 0.1, "window": 5}, BLOCKWISE | EFFICIENT),
        (Card((7, 5), 40), torch.float16, {}, EFFICIENT),
        (Card((7, 5), 40), torch.float16, {"window": 5}, BLOCKWISE | EFFICIENT),
        (Card((8, 0), 128), torch.float32, {}, EFFICIENT),
        (None, torch.bfloat16, {}, CPU),
    ],
)
def test_tensors_without_memory_are_attended_to_as_on_the_card_they_are_planned_for(
    monkeypatch: pytest.MonkeyPatch,
    card: Card | None,
    dtype: torch.dtype,
    options: dict[str, Any],
    taken: set[str],
) -> None:
    """Each branch of a real card's, by the operations: the tests of fake tensors of device cuda walk those."""
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    with FakeTensorMode(), planned_for(card):
        leaves = three(torch.empty(1, count, TOKENS, 16, dtype=dtype, requires_grad=True) for count in (4, 2, 2))
        with Seen() as seen:
            output = varlen_attention(*leaves, BOUNDS, scale=0.3, **options)
            output.sum().backward()
    assert output.shape == (1, TOKENS, 4, 16)
    assert seen.names & (FLASH | EFFICIENT | BLOCKWISE | CPU) == taken
    assert seen.documents == (5 if taken == FLASH else 0)
    assert seen.key_heads == (4 if taken & EFFICIENT else 0), "there each query head has keys of its own"


@pytest.mark.parametrize(("documents", "heads"), [(1, [32]), (16, [32]), (64, [28, 4]), (256, [12, 12, 8])])
def test_flash_attention_takes_fewer_heads_at_a_time_of_many_documents(
    monkeypatch: pytest.MonkeyPatch, documents: int, heads: list[int]
) -> None:
    """4,096 tokens of an 8B: of 64 documents all heads would take 257.5 MiB, where 256 are allowed."""
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    calls: list[int] = []
    whole = module._flash_varlen

    def noting(query: Tensor, *arguments: Any) -> Tensor:
        calls.append(query.shape[1])
        return whole(query, *arguments)

    monkeypatch.setattr(module, "_flash_varlen", noting)
    with FakeTensorMode(), planned_for(Card((8, 0), 128)):
        tensors = three(torch.empty(1, count, 4096, 128, dtype=torch.bfloat16) for count in (32, 8, 8))
        varlen_attention(*tensors, list(range(0, 4097, 4096 // documents)), scale=0.3)
    assert calls == heads


def test_a_plan_for_a_card_leaves_attention_on_a_cpu_as_it_is() -> None:
    inputs = heads()
    before = varlen_attention(*inputs, BOUNDS, scale=0.3)
    with planned_for(Card((8, 0), 128)):
        pass
    assert torch.equal(varlen_attention(*inputs, BOUNDS, scale=0.3), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("documents", [1, 2, 64])
def test_flash_attentions_backward_allocates_what_its_formula_says(documents: int, deterministic: bool) -> None:
    """Next to the three gradients that it returns, of 2,048 tokens, 16 query and 4 key heads."""
    tokens, device = 2048, torch.device("cuda")
    card = Card.of(device)
    if card.flash_refusal(torch.bfloat16, 128) is not None:
        pytest.skip("this card has no flash attention")
    # As projections lay them out, token by token; of others, attention's backward copies what it is given.
    leaves = three(
        torch.randn(1, tokens, count, 128, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for count in (16, 4, 4)
    )
    output = varlen_attention(*leaves, list(range(0, tokens + 1, tokens // documents)), scale=0.1)
    grad = torch.ones_like(output)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.use_deterministic_algorithms(deterministic)
    try:
        gradients = torch.autograd.grad(output, leaves, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    found = torch.cuda.max_memory_allocated() - before - sum(gradient.nbytes for gradient in gradients)
    processors = card.processors if deterministic else 0
    expected = module.flash_backward_bytes(tokens, 16, 4, 128, 2, documents, processors)
    print(f"{documents} documents: {found / 2**20:.1f} MiB, by formula {expected / 2**20:.1f}, {deterministic=}")
    assert abs(found - expected) <= 2 * 2**20
