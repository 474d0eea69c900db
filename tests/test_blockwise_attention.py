"""Attention by blocks of queries: the dense formula's values and gradients, and memory that knows no square."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kernels import blockwise_attention as module
from qlora_kernels.blockwise_attention import blockwise_attention
from qlora_trainer.memory_tracking import LiveBytes

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


def leaves(length: int, query_heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """As a model gives them: heads side by side in each token, seen as (1, heads, tokens, head size)."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, length, count, 8) for count in (query_heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


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


def peak_bytes(length: int, **options: Any) -> int:
    """Of forward and backward, what comes in left out."""
    tensors = leaves(length, dtype=torch.float32)
    with LiveBytes() as live:
        blockwise_attention(*tensors, scale=0.4, **options).sum().backward()
    return live.peak.bytes


@pytest.mark.parametrize("options", [{"window": 64}, {}, {"softcap": 5.0}, {"softcap": 5.0, "dropout": 0.1}])
def test_memory_doubles_with_the_length(options: dict[str, Any]) -> None:
    """Peaks lie on a line, a + b x length: a square would show at once."""
    peaks = [peak_bytes(length, **options) for length in (512, 1024, 2048)]
    assert peaks[1] - peaks[0] > 0
    assert peaks[2] - peaks[1] <= 2.05 * (peaks[1] - peaks[0])
    assert peaks[2] < 2048**2 * 4 / 2  # not half of one head's scores, where there are four


def test_a_window_bounds_the_scores_that_exist() -> None:
    """What comes with more tokens is gradients and the output, of their own size; the blocks stay what they are."""
    grown = peak_bytes(2048, window=64) - peak_bytes(1024, window=64)
    of_a_token = (
        4 * 8 * (2 * 4 + 2 * 2)
    )  # output and query gradient of 4 heads, key and value gradients of 2, 8 numbers
    assert grown <= 1.5 * 1024 * of_a_token


@pytest.mark.parametrize("window", [4, 64, 1000])
def test_time_grows_with_length_times_window(window: int) -> None:
    """Multiplications, counted: each query meets its window, and no more than a block beside it."""
    from torch.utils.flop_counter import FlopCounterMode

    tensors, heads, head_size = [tensor.detach() for tensor in leaves(2048, dtype=torch.float32)], 4, 8
    with FlopCounterMode(display=False) as counter:
        blockwise_attention(*tensors, scale=0.4, window=window)
    assert counter.get_total_flops() <= 2 * 2 * heads * head_size * 2048 * (window + 16)


def test_blocks_shrink_where_heads_and_reach_are_many() -> None:
    def bytes_of_scores(heads: int, reach: int) -> int:
        return module._queries_of_a_block(heads, reach) * heads * reach * 4

    for heads, reach in [(8, 4096), (32, 4096), (32, 1000), (64, 2000)]:
        assert bytes_of_scores(heads, reach) <= module.BLOCK_BYTES
    assert module._queries_of_a_block(128, 10**6) == module.FEWEST_QUERIES


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
