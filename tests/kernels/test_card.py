"""How attention is computed on a card, and why not better: reported in words that say what would change it."""

import re
from typing import Any

import pytest
import torch

from qlora_kernels.card import Card, attention_in_words, flash_refusal

NEW = frozenset({"scale", "window_size", "enable_gqa"})
REFUSALS: list[tuple[tuple[int, int], torch.dtype, int, frozenset[str], str, bool, str | None]] = [
    ((8, 0), torch.bfloat16, 128, NEW, "auto", True, None),
    ((12, 0), torch.float16, 64, NEW, "fast", True, None),
    ((9, 0), torch.bfloat16, 256, NEW - {"enable_gqa"}, "auto", True, None),
    ((7, 5), torch.float16, 128, NEW, "auto", True, "compute capability 8.0 .Ampere. or higher, and this one has 7.5"),
    ((8, 6), torch.float32, 128, NEW, "auto", True, "this is float32; take bfloat16"),
    ((8, 6), torch.bfloat16, 100, NEW, "auto", True, "these have 100"),
    ((8, 6), torch.bfloat16, 200, NEW, "auto", True, "these have 200"),
    ((8, 6), torch.bfloat16, 128, frozenset({"scale"}), "auto", True, "no window; install a newer torch"),
    ((8, 6), torch.bfloat16, 128, frozenset(), "auto", True, "no window; install a newer torch"),
    ((8, 6), torch.bfloat16, 128, NEW, "reference", True, "QLORA_KERNELS=reference .* unset it"),
    ((9, 4), torch.bfloat16, 128, NEW, "auto", False, "not built for CUDA"),
]


@pytest.mark.parametrize(("capability", "dtype", "head_dim", "offered", "choice", "has_cuda", "reason"), REFUSALS)
def test_why_flash_attention_is_not_taken_is_reported_with_what_would_change_it(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    offered: frozenset[str],
    choice: str,
    has_cuda: bool,
    reason: str | None,
) -> None:
    found = flash_refusal(capability, dtype, head_dim, offered, choice, has_cuda=has_cuda)
    assert (found is None) == (reason is None)
    if found and reason:
        assert re.search(reason, found)


@pytest.mark.parametrize(
    ("card", "dtype", "options", "words"),
    [
        (Card((8, 9), 128), torch.bfloat16, {}, "^flash attention over packed documents$"),
        (Card((7, 5), 40), torch.float16, {}, "^one document after another.*by blocks.*this one has 7.5$"),
        (Card((8, 9), 128), torch.bfloat16, {"dropout": 0.1}, "it has no dropout$"),
        (Card((8, 9), 128), torch.bfloat16, {"softcap": 50.0}, "^by blocks of queries: no fused .* soft cap$"),
        (None, torch.float32, {}, "^one document after another, with a window by blocks of queries$"),
    ],
)
def test_attention_is_reported_in_words(
    monkeypatch: pytest.MonkeyPatch, card: Card | None, dtype: torch.dtype, options: Any, words: str
) -> None:
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    assert re.search(words, attention_in_words(card, dtype, 128, **options))
