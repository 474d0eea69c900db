"""The table of cards names its sources, and a card that is not in it is derived, cautiously, in words."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.load import make_config
from qlora_trainer.planning.speed.candidates import Pace, choices_left
from qlora_trainer.planning.speed.cards import CAUTIOUS, TABLE, card_named, derive_card, find_card
from qlora_trainer.planning.speed.rates import (
    LINK_SHARE,
    PRODUCTS_SHARE,
    Rates,
    rates_here,
    rates_of_card,
    rates_of_processor,
)
from qlora_trainer.planning.speed.rows import full_rows

CONFIG = make_config({"model": {"name": "m"}, "data": {"train": "rows.jsonl", "max_length": 64}})

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
    assert card is not None
    assert card.flops == pytest.approx(share * 154.8e12, rel=1e-3)
    assert card.bandwidth == pytest.approx(768e9, rel=1e-3)
    assert card.link == 8 * 0.985e9
    assert "not in the table" in said
    assert ("half rate" in said) == (share < 1)
    assert "PCIe 3.0 x8" in said
    assert rates_of_card(card).link == LINK_SHARE * card.link


@pytest.fixture
def rates_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rates]:
    """The rates of this machine's GPU, of which CUDA says what an A6000's driver does, but for some properties."""

    def rates(**changed: Any) -> Rates:
        properties = SimpleNamespace(**({"name": "Some GPU"} | AN_A6000 | changed))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return rates_here(torch.device("cuda", 0))

    return rates


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("multi_processor_count", 0, "multi_processor_count 0"),
        ("multi_processor_count", None, "multi_processor_count unknown"),
        ("multi_processor_count", 10**6, "multi_processor_count 1e+06"),
        ("clock_rate", 0, "clock_rate 0"),
        ("clock_rate", -1, "clock_rate -1"),
        ("memory_clock_rate", float("nan"), "memory_clock_rate unknown"),
        ("memory_bus_width", None, "memory_bus_width unknown"),
        ("memory_bus_width", "384", "memory_bus_width unknown"),
        ("total_memory", 0, "total_memory 0"),
        ("total_memory", -(2**33), "total_memory -8.58993e+09"),
        ("total_memory", 2**60, "total_memory 1.15292e+18"),
        ("major", 0, "major 0"),
    ],
)
def test_absurd_properties_get_a_word_and_the_cautious_choice(
    rates_of: Callable[..., Rates], key: str, value: Any, said: str
) -> None:
    """One longest row, and policies in the order of a slow card: nothing is computed from what cannot be."""
    rates = rates_of(**{key: value})
    assert not rates.is_known
    assert rates == rates_of_card(CAUTIOUS, rates.note, is_known=False)
    assert rates.note.startswith(f"Some GPU is not in the table of cards, and by what CUDA says of it ({said})")
    assert "a micro-batch is one longest row" in rates.note
    limits = choices_left(CONFIG, Pace(rates, full_rows(64, 8, packing=True)), 2)[1]
    assert limits == [64]


def test_a_driver_that_says_nothing_gets_a_word_and_the_cautious_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    rates = rates_here(torch.device("cuda", 0))
    assert not rates.is_known
    assert all(f"{key} unknown" in rates.note for key in AN_A6000)


@pytest.mark.parametrize("name", [None, "", 7])
def test_a_card_without_a_name_goes_by_its_properties(rates_of: Callable[..., Rates], name: Any) -> None:
    rates = rates_of(name=name)
    assert rates.is_known
    assert rates.name == "This GPU"
    assert rates.note.startswith("This GPU is not in the table of cards: by its properties it does 155 TFLOP/s")
    assert choices_left(CONFIG, Pace(rates, full_rows(64, 8, packing=True)), 2)[1] == [64, 128, 192, 256, 384, 512]


def test_a_card_in_the_table_goes_by_it_whatever_its_driver_says(rates_of: Callable[..., Rates]) -> None:
    rates = rates_of(name="NVIDIA GeForce RTX 4090", clock_rate=0, total_memory=-1)
    assert rates == rates_of_card(card_named("RTX 4090"))


def test_a_processor_is_rated_by_its_kind_and_threads() -> None:
    one, two = rates_of_processor(1), rates_of_processor(2)
    assert (one.threads, two.threads) == (1, 2)
    assert two.products == one.products, "of one thread"
    assert two.speedup(np.array([1, 2])) == pytest.approx([1.0, 1.5]), "as measured: decision 0045"
    assert not one.overlaps
    assert PRODUCTS_SHARE < 1
