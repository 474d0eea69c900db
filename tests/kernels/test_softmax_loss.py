"""The loss of tokens from their logits in plain torch: autograd's values, in the logits' own memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_tensors import normal64
from torch import Tensor

from qlora_kernels.softmax_loss import FEWEST_PARTS, softmax_loss_, softmax_loss_torch, softmax_loss_workspace_bytes
from qlora_trainer.planning.live_bytes import LiveBytes

OPTIONS: list[dict[str, float]] = [{}, {"softcap": 2.5}, {"logit_scale": 0.3}, {"softcap": 4.0, "logit_scale": 1.7}]


def problem(tokens: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """logits (C, V), targets (C, 1), bias (V,)."""
    targets = torch.randint(vocabulary, (tokens, 1), generator=torch.Generator().manual_seed(3))
    return 3 * normal64(tokens, vocabulary, dtype=dtype), targets, normal64(vocabulary, seed=2, dtype=dtype)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (1, 101), (37, 64)])
def test_losses_and_gradient_are_those_of_autograd(
    tokens: int, vocabulary: int, options: dict[str, Any], with_bias: bool
) -> None:
    logits, targets, bias = problem(tokens, vocabulary)
    leaf = logits.clone().requires_grad_()
    z = (leaf + bias if with_bias else leaf) * options.get("logit_scale", 1.0)
    if cap := options.get("softcap"):
        z = cap * torch.tanh(z / cap)
    wanted = F.cross_entropy(z, targets.squeeze(1), reduction="none")
    wanted.sum().backward()
    losses = softmax_loss_(logits, targets, bias=bias if with_bias else None, **options)
    torch.testing.assert_close(losses.squeeze(1), wanted.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(logits, leaf.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens", [1, FEWEST_PARTS, 2 * FEWEST_PARTS + 5])
def test_logits_of_16_bits_give_the_losses_of_fp32_and_their_gradient_rounded_once(
    tokens: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    logits, targets, bias = problem(tokens, 101, dtype)
    wide = logits.float()
    expected = softmax_loss_(wide, targets, bias=bias, **options)
    losses = softmax_loss_(logits, targets, bias=bias, **options)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(logits.float(), wide, rtol=1.01 * rounding, atol=2.0**-25)  # fp16's smallest numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_gives_no_finite_loss(bad: float) -> None:
    logits, targets, _ = problem(3, 64, torch.float32)
    logits[1, 7] = bad
    assert softmax_loss_(logits, targets).isfinite().squeeze(1).tolist() == [True, False, True]


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_plain_torch_uses_inside_is_counted(
    dtype: torch.dtype, softcap: float | None, with_gradient: bool
) -> None:
    logits, targets, _ = problem(50, 4001, dtype)
    with LiveBytes() as live:
        live.watch([logits, targets], "given")
        given = live.bytes
        losses = softmax_loss_torch(logits, targets, None, softcap, 1.0, with_gradient)
    inside = live.peak.bytes - given - losses.nbytes
    assert 0.9 * inside <= softmax_loss_workspace_bytes(logits, softcap, with_gradient) <= 1.1 * inside
