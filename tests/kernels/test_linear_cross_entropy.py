"""The chunked loss: the value and gradient of the plain one, and never the logits of all tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_losses import Quantized, plain_loss, value_and_gradient
from random_tensors import normal64
from spying import TensorSizes
from torch import Tensor

from qlora_kernels import head_rows
from qlora_kernels.head_rows import HeadRows, head_logits
from qlora_kernels.int8 import quantize_int8
from qlora_kernels.linear_cross_entropy import linear_cross_entropy, tokens_of_a_chunk
from qlora_kernels.nf4 import quantize_nf4
from qlora_kernels.products import linear
from qlora_kernels.torch_internals import FakeTensorMode
from qlora_trainer.planning.live_bytes import LiveBytes

TOKENS, WIDTH, VOCABULARY = 37, 20, 101


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (T, H), head (V, H), labels (T,) of which a third are -100, bias (V,)."""
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))
    labels[::3] = -100
    hidden = normal64(TOKENS, WIDTH, seed=0, dtype=dtype).requires_grad_()
    return hidden, normal64(VOCABULARY, WIDTH, seed=1, dtype=dtype), labels, normal64(VOCABULARY, seed=2, dtype=dtype)


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


def test_logits_of_all_tokens_never_exist() -> None:
    hidden, head, labels, _ = problem()
    with TensorSizes() as made:
        linear_cross_entropy(hidden, head, labels, chunk_tokens=5, softcap=3.0).backward()
    assert max(made.sizes) == head.numel()  # its own alias; a chunk of logits is smaller still
    assert 5 * VOCABULARY in made.sizes
    assert 24 * VOCABULARY not in made.sizes


def test_without_grad_mode_no_gradient_is_made() -> None:
    hidden, head, labels, _ = problem()
    with torch.no_grad(), TensorSizes() as made:
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


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_quantized_heads_loss_equals_the_loss_with_its_dequantized_rows(
    options: dict[str, float], quantize: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more of the head is ever made at once than a block."""
    monkeypatch.setattr(head_rows, "BLOCK_ELEMENTS", 6 * WIDTH + 3)
    hidden, head, labels, bias = problem()
    quantized = Quantized(quantize(head))
    settings: dict[str, Any] = {**options, "bias": bias, "chunk_tokens": 5}
    value, gradient = value_and_gradient(linear_cross_entropy, hidden, quantized, labels, **settings)
    wanted, wanted_gradient = value_and_gradient(
        plain_loss, hidden, quantized.whole(torch.float64), labels, **options, bias=bias
    )
    torch.testing.assert_close(value, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-11, atol=1e-13)
    assert max(quantized.made) == 6 * WIDTH


@pytest.mark.parametrize("quantize", [quantize_nf4, quantize_int8])
def test_a_quantized_heads_logits_and_gradient_are_those_of_its_dequantized_rows(quantize: Any) -> None:
    hidden, head, _, _ = problem()
    quantized: HeadRows = Quantized(quantize(head))
    batch = hidden.detach()[:36].view(4, 9, WIDTH).requires_grad_()
    logits = head_logits(batch, quantized)
    plain = batch.detach().clone().requires_grad_()
    wanted = F.linear(plain, Quantized(quantize(head)).whole(torch.float64))
    torch.testing.assert_close(logits, wanted, rtol=1e-13, atol=1e-13)
    incoming = normal64(4, 9, VOCABULARY, seed=5)
    logits.backward(incoming)
    wanted.backward(incoming)
    torch.testing.assert_close(batch.grad, plain.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("held", ["dense", "nf4", "int8"])
def test_the_peak_beyond_hidden_states_and_their_gradient_is_one_chunk(
    held: str, softcap: float | None, dtype: torch.dtype
) -> None:
    tokens, width, vocabulary, chunk_tokens = 300, 64, 8192, 128
    hidden = normal64(tokens, width, seed=0, dtype=dtype).requires_grad_()
    dense = normal64(vocabulary, width, seed=1, dtype=dtype)
    head = {
        "dense": lambda w: w,
        "nf4": lambda w: Quantized(quantize_nf4(w)),
        "int8": lambda w: Quantized(quantize_int8(w)),
    }
    labels = torch.arange(tokens)
    rows = head[held](dense)
    held_in = list(vars(rows.weight).values()) if isinstance(rows, Quantized) else [rows]
    with LiveBytes() as live:
        live.watch([labels, hidden, *(t for t in held_in if isinstance(t, Tensor))], "given")
        given = live.bytes
        loss = linear_cross_entropy(hidden, rows, labels, softcap=softcap, chunk_tokens=chunk_tokens)
        assert live.bytes == given + hidden.nbytes + loss.nbytes, (
            "between forward and backward the gradient is all there is"
        )
        loss.backward()
    chunk = chunk_tokens * vocabulary * 4
    assert chunk <= live.peak.bytes - given - hidden.nbytes <= 1.1 * chunk


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_widened_and_gradients_narrowed_in_place(dtype: torch.dtype) -> None:
    """To the bit what a second tensor would give, though each overwrites what it is read from.

    The second one has the same strides: for others, some processors' products take another order of sums.
    """
    hidden, weight = normal64(96, 64, seed=0, dtype=dtype), normal64(9001, 64, seed=1, dtype=dtype)
    product = head_rows.multiply_by_head(hidden, head_rows.DenseRows(weight), torch.float32)
    assert torch.equal(product, (hidden @ weight.T).float())
    grad = normal64(96, 9001, seed=2, dtype=torch.float32)
    second = torch.zeros(96, 2 * 9001, dtype=dtype)[:, :9001].copy_(grad)
    expected = torch.nn.functional.linear(second, weight.T)
    assert torch.equal(head_rows.multiply_by_head_transposed_(grad, head_rows.DenseRows(weight), dtype), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [9000, 9001, 9015])
def test_what_is_left_of_wide_gradients_reaches_no_product(dtype: torch.dtype, vocabulary: int) -> None:
    """Whose bits, read as 16-bit numbers, may be infinite or NaN: products on AMX read past an odd row."""
    weight = normal64(vocabulary, 64, seed=1, dtype=dtype)
    grad = torch.full((96, vocabulary), 1.0, dtype=torch.float32)
    grad.view(torch.int32)[:, vocabulary // 2 :] = 0x3F807FC0  # nearly 1; its lower half is a NaN of both dtypes
    expected = grad.double() @ weight.double()
    found = head_rows.multiply_by_head_transposed_(grad, head_rows.DenseRows(weight), dtype)
    assert torch.isfinite(found).all()
    assert (found.double() - expected).norm() <= 0.02 * expected.norm()


def test_a_cpus_chunks_logits_take_about_32_mib() -> None:
    """Whatever the dtype of the hidden states, as its logits are fp32; and 64 chunks are the most."""
    for itemsize in (2, 4, 8):

        def tokens_of(vocabulary: int, tokens: int, itemsize: int = itemsize) -> int:
            return tokens_of_a_chunk(vocabulary, tokens, itemsize, on_card=False)

        assert [tokens_of(v, 2048) for v in (1000, 32_000, 49_152, 128_256, 256_000)] == [1024, 256, 128, 64, 64]
        assert [tokens_of(128_256, tokens) for tokens in (4096, 4097, 131_072)] == [64, 128, 2048]


def step_by_step(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    chunk_tokens: int,
    bias: Tensor | None,
    softcap: Any,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """The sum and its gradient by one operation after another, in the order that a CPU has always had."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    loss, gradient = torch.zeros((), dtype=dtype), torch.zeros_like(hidden)
    for rows in (labels != -100).nonzero().squeeze(1).split(chunk_tokens):
        targets, part = labels[rows].unsqueeze(1), hidden[rows]
        narrow = torch.zeros(len(rows), 2 * len(head), dtype=hidden.dtype)[:, : len(head)]  # with its strides
        logits = linear(part, head) if dtype == hidden.dtype else torch.mm(part, head.T, out=narrow).to(dtype)
        logits = (logits if bias is None else logits + bias) * logit_scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        largest, target_logits = logits.amax(1, keepdim=True), logits.gather(1, targets)
        exponentials = (logits - largest).exp()
        sums = exponentials.sum(1, keepdim=True)
        normalizer = sums.log() + largest
        loss += (normalizer - target_logits).sum()
        grad = exponentials / sums
        if softcap is not None:
            grad *= 1.0 - ((grad.log() + normalizer).clamp(-softcap, softcap) / softcap).square()
            grad.scatter_add_(1, targets, (target_logits / softcap).square() - 1.0)
        else:
            grad.scatter_add_(1, targets, torch.full_like(sums, -1.0))
        grad *= logit_scale
        gradient[rows] = linear(grad if dtype == hidden.dtype else narrow.copy_(grad), head.T)
    return loss, gradient


BITS = [
    (tokens, vocabulary, options, dtype)
    for tokens, vocabulary in ((1, 5), (200, 3001))
    for options in (*OPTIONS, {"softcap": 30.0})
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("tokens", "vocabulary", "options", "dtype"), [*BITS, (300, 32_000, {}, torch.float32)])
def test_a_cpu_computes_the_bits_that_it_always_did(
    tokens: int, vocabulary: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """In the chunks that it always took: 256 tokens of 32,000 logits."""
    hidden, head = normal64(tokens, 24, seed=0, dtype=dtype), normal64(vocabulary, 24, seed=1, dtype=dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[1::9] = -100
    settings = {"softcap": None, "logit_scale": 1.0} | options
    for bias in (None, normal64(vocabulary, seed=2, dtype=dtype)):
        found = value_and_gradient(linear_cross_entropy, hidden, head, labels, bias=bias, **options)
        chunk = 256 if vocabulary == 32_000 else 1024
        wanted, gradient = step_by_step(hidden, head, labels, chunk, bias, **settings)
        assert torch.equal(found[0], wanted)
        assert torch.equal(found[1], 3 * gradient)  # as the incoming gradient there is 3


def test_backward_scales_the_gradient_in_place_and_so_only_once() -> None:
    hidden, head, labels, _ = problem()
    with LiveBytes() as live:
        loss = linear_cross_entropy(hidden, head, labels)
        live.restart_peak()
        before = live.bytes
        loss.backward(retain_graph=True)
    assert live.peak.bytes == before + loss.nbytes, "the gradient that was there, and no copy"
    with pytest.raises(AssertionError, match="called once"):
        loss.backward()
