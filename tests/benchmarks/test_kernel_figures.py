"""The computed figures of benchmarks/kernels.py are what their formulas say, and ours never moves more."""

import pytest
import torch

from benchmarks import bytes_moved
from benchmarks.bytes_moved import Moved, logit_bytes, moved
from qlora_kernels.linear_cross_entropy import LOGIT_PASSES
from qlora_trainer.planning.speed.cost import LOGIT_BYTES_ON_CPU

pytest.importorskip("triton")
from benchmarks import kernels

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def rows() -> dict[str, kernels.Row]:
    return kernels.table()


def test_counting_follows_reads_writes_and_passes() -> None:
    x = ((8, 4), BF16)
    assert moved(lambda x: x + 1.0, x) == Moved(128, 1)
    assert moved(lambda x: x.view(32)[:4].mul_(2.0), x) == Moved(16, 1)
    assert moved(lambda x, y: x + y, x, ((1, 4), BF16)) == Moved(64 + 8 + 64, 1)
    assert moved(lambda x, y: x + y.expand(8, 4), x, ((1, 4), BF16)) == Moved(64 + 8 + 64, 1)
    assert moved(lambda x: torch.empty_like(x).copy_(x), x) == Moved(128, 1)
    assert moved(lambda x: x * 2.0, x, gradients=1) == Moved(128, 1)


def test_counting_by_an_index_takes_as_many_numbers_as_the_index_has() -> None:
    x, index = ((8, 4), BF16), ((8, 1), torch.int64)
    assert moved(lambda x, index: x.gather(1, index), x, index) == Moved(8 * (8 + 2 + 2), 1)
    assert moved(lambda x, i, y: x.scatter_add_(1, i, y), x, index, ((8, 1), BF16)) == Moved(8 * (8 + 3 * 2), 1)


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"logit_scale": 0.1}])
@pytest.mark.parametrize(("dtype", "expected"), [(BF16, 10), (torch.float16, 10), (torch.float32, 20)])
def test_the_loss_moves_at_most_20_bytes_a_logit_on_a_card(
    dtype: torch.dtype, expected: int, options: dict[str, float]
) -> None:
    """Of which the product writes and reads two: what is between them reads twice and writes once."""
    assert expected == LOGIT_PASSES * dtype.itemsize
    assert logit_bytes(dtype, on_card=True, **options) == pytest.approx(expected, abs=0.01)


def test_the_loss_moves_56_bytes_a_logit_of_16_bits_in_plain_torch() -> None:
    """Product 2, widened 4 + 6, largest 4, less it 8, exponential 8, sum 4, divided 8, narrowed 6 + 4, product 2."""
    assert logit_bytes(BF16, on_card=False) == pytest.approx(56, abs=0.01)
    assert LOGIT_BYTES_ON_CPU[BF16.itemsize] == 56


def test_the_loss_moves_40_bytes_a_logit_of_fp32_in_plain_torch() -> None:
    """Product 4, largest 4, less it 8, exponential 8, sum 4, divided 8, product 4: nothing is widened or narrowed."""
    assert logit_bytes(torch.float32, on_card=False) == pytest.approx(40, abs=0.01)
    assert LOGIT_BYTES_ON_CPU[torch.float32.itemsize] == 40


def test_the_losss_figures_are_printed_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    bytes_moved.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["bfloat16", "56.0", "10.0"] in lines
    assert ["2,048", "64,", "31.3", "67.2", "256,", "62.6", "16.8"] in lines


def test_dequantizing_reads_the_four_bits_and_their_scales_once_and_writes_once(rows: dict[str, kernels.Row]) -> None:
    elements = 4096 * 11008
    tables = elements // 2 + elements // 64 + 4 * elements // (64 * 256) + 4 * 256 + 4
    row = rows["NF4 -> bf16, 4,096 x 11,008"]
    assert row.ours == Moved(tables + 2 * elements, 1)
    # bitsandbytes writes the scales in fp32, adds the offset to them, and reads them with the codes.
    assert row.others == {"bitsandbytes": Moved(row.ours.bytes + (4 + 4 + 4 + 4) * elements // 64, 3)}


def test_norms_read_and_write_their_rows_once(rows: dict[str, kernels.Row]) -> None:
    rows_bytes, inverse, weight = 2 * 2048 * 4096, 4 * 2048, 2 * 4096
    assert rows["RMSNorm"].ours == Moved(2 * rows_bytes + inverse + weight, 1)
    assert rows["RMSNorm, backward"].ours == Moved(3 * rows_bytes + inverse + weight, 1)


def test_the_loss_reads_its_logits_twice_and_writes_them_once(rows: dict[str, kernels.Row]) -> None:
    logits, targets, losses = 2 * 256 * 32_000, 8 * 256, 4 * 256
    # The targets are filled with zeros first.
    assert rows["loss and gradient of 256 tokens"].ours == Moved(3 * logits + 2 * targets + losses, 2)


def test_ours_moves_less_in_no_more_passes_wherever_it_is_used(rows: dict[str, kernels.Row]) -> None:
    for name, row in rows.items():
        for other in row.others.values():
            assert row.ours.bytes < other.bytes, name
            assert row.ours.passes <= other.passes, name


def test_a_cards_arithmetic_is_what_its_maker_publishes() -> None:
    published = {"RTX 3090": 71.2, "RTX 4090": 165.2, "RTX 5090": 209.5}  # TFLOPS
    for name, tera in published.items():
        assert kernels.CARDS[name].flops == pytest.approx(tera * 1e12, rel=2e-3)


def test_a_step_takes_no_less_than_its_products(rows: dict[str, kernels.Row]) -> None:
    assert pytest.approx(6.48e9, rel=1e-3) == kernels.BASE
    for card in kernels.CARDS.values():
        found = kernels.roofline(card, rows)
        assert found.products > 6 * kernels.BASE * kernels.TOKENS / card.flops
        assert found.step(0) < found.step(1)


@pytest.mark.parametrize("part", ["bytes", "roofline"])
def test_figures_are_printed_and_said_to_be_computed(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    kernels.PARTS[part]()
    assert "computed" in capsys.readouterr().out
