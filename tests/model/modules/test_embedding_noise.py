"""Promises of noise on input embeddings: of NEFTune's size for each row, in training alone, and repeatable."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from qlora_trainer.data.batching.packing import Pack, make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.model.modules.embedding_noise import EmbeddingNoise

ALPHA, HIDDEN = 5.0, 400


class OnlyEmbedding(nn.Module):
    """As much of a model as noise asks for; embeddings are zero, so that noise is all that comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, HIDDEN, _weight=torch.zeros(7, HIDDEN))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


def pack_of(*lengths: int, packing: bool) -> Pack:
    (pack,) = make_packs([Example([1] * length, [1] * length) for length in lengths], 1000, packing)
    return pack


def noise_on(pack: Pack, alpha: float = ALPHA) -> Tensor:
    model = OnlyEmbedding()
    noise = EmbeddingNoise(model, alpha)
    with torch.no_grad(), noise.on(pack):
        return model.embedding(pack.input_ids)


def theirs(rows: int, length: int) -> Tensor:
    model: Any = OnlyEmbedding().embedding.train()
    model.neftune_noise_alpha = ALPHA
    with torch.no_grad():
        return neftune_post_forward_hook(model, None, torch.zeros(rows, length, HIDDEN))


def assert_alike(ours: Tensor, peer: Tensor, length: int) -> None:
    """Both are uniform in the same range: of n draws the largest is within 20/n of its end, and the squares agree."""
    end = ALPHA / (length * HIDDEN) ** 0.5
    for found in (ours, peer):
        assert end * (1 - 20 / found.numel()) < float(found.abs().max()) <= end * (1 + 1e-6)
        # A square of a uniform number has a variance of (1/5 - 1/9) end^4; five standard deviations.
        bound = 5.0 * ((1 / 5 - 1 / 9) / found.numel()) ** 0.5
        assert float(found.double().square().mean()) / end**2 == pytest.approx(1 / 3, abs=bound)
        assert abs(float(found.double().mean())) <= 5.0 * end / (3 * found.numel()) ** 0.5


def test_each_packed_row_has_noise_by_its_own_length() -> None:
    torch.manual_seed(0)
    lengths = [3, 40, 12]
    pack = pack_of(*lengths, packing=True)
    parts = noise_on(pack)[0].split(pack.row_lengths)
    assert sorted(len(part) for part in parts) == sorted(lengths)
    for part in parts:
        assert_alike(part, theirs(1, len(part)), len(part))


def test_padded_rows_have_the_noise_of_transformers() -> None:
    torch.manual_seed(0)
    assert_alike(noise_on(pack_of(5, 40, packing=False)), theirs(2, 40), 40)


def test_noise_is_drawn_anew_and_again_under_the_same_random_state() -> None:
    pack = pack_of(3, 4, packing=True)
    torch.manual_seed(3)
    first, second = noise_on(pack), noise_on(pack)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(noise_on(pack), first)


def test_there_is_no_noise_outside_of_training() -> None:
    model, pack = OnlyEmbedding(), pack_of(3, packing=True)
    noise = EmbeddingNoise(model, ALPHA)
    with noise.on(pack):
        assert model.embedding(pack.input_ids).any()
    assert not model.embedding(pack.input_ids).any()
    assert not noise_on(pack, alpha=0.0).any()
