"""Attention over packed documents: the dense mask's values, no leak between documents, no mask over all tokens."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from spying import noting
from torch import Tensor

from qlora_kernels import blockwise_attention
from qlora_kernels import varlen_attention as module
from qlora_kernels.card import Card, planned_for
from qlora_kernels.torch_internals import FakeTensorMode, TorchDispatchMode
from qlora_kernels.varlen_attention import varlen_attention

BOUNDS = [0, 1, 8, 9, 29, 41]  # lengths 1, 7, 1, 20, 12
TOKENS = BOUNDS[-1]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads(
    query_heads: int = 4, key_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(1, count, TOKENS, head_dim) for count in (query_heads, key_heads, key_heads)]
    query, key, value = (normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    return query, key, value


def three(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = tensors
    return query, key, value


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
    grad = normal(1, TOKENS, query_heads, 16, seed=9)
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


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        self.elements = max([self.elements, *(output.numel() for output in outputs if isinstance(output, Tensor))])
        return result


@pytest.mark.parametrize("options", [{}, {"window": 8}, {"softcap": 3.0}, {"dropout": 0.1}])
def test_no_tensor_is_of_the_size_tokens_by_tokens(options: dict[str, Any]) -> None:
    tokens, bounds = 1024, list(range(0, 1025, 32))
    query, key, value = (normal(1, 2, tokens, 8, seed=seed).requires_grad_() for seed in range(3))
    with LargestTensor() as made:
        varlen_attention(query, key, value, bounds, scale=0.3, **options).sum().backward()
    assert made.elements == query.numel()


@pytest.mark.parametrize(
    "options", [{}, {"window": 16}, {"softcap": 3.0}, {"softcap": 3.0, "window": 16}, {"dropout": 0.1}]
)
def test_one_long_document_makes_no_matrix_of_its_tokens_either(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the op does inside is seen where its functions are called in its place.
    monkeypatch.setattr(torch.ops.qlora_kernels, "blockwise_attention", blockwise_attention._attend)
    monkeypatch.setattr(torch.ops.qlora_kernels, "blockwise_attention_backward", blockwise_attention._backward)
    tensors = three(normal(1, 2, 1024, 8, seed=seed).requires_grad_() for seed in range(3))
    with LargestTensor() as made:
        varlen_attention(*tensors, [0, 1024], scale=0.3, **options).sum().backward()
    assert made.elements <= 2 * 1024 * 128, "a block of 128 queries with all they see, of both heads"


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
    grad = normal(1, TOKENS, 4, head_dim, seed=9)
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


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 3.0}])
def test_heads_a_few_at_a_time_give_the_same_output_and_gradients(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = heads(query_heads=6, key_heads=3)

    def run() -> list[Tensor]:
        leaves = three(tensor.clone().requires_grad_() for tensor in inputs)
        output = varlen_attention(*leaves, BOUNDS, scale=0.3, **options)
        return [output, *torch.autograd.grad((output * normal(*output.shape, seed=9)).sum(), leaves)]

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
        if func.name() == "torch_attn::_varlen_attn_backward":
            self.documents = len(args[6]) - 1
        if func.name() == "aten::_scaled_dot_product_efficient_attention":
            self.key_heads = args[1].shape[1]
        return func(*args, **(kwargs or {}))


FLASH = {"torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"}
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
