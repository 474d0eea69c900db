"""The chunked loss: the value and gradient of the plain one, and never the logits of all tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kernels.linear_cross_entropy import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 37, 20, 101


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (T, H), head (V, H), labels (T,) of which a third are -100, bias (V,)."""
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))
    labels[::3] = -100
    hidden = normal(TOKENS, WIDTH, seed=0, dtype=dtype).requires_grad_()
    return hidden, normal(VOCABULARY, WIDTH, seed=1, dtype=dtype), labels, normal(VOCABULARY, seed=2, dtype=dtype)


def plain_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    logits = F.linear(hidden, head, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum")


def value_and_gradient(loss: Any, hidden: Tensor, *arguments: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().clone().requires_grad_()
    value = loss(leaf, *arguments, **options)
    (3 * value).backward()  # the incoming gradient counts
    assert leaf.grad is not None
    return value.detach(), leaf.grad


OPTIONS: list[dict[str, float]] = [{}, {"softcap": 2.5}, {"logit_scale": 0.3}, {"softcap": 4.0, "logit_scale": 1.7}]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chunk_tokens", [1, 5, 24, 512])  # 24 tokens have a label
def test_loss_and_gradient_are_those_of_the_plain_loss(
    options: dict[str, float], with_bias: bool, chunk_tokens: int
) -> None:
    hidden, head, labels, bias = problem()
    extra: dict[str, Any] = {**options, "bias": bias} if with_bias else {**options}
    value, gradient = value_and_gradient(linear_cross_entropy, hidden, head, labels, chunk_tokens=chunk_tokens, **extra)
    wanted, wanted_gradient = value_and_gradient(plain_loss, hidden, head, labels, **extra)
    torch.testing.assert_close(value, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_errs_no_more_than_the_plain_loss_does(dtype: torch.dtype) -> None:
    hidden, head, labels, _ = problem(dtype)

    def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:  # logits in dtype, softmax in fp32
        return F.cross_entropy(F.linear(hidden, head).float(), labels, reduction="sum")

    value, gradient = value_and_gradient(linear_cross_entropy, hidden, head, labels, chunk_tokens=7)
    plain_value, plain_gradient = value_and_gradient(plain, hidden, head, labels)
    exact, exact_gradient = value_and_gradient(plain_loss, hidden.double(), head.double(), labels)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    noise = 1e-6 * exact.abs()
    assert (value - exact).abs() <= 1.1 * (plain_value - exact).abs() + noise
    error, plain_error = (gradient - exact_gradient).norm(), (plain_gradient - exact_gradient).norm()
    assert error <= 1.1 * plain_error + 1e-7 * exact_gradient.norm()


def test_no_label_at_all_gives_zero_and_a_zero_gradient() -> None:
    hidden, head, labels, _ = problem()
    value, gradient = value_and_gradient(linear_cross_entropy, hidden, head, torch.full_like(labels, -100))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(hidden))


def test_rows_without_a_label_never_enter_the_arithmetic() -> None:
    hidden, head, labels, _ = problem()
    spoiled = hidden.detach().clone()
    spoiled[labels == -100] = float("nan")
    value, gradient = value_and_gradient(linear_cross_entropy, hidden, head, labels)
    same, same_gradient = value_and_gradient(linear_cross_entropy, spoiled, head, labels)
    assert torch.equal(value, same)
    assert torch.equal(gradient, same_gradient)
    assert torch.equal(gradient[labels == -100], torch.zeros(13, WIDTH, dtype=torch.float64))


def test_large_logits_stay_finite() -> None:
    hidden, head, labels, _ = problem(torch.float32)
    value, gradient = value_and_gradient(linear_cross_entropy, hidden * 1e4, head, labels)
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_trained_head_is_refused() -> None:
    hidden, head, labels, bias = problem()
    with pytest.raises(AssertionError, match="freeze them"):
        linear_cross_entropy(hidden, head.clone().requires_grad_(), labels)
    with pytest.raises(AssertionError, match="freeze them"):
        linear_cross_entropy(hidden, head, labels, bias=bias.clone().requires_grad_())


class LargestTensors(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        self.sizes += [output.numel() for output in outputs if isinstance(output, Tensor)]
        return result


def test_logits_of_all_tokens_never_exist() -> None:
    hidden, head, labels, _ = problem()
    with LargestTensors() as made:
        linear_cross_entropy(hidden, head, labels, chunk_tokens=5, softcap=3.0).backward()
    assert max(made.sizes) == head.numel()  # its own alias; a chunk of logits is smaller still
    assert 5 * VOCABULARY in made.sizes
    assert 24 * VOCABULARY not in made.sizes


def test_without_grad_mode_no_gradient_is_made() -> None:
    hidden, head, labels, _ = problem()
    with torch.no_grad(), LargestTensors() as made:
        value = linear_cross_entropy(hidden, head, labels, chunk_tokens=5)
    torch.testing.assert_close(value, plain_loss(hidden, head, labels).detach(), rtol=1e-13, atol=0)
    assert TOKENS * WIDTH not in made.sizes


def test_step_can_be_planned_on_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        hidden, head, labels, _ = (mode.from_tensor(tensor) for tensor in problem(torch.bfloat16))
        loss = linear_cross_entropy(hidden, head, labels, chunk_tokens=8)
        loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert hidden.grad is not None
