"""The table of cards names its sources, and a card that is not in it is derived, cautiously, in words."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.planning.speed.cards import CAUTIOUS, TABLE, card_named, derive_card, find_card
from qlora_trainer.planning.speed.rates import LINK_SHARE, PRODUCTS_SHARE, rates_of_card, rates_of_processor

AN_A6000: dict[str, Any] = {  # as CUDA describes it: 84 processors at 1.8 GHz, 384 bits at 2 x 8 GHz
    "major": 8,
    "minor": 6,
    "multi_processor_count": 84,
    "total_memory": 48 * 10**9,
    "clock_rate": 1_800_000,
    "memory_clock_rate": 8_001_000,
    "memory_bus_width": 384,
}


@pytest.mark.parametrize(("name", "teraflops"), [("RTX 3090", 71), ("RTX 4090", 165.2), ("RTX 5090", 209.5)])
def test_the_papers_figures_are_those_of_the_table(name: str, teraflops: float) -> None:
    """NVIDIA's "peak BF16 Tensor TFLOPS with FP32 accumulate", dense."""
    assert card_named(name).flops == pytest.approx(teraflops * 1e12, rel=5e-3)


def test_every_card_has_a_source_and_figures_that_can_be() -> None:
    assert len({card.name for card in TABLE}) == len(TABLE)
    for card in TABLE:
        assert card.source, card.name
        assert 10e12 < card.flops < 3e15
        assert 1e11 < card.bandwidth < 1e13
        assert 8e9 < card.memory < 200e9
        assert (card.lanes, card.generation) in {(16, 4), (8, 4), (16, 5)}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx 4060 ti", "RTX 4060 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("h200", "H200"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("RTX 4090 D", None),
        ("", None),
    ],
)
def test_a_card_is_known_by_the_names_that_torch_and_people_give_it(written: str, name: str | None) -> None:
    found = find_card(written)
    assert (found and found.name) == name


def test_an_unknown_name_is_refused_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"'RTX 9999'\. Known are: RTX 3060, .*--gpu-memory"):
        card_named("RTX 9999")


@pytest.mark.parametrize(("name", "share"), [("NVIDIA RTX A6000", 1.0), ("NVIDIA GeForce RTX 3090 Ti", 0.5)])
def test_a_card_that_is_not_in_the_table_goes_by_its_properties(name: str, share: float) -> None:
    """NVIDIA says 154.8 TFLOPS of its A6000; a GeForce of the same properties does half; PCIe is taken for 3.0 x8."""
    card, said = derive_card(name, SimpleNamespace(**AN_A6000))
    assert card.flops == pytest.approx(share * 154.8e12, rel=1e-3)
    assert card.bandwidth == pytest.approx(768e9, rel=1e-3)
    assert card.link == 8 * 0.985e9
    assert "not in the table" in said
    assert ("half rate" in said) == (share < 1)
    assert "PCIe 3.0 x8" in said
    assert rates_of_card(card).link == LINK_SHARE * card.link


@pytest.mark.parametrize(
    "changed",
    [
        {"multi_processor_count": 0},
        {"clock_rate": -1},
        {"memory_bus_width": None},
        {"memory_clock_rate": float("nan")},
        {"total_memory": 2**60},
    ],
    ids=str,
)
def test_absurd_properties_get_a_word_and_the_cautious_choice(changed: dict[str, Any]) -> None:
    card, said = derive_card("Some GPU", SimpleNamespace(**(AN_A6000 | changed)))
    assert card == CAUTIOUS
    assert next(iter(changed)) in said
    assert "a micro-batch is one longest row" in said


def test_a_processor_is_rated_by_its_kind_and_threads() -> None:
    one, two = rates_of_processor(1), rates_of_processor(2)
    assert (one.threads, two.threads) == (1, 2)
    assert two.products == one.products, "of one thread"
    assert two.speedup(np.array([1, 2])) == pytest.approx([1.0, 1.5]), "as measured: decision 0045"
    assert not one.overlaps
    assert PRODUCTS_SHARE < 1
