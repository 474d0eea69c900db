"""Promises of a fold: rows of the merged weight, and the change of the base behind a change of them."""

import torch

from qlora_trainer.adapters.folds import LoraFold


def test_rows_of_a_lora_fold_are_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, A, B = (torch.randn(shape, generator=generator) for shape in ((6, 5), (2, 5), (6, 2)))
    fold = LoraFold(A, B, 0.5)
    assert fold.fits((6, 5))
    assert not fold.fits((5, 6))
    expected = (weight.double() + 0.5 * B.double() @ A.double()).float()
    for rows in (slice(0, 6), slice(2, 5)):
        assert torch.allclose(fold.rows(weight[rows], rows), expected[rows], rtol=1e-6, atol=1e-6)


def test_a_change_of_the_base_changes_the_merged_rows_as_was_asked() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, change, A, B = (
        torch.randn(shape, generator=generator, dtype=torch.float32) for shape in ((4, 3), (4, 3), (2, 3), (4, 2))
    )
    fold, rows = LoraFold(A, B, 2.0), slice(0, 4)
    changed = fold.rows(weight + fold.change_of_base(weight, change, rows), rows)
    assert torch.allclose(changed - fold.rows(weight, rows), change, atol=1e-5)
    assert not torch.allclose(changed, fold.rows(weight, rows))
