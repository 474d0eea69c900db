"""Attention by blocks of queries: the dense formula's values and gradients, and memory that knows no square."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from torch import Tensor

from qlora_kernels import blockwise_attention as module
from qlora_kernels.blockwise_attention import blockwise_attention
from qlora_trainer.planning.live_bytes import LiveBytes

LENGTH = 53  # blocks of 16 queries, the last of them short
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 16},
    {"window": 21},
    {"window": 52},
    {"softcap": 0.7},
    {"softcap": 2.0, "window": 21},
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_QUERIES", 16)


Leaves = tuple[Tensor, Tensor, Tensor]


def leaves(length: int, query_heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64) -> Leaves:
    """As a model gives them: heads side by side in each token, seen as (1, heads, tokens, head size)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, length, count, 8) for count in (query_heads, key_heads, key_heads)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return (
        query.transpose(1, 2).requires_grad_(),
        key.transpose(1, 2).requires_grad_(),
        value.transpose(1, 2).requires_grad_(),
    )


def dense(query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None, **options: Any) -> Tensor:
    """The definition, with all scores at once. `kept`: dropout's factors, (Hq, L, L)."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    i, j = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])
    seen = (j <= i) & (j > i - (options.get("window") or query.shape[2]))
    scores = query @ key.mT * options["scale"]
    if (softcap := options.get("softcap")) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return ((weights if kept is None else weights * kept) @ value).transpose(1, 2)


@pytest.mark.parametrize(("query_heads", "key_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("options", OPTIONS)
def test_output_and_gradients_are_those_of_the_dense_formula(
    options: dict[str, Any], query_heads: int, key_heads: int
) -> None:
    ours, theirs = leaves(LENGTH, query_heads, key_heads), leaves(LENGTH, query_heads, key_heads)
    output, wanted = blockwise_attention(*ours, scale=0.4, **options), dense(*theirs, None, scale=0.4, **options)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    output.backward(grad)
    wanted.backward(grad)
    assert output.shape == (1, LENGTH, query_heads, 8)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-13)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{"window": 5}, {"softcap": 0.7}, {"softcap": 2.0, "window": 5, "dropout": 0.3}])
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    def attend(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)  # of dropout
        return blockwise_attention(*tensors, scale=0.4, **options)

    small = [tensor.detach()[..., :3].requires_grad_() for tensor in leaves(19)]
    torch.autograd.gradcheck(attend, small, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 21}])
def test_dropout_drops_the_same_weights_in_forward_and_backward(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, share = torch.zeros(4, LENGTH, LENGTH, dtype=torch.float64), 0.25
    drawn, original = [], module.keep_mask

    def noted(*arguments: Any) -> Tensor:
        drawn.append(original(*arguments))
        return drawn[-1].clone()

    monkeypatch.setattr(module, "keep_mask", noted)
    ours, theirs = leaves(LENGTH), leaves(LENGTH)
    output = blockwise_attention(*ours, scale=0.4, dropout=share, **options)
    in_forward = list(drawn)
    output.square().sum().backward()
    assert len(drawn) == 2 * len(in_forward) == 8
    assert all(torch.equal(a, b) for a, b in zip(in_forward, drawn[4:], strict=True))
    for number, mask in enumerate(in_forward):
        queries = slice(16 * number, min(16 * number + 16, LENGTH))
        first = max(0, queries.start - options.get("window", LENGTH) + 1)
        kept[:, queries, first : queries.stop] = mask.view(4, queries.stop - queries.start, -1) / (1 - share)
    wanted = dense(*theirs, kept, scale=0.4, **options)
    wanted.square().sum().backward()
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-13)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-11, atol=1e-12)
    assert 0.2 < 1 - torch.cat([mask.flatten() for mask in in_forward]).mean() < 0.3
    first, second = in_forward[0].flatten(), in_forward[1].flatten()
    assert not torch.equal(first, second[: len(first)]), "each block has a mask of its own"
    assert not torch.equal(output, blockwise_attention(*ours, scale=0.4, dropout=share, **options)), "a new seed"


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}])
def test_large_scores_of_half_precision_do_not_overflow(options: dict[str, Any]) -> None:
    query, key, value = (100 * tensor.detach() for tensor in leaves(LENGTH, dtype=torch.float16))  # products of 80,000
    output = blockwise_attention(query, key, value, scale=2**-8, **options)
    exact = dense(query.double(), key.double(), value.double(), None, scale=2**-8, **options)
    assert (query.double() @ key.repeat_interleave(2, 1).double().mT).abs().max() > 65504
    assert (output - exact).norm() < 2e-3 * exact.norm()


def test_without_gradients_nothing_is_kept() -> None:
    tensors = leaves(LENGTH)
    with torch.no_grad():
        assert blockwise_attention(*tensors, scale=0.4).grad_fn is None


def bytes_inside(
    length: int,
    dtype: torch.dtype = torch.float32,
    *,
    backward: bool,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[int, int]:
    """What the op uses beyond its inputs and outputs: (counted operation by operation, by the formula)."""
    query, key, value = (tensor.detach() for tensor in leaves(length, dtype=dtype))
    grad = torch.randn(1, length, 4, 8, dtype=dtype)
    seed = torch.tensor(1) if dropout else None
    with LiveBytes() as live:
        live.watch([query, key, value, grad], "inputs")
        before = live.bytes
        if backward:
            outputs: tuple[Tensor, ...] = module._backward(grad, query, key, value, seed, 0.4, window, softcap, dropout)
        else:
            outputs = (module._attend(query, key, value, seed, 0.4, window, softcap, dropout),)
    inside = live.peak.bytes - before - sum(tensor.nbytes for tensor in outputs)
    formula = module.blockwise_workspace_bytes(query, key, window, softcap, dropout, backward=backward, on_cuda=False)
    return inside, formula


ALL_OPTIONS = [
    {"window": 64},
    {},
    {"softcap": 5.0},
    {"dropout": 0.1},
    {"softcap": 5.0, "dropout": 0.1},
    {"softcap": 5.0, "window": 500},
]


@pytest.mark.parametrize("options", ALL_OPTIONS)
@pytest.mark.parametrize("backward", slow_but([False, True], True))
def test_memory_inside_doubles_with_the_length_at_most(options: dict[str, Any], backward: bool) -> None:
    """With a window it does not grow at all: the blocks stay what they are."""
    half, whole = (bytes_inside(length, backward=backward, **options)[0] for length in (1024, 2048))
    assert whole <= (1.0 if "window" in options else 2.0) * half
    assert whole < 2048**2 * 4 / 4, "not a quarter of one head's scores, where there are four heads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ALL_OPTIONS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_plan_counts_what_is_used_inside(options: dict[str, Any], backward: bool, dtype: torch.dtype) -> None:
    """Dropout's mask is an op in the op, whose inside is not seen here and is in the formula."""
    inside, formula = bytes_inside(1024, dtype, backward=backward, **options)
    assert 0.95 * inside <= formula <= (1.5 if "dropout" in options else 1.15) * inside


def test_the_op_gives_fake_tensors_what_it_gives_real_ones() -> None:
    seed = torch.tensor(1)
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value = (tensor.detach() for tensor in leaves(LENGTH, dtype=dtype))
        torch.library.opcheck(
            torch.ops.qlora_kernels.blockwise_attention.default,
            (query, key, value, seed, 0.4, 21, 5.0, 0.1),
            test_utils=("test_schema", "test_faketensor"),
        )
        torch.library.opcheck(
            torch.ops.qlora_kernels.blockwise_attention_backward.default,
            (torch.randn(1, LENGTH, 4, 8, dtype=dtype), query, key, value, seed, 0.4, 21, 5.0, 0.1),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("window", [4, 64, 1000])
def test_time_grows_with_length_times_window(window: int) -> None:
    """Multiplications, counted: each query meets its window, and no more than a block besides."""
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = (tensor.detach() for tensor in leaves(2048, dtype=torch.float32))
    heads, head_size = 4, 8
    with FlopCounterMode(display=False) as counter:
        module._attend(query, key, value, None, 0.4, window, None, 0.0)
    assert counter.get_total_flops() <= 2 * 2 * heads * head_size * 2048 * (window + 16)


def test_blocks_shrink_where_heads_and_reach_are_many() -> None:
    def bytes_of_scores(heads: int, reach: int) -> int:
        return module.queries_of_a_block(heads, reach, on_cuda=False) * heads * reach * 4

    for heads, reach in [(8, 4096), (32, 4096), (32, 1000), (64, 2000)]:
        assert bytes_of_scores(heads, reach) <= module.BLOCK_BYTES
    assert module.queries_of_a_block(128, 10**6, on_cuda=True) == module.FEWEST_QUERIES


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"window": 21}])
def test_recomputed_layers_give_the_same_gradients(options: dict[str, Any]) -> None:
    """Dropout's seed comes from the generator that recomputation restores."""
    from torch.utils.checkpoint import checkpoint

    def attend(*tensors: Tensor) -> Tensor:
        return F.gelu(blockwise_attention(*tensors, scale=0.4, dropout=0.2, **options))

    grads = []
    for run in (attend, lambda *tensors: checkpoint(attend, *tensors, use_reentrant=False)):
        torch.manual_seed(5)
        tensors = leaves(LENGTH)
        run(*tensors).square().sum().backward()
        grads.append([tensor.grad for tensor in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
