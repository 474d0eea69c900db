"""A function taken in tiles: the same values and gradients, with no more than a tile's inside at once."""

import pytest
import torch
from random_tensors import normal64
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kernels.adapter import Adapter
from qlora_kernels.gated_linear import gated_nf4_linear
from qlora_kernels.lora_linear import nf4_linear
from qlora_kernels.nf4 import quantize_nf4
from qlora_kernels.tiling import tiled
from qlora_trainer.planning.live_bytes import LiveBytes
from qlora_trainer.training.memory.recompute import Recomputation


class Wide(nn.Module):
    """(n, 8) -> (n, 6) by way of (n, 64), with a parameter and dropout inside."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Parameter(normal64(64, 8))
        self.down = normal64(6, 64)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.linear(x, self.up).tanh(), self.dropout) @ self.down.T


@pytest.mark.parametrize("tile_tokens", [1, 4, 5, 20, 100])
@pytest.mark.parametrize("lead", [(20,), (2, 10), (1, 20), (0,)])
def test_tiles_of_any_size_give_the_same_gradients(lead: tuple[int, ...], tile_tokens: int) -> None:
    wide, x, grad = Wide(), normal64(*lead, 8).requires_grad_(), normal64(*lead, 6, seed=1)
    wide(x).backward(grad)
    assert wide.up.grad is not None
    expected, wide.up.grad = (x.grad, wide.up.grad), torch.zeros_like(wide.up)
    x.grad = None
    output = tiled(wide, x, tile_tokens)
    torch.testing.assert_close(output, wide(x), rtol=1e-12, atol=1e-12)
    output.backward(grad)
    torch.testing.assert_close((x.grad, wide.up.grad), expected, rtol=1e-12, atol=1e-12)


def test_dropout_in_tiles_is_the_same_forward_and_backward() -> None:
    """With a mask of its own in backward, the gradient would not be that of the output."""
    wide, x = Wide(dropout=0.5), normal64(20, 8).requires_grad_()
    torch.manual_seed(3)
    output = tiled(wide, x, 6)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    found = torch.autograd.grad(output.sum(), x)[0]
    assert torch.equal(torch.get_rng_state(), before), "backward leaves the generator where it was"
    torch.manual_seed(3)
    parts = [wide(part) for part in x.split(6)]
    assert torch.equal(output, torch.cat(parts))
    torch.testing.assert_close(found, torch.autograd.grad(torch.cat(parts).sum(), x)[0], rtol=1e-12, atol=1e-12)


def test_a_frozen_input_still_gives_parameters_their_gradient() -> None:
    wide = Wide()
    tiled(wide, normal64(20, 8), 6).sum().backward()
    found, wide.up.grad = wide.up.grad, None
    wide(normal64(20, 8)).sum().backward()
    torch.testing.assert_close(found, wide.up.grad, rtol=1e-12, atol=1e-12)


def test_tiles_inside_a_recomputed_layer_give_the_same_gradient() -> None:
    wide, x = Wide(), normal64(20, 8).requires_grad_()
    expected = torch.autograd.grad(tiled(wide, x.sin(), 6).sum(), x)[0]
    found = torch.autograd.grad(Recomputation(lambda x: tiled(wide, x.sin(), 6), x).run(x).sum(), x)[0]
    assert torch.equal(found, expected)


def test_recomputing_a_layer_does_not_run_its_tiles_forward_again() -> None:
    calls = 0

    def counting(rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return rows * 2.0

    x = normal64(20, 8).requires_grad_()
    Recomputation(lambda x: tiled(counting, x.sin(), 5), x).run(x).sum().backward()
    assert calls == 8, "four tiles forward, and four for backward"


def test_recomputing_a_layer_does_not_run_adapted_tiles_forward_again() -> None:
    """Adapters inside keep nothing in forward, where no gradient is asked for: recomputing must not wait for them."""
    calls, weight = 0, quantize_nf4(normal64(64, 64).float())
    A, B = normal64(4, 64, seed=1).float().requires_grad_(), normal64(64, 4, seed=2).float().requires_grad_()

    def adapted(rows: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gated_nf4_linear(nf4_linear(rows, weight, None, Adapter(A, B, 1.0)), rows, F.silu, weight, None)

    x = normal64(20, 64).float().requires_grad_()
    Recomputation(lambda x: tiled(adapted, x.sin(), 5), x).run(x).sum().backward()
    assert calls == 8
    assert A.grad is not None


def test_what_lies_inside_exists_for_a_tile_only() -> None:
    wide, x = Wide(), normal64(64, 8).requires_grad_()
    inside = 64 * 64 * 8  # bytes of the wide tensor for all tokens
    peaks = []
    for tile_tokens in (64, 8):
        with LiveBytes() as live:
            tiled(wide, x, tile_tokens).sum().backward()
        peaks.append(live.peak.bytes)
    assert peaks[0] > 2 * inside
    assert peaks[1] < inside
