"""The chunked loss as on a CUDA card, on tensors of a CPU that are planned for one: logits stay in 16 bits."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from plain_losses import Quantized, plain_loss
from plain_losses import value_and_gradient as value_and_gradient_of
from random_tensors import normal64
from torch import Tensor

from qlora_kernels import linear_cross_entropy as module
from qlora_kernels.card import Card, planned_for
from qlora_kernels.head_rows import DenseRows, HeadRows
from qlora_kernels.int8 import quantize_int8
from qlora_kernels.linear_cross_entropy import linear_cross_entropy, tokens_of_a_chunk
from qlora_kernels.nf4 import quantize_nf4
from qlora_trainer.planning.fake_tensors import FakeRun
from qlora_trainer.planning.live_bytes import LiveBytes

CARD = Card((8, 0), 128)
MIB = 2**20
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SLACK = {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 1e-5, torch.float64: 1e-12}
"""Relative: other sums, where plain torch is lucky. With fp64 nothing more exact is at hand."""


@pytest.fixture
def on_a_card() -> Iterator[None]:
    with planned_for(CARD):
        yield


value_and_gradient = functools.partial(value_and_gradient_of, incoming=1.0)  # any other is rounded once more

HELD: dict[str, Callable[[Tensor], HeadRows]] = {
    "dense": DenseRows,
    "dense fp32": lambda weight: DenseRows(weight.float()),
    "nf4": lambda weight: Quantized(quantize_nf4(weight)),
    "int8": lambda weight: Quantized(quantize_int8(weight)),
}


def problem(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (T, H), head (V, H), labels (T,) of which a third are -100 if there are more, bias (V,)."""
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(3))
    labels[1::3] = -100
    hidden = normal64(tokens, 64, seed=0, dtype=dtype)
    return hidden, normal64(vocabulary, 64, seed=1, dtype=dtype), labels, normal64(vocabulary, seed=2, dtype=dtype)


OPTIONS: list[dict[str, float]] = [{}, {"softcap": 20.0}, {"logit_scale": 0.1}, {"softcap": 5.0, "logit_scale": 1.7}]


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 65), (90, 1001), (40, 2048)])
def test_loss_and_gradient_err_no_more_than_the_plain_loss_does(
    tokens: int, vocabulary: int, held: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    hidden, weight, labels, bias = problem(tokens, vocabulary, dtype)
    head = HELD[held](weight)
    whole = head.rows(0, vocabulary, dtype)
    options = {**options, "bias": bias}
    found = value_and_gradient(linear_cross_entropy, hidden, head, labels, chunk_tokens=16, **options)
    plain = value_and_gradient(plain_loss, hidden, whole, labels, **options)
    double = {**options, "bias": bias.double()}
    exact = value_and_gradient(plain_loss, hidden.double(), whole.double(), labels, **double)
    for mine, other, truth in zip(found, plain, exact, strict=True):
        assert mine.dtype == other.dtype
        error, allowed = ((result.double() - truth).norm() for result in (mine, other))
        assert error <= 1.1 * allowed + SLACK[mine.dtype] * truth.norm()


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_states_that_are_no_numbers_give_no_finite_loss(dtype: torch.dtype, bad: float) -> None:
    hidden, head, labels, _ = problem(30, 101, dtype)
    hidden[3, 5] = bad  # with a label
    value, gradient = value_and_gradient(linear_cross_entropy, hidden, head, labels)
    assert not value.isfinite()
    assert not gradient[3].isfinite().any()
    assert gradient[[0, 2, 5]].isfinite().all()


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_logits_stay_finite_and_fp16_that_overflows_does_not(dtype: torch.dtype) -> None:
    hidden, head, labels, _ = problem(30, 101, dtype)
    value, gradient = value_and_gradient(linear_cross_entropy, hidden * 1e4, head, labels)
    assert value.isfinite()
    assert gradient.isfinite().all()
    value, _ = value_and_gradient(linear_cross_entropy, hidden.half() * 3e3, head.half(), labels)
    assert not value.isfinite()


@pytest.mark.usefixtures("on_a_card")
def test_no_label_at_all_gives_zero_and_a_zero_gradient() -> None:
    hidden, head, labels, _ = problem(30, 101, torch.bfloat16)
    value, gradient = value_and_gradient(linear_cross_entropy, hidden, head, torch.full_like(labels, -100))
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(hidden))


@pytest.mark.usefixtures("on_a_card")
@pytest.mark.parametrize("vocabulary", [8192, 8191])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("held", ["dense", "nf4", "int8"])
def test_the_peak_beyond_hidden_states_and_their_gradient_is_one_chunk_in_16_bits(
    held: str, softcap: float | None, vocabulary: int
) -> None:
    """Where an odd row is filled up to a multiple of 16 numbers."""
    tokens, chunk_tokens = 300, 128
    hidden, weight, _, _ = problem(tokens, vocabulary, torch.bfloat16)
    hidden.requires_grad_()
    head = HELD[held](weight)
    given = [hidden, *(value for value in vars(head.weight).values() if isinstance(value, Tensor))]  # type: ignore[attr-defined]
    if held == "dense":
        given = [hidden, weight]
    labels = torch.arange(tokens)
    with LiveBytes() as live:
        live.watch([labels, *given], "given")
        before = live.bytes
        linear_cross_entropy(hidden, head, labels, softcap=softcap, chunk_tokens=chunk_tokens).backward()
    chunk = chunk_tokens * 8192 * 2
    allowed = 1.1 * chunk + (vocabulary * 64 * 4 if held == "int8" else 0)  # a block, all of it here, and a cast of it
    assert chunk <= live.peak.bytes - before - hidden.nbytes <= allowed


@pytest.mark.parametrize(
    ("card", "dtype", "mebibytes"),
    [(CARD, torch.bfloat16, 62.6), (CARD, torch.float32, 125.2), (None, torch.bfloat16, 31.3)],
)
def test_a_plan_sees_the_chunk_of_the_card_that_it_is_for(
    card: Card | None, dtype: torch.dtype, mebibytes: float
) -> None:
    """Of an 8B's head, 128,256 rows of 4,096: 256 tokens on a card, 64 on a CPU, whose logits are fp32."""
    with FakeRun(card), LiveBytes() as live:
        hidden = torch.empty(2048, 4096, dtype=dtype, requires_grad=True)
        head = torch.empty(128_256, 4096, dtype=dtype)
        given = live.bytes
        linear_cross_entropy(hidden, head, torch.empty(2048, dtype=torch.int64))
    logits = (live.peak.bytes - given - hidden.nbytes) / MIB
    assert mebibytes <= logits <= 1.1 * mebibytes


def test_a_cards_chunk_is_at_least_256_tokens_and_about_32_mib() -> None:
    def chunks(tokens: int, itemsize: int = 2) -> list[int]:
        vocabularies = (1000, 32_000, 49_152, 128_256, 151_936, 262_144)
        return [tokens_of_a_chunk(v, tokens, itemsize, on_card=True) for v in vocabularies]

    assert chunks(2048) == [1024, 512, 256, 256, 256, 256]
    assert chunks(2048, itemsize=4) == [1024, 256, 256, 256, 256, 256]
    assert chunks(16_384) == chunks(2048)
    assert chunks(16_385)[3:] == [512, 512, 512], "and the head is read for 64 chunks at most"
    assert all(tokens_of_a_chunk(128_256, tokens, 2, on_card=True) % 256 == 0 for tokens in range(1, 10**6, 9_999))


@pytest.mark.parametrize(("card", "tokens"), [(CARD, 256), (None, 64)])
def test_a_chunk_is_the_cards_on_a_card_and_a_cpus_on_a_cpu(
    card: Card | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where no gradient is wanted too."""
    seen: list[tuple[int, torch.dtype]] = []
    real = module.softmax_loss_

    def noting(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        seen.append((len(logits), logits.dtype))
        return real(logits, *arguments, **options)

    monkeypatch.setattr(module, "softmax_loss_", noting)
    hidden = torch.zeros(300, 1, dtype=torch.bfloat16, requires_grad=True)
    head, labels = torch.zeros(2**17, 1, dtype=torch.bfloat16), torch.zeros(300, dtype=torch.int64)
    dtype = torch.bfloat16 if card else torch.float32
    with planned_for(card):
        linear_cross_entropy(hidden, head, labels)
        with torch.no_grad():
            linear_cross_entropy(hidden, head, labels)
    whole, rest = divmod(300, tokens)
    assert seen == 2 * ([(tokens, dtype)] * whole + [(rest, dtype)])


@pytest.mark.usefixtures("on_a_card")
def test_rows_of_logits_begin_where_tensor_cores_read_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    strides = []
    real = module.softmax_loss_

    def noting(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        strides.append((logits.shape[1], *logits.stride(), logits.data_ptr() % 32))
        return real(logits, *arguments, **options)

    monkeypatch.setattr(module, "softmax_loss_", noting)
    for vocabulary in (64, 65, 32_001):
        hidden, head, labels, _ = problem(9, vocabulary, torch.bfloat16)
        linear_cross_entropy(hidden.requires_grad_(), head, labels)
    assert strides == [(64, 64, 1, 0), (65, 80, 1, 0), (32_001, 32_016, 1, 0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 65), (600, 32_001), (600, 128_256)])
def test_on_cuda_loss_and_gradient_err_no_more_than_the_plain_loss_does(
    tokens: int, vocabulary: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    hidden, head, labels, bias = (tensor.cuda() for tensor in problem(tokens, vocabulary, dtype))
    found = value_and_gradient(linear_cross_entropy, hidden, head, labels, bias=bias, **options)
    plain = value_and_gradient(plain_loss, hidden, head, labels, bias=bias, **options)
    exact = value_and_gradient(plain_loss, hidden.double(), head.double(), labels, bias=bias.double(), **options)
    for mine, other, truth in zip(found, plain, exact, strict=True):
        error, allowed = ((result.double() - truth).norm() for result in (mine, other))
        assert error <= 1.1 * allowed + SLACK[mine.dtype] * truth.norm()
