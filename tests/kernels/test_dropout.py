"""Dropout's mask: a function of its seed, of the share asked for everywhere."""

import pytest
import torch
from adapted_layers import SEED
from random_tensors import normal

from qlora_kernels.dropout import draw_seed, keep_mask


def test_dropout_is_the_same_under_the_same_global_random_state() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = draw_seed(), draw_seed()
    torch.set_rng_state(state)
    assert (draw_seed(), draw_seed()) == (first, second)
    assert first != second
    like = normal(50, 7)
    assert torch.equal(keep_mask(like, 64, 0.3, first), keep_mask(like, 64, 0.3, first))
    assert not torch.equal(keep_mask(like, 64, 0.3, first), keep_mask(like, 64, 0.3, second))


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_share_asked_for_everywhere(dropout: float, dtype: torch.dtype) -> None:
    kept = keep_mask(normal(1000, 7, dtype=dtype), 402, dropout, SEED)
    assert (kept.shape, kept.dtype) == ((1000, 402), dtype)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    variance = dropout * (1.0 - dropout)
    parts = {"all": kept.double().view(1, -1), "rows": kept.double(), "columns": kept.double().T}
    parts |= {f"each fourth from {lane}": kept.view(-1)[lane::4].double().view(1, -1) for lane in range(4)}
    for name, part in parts.items():
        bound = 5.0 * (variance / part.shape[1]) ** 0.5 + 1e-5  # five standard deviations, and the rounding
        assert float((part.mean(1) - (1.0 - dropout)).abs().max()) <= bound, name
    if dropout == 0.5:  # neighbors, drawn together, are independent
        together = (kept[:, 1:] * kept[:, :-1]).double().mean()
        assert float(together) == pytest.approx(0.25, abs=5.0 * (0.25 * 0.75 / kept.numel()) ** 0.5)
