"""List GPUs with the published figures that the time of a step depends on, and derive those of a GPU not listed.

Sources of the table:
- GA102, Ada and RTX Blackwell: NVIDIA's architecture papers ("Ampere GA102 GPU Architecture", "Ada GPU Architecture",
  "RTX Blackwell GPU Architecture"), whose figures of "peak BF16 Tensor TFLOPS with FP32 accumulate", dense, are 71 for
  the RTX 3090, 165.2 for the 4090 and 209.5 for the 5090. The product of multiprocessors, boost clock and 512
  operations a cycle gives them again; for the GeForce cards that these papers leave out it is taken in their place, and
  the line says "derived". Clocks, bandwidths, memory and PCIe lanes are those of NVIDIA's product pages.
- L4, A100, H100, H200: NVIDIA's data sheets, where figures "with sparsity" are twice the dense ones given here.

Memory is in decimal gigabytes, as cards are sold: a little less than most have.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_trainer.common.errors import ConfigError

LANE_BYTES = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}
"""Bytes a second of one PCIe lane in one direction, by generation: 8, 16 and 32 GT/s, of which 128 in
130 bits are data."""

GEFORCE_OPERATIONS = 512  # of bf16 with fp32 sums a cycle and multiprocessor: half of what other cards of the chip do
OPERATIONS = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (12, 0): 1024}
"""Dense 16-bit operations with fp32 sums a cycle and multiprocessor, by compute capability, of cards that are not
GeForce. From the table's figures: 312 TFLOPS in an A100's 108 processors at 1.41 GHz, 989 in an H100's 132 at 1.83."""

OLDER_OPERATIONS = 128  # a card without tensor cores: fp32's
UNKNOWN_LINK = (8, 3)  # lanes and generation of a card that is not in the table


@dataclass(frozen=True)
class CardFigures:
    """Hold what is published of a card, or derived."""

    name: str
    flops: float  # bf16 products with fp32 sums, dense, a second
    bandwidth: float  # bytes of its memory a second
    memory: int  # bytes
    lanes: int  # of PCIe
    generation: int  # of PCIe
    source: str
    names: tuple[str, ...] = ()  # others that torch gives it

    @property
    def link(self) -> float:
        """Return the bytes a second to or from the host, in one direction.

        Returns:
            Bytes a second.
        """
        return self.lanes * LANE_BYTES[self.generation]


def _geforce(
    name: str, processors: int, boost: float, bandwidth: float, gigabytes: int, lanes: int, generation: int, source: str
) -> CardFigures:
    flops = GEFORCE_OPERATIONS * processors * boost
    return CardFigures(f"RTX {name}", flops, bandwidth, gigabytes * 10**9, lanes, generation, source)


_GA102, _ADA, _BLACKWELL = "GA102 architecture paper", "Ada architecture paper", "RTX Blackwell architecture paper"
_DERIVED = "derived: 512 operations a cycle and multiprocessor at the product page's boost clock"
_SHEET = "NVIDIA data sheet"

TABLE = (
    _geforce("3060", 28, 1.777e9, 360e9, 12, 16, 4, _DERIVED),
    _geforce("3090", 82, 1.695e9, 936.2e9, 24, 16, 4, _GA102),
    _geforce("4060 Ti", 34, 2.535e9, 288e9, 16, 8, 4, _DERIVED),
    _geforce("4070", 46, 2.475e9, 504.2e9, 12, 16, 4, _DERIVED),
    _geforce("4090", 128, 2.52e9, 1008e9, 24, 16, 4, _ADA),
    _geforce("5090", 170, 2.407e9, 1792e9, 32, 16, 5, _BLACKWELL),
    CardFigures("L4", 121e12, 300e9, 24 * 10**9, 16, 4, _SHEET),
    CardFigures("A100", 312e12, 2039e9, 80 * 10**9, 16, 4, _SHEET, ("a100 sxm4 80gb", "a100 80gb", "a100 sxm 80gb")),
    CardFigures("A100 40GB", 312e12, 1555e9, 40 * 10**9, 16, 4, _SHEET, ("a100 sxm4 40gb", "a100 pcie 40gb")),
    CardFigures("A100 PCIe", 312e12, 1935e9, 80 * 10**9, 16, 4, _SHEET, ("a100 80gb pcie",)),
    CardFigures("H100", 989.4e12, 3350e9, 80 * 10**9, 16, 5, _SHEET, ("h100 80gb hbm3", "h100 sxm", "h100 sxm5")),
    CardFigures("H100 PCIe", 756e12, 2000e9, 80 * 10**9, 16, 5, _SHEET),
    CardFigures("H200", 989.4e12, 4800e9, 141 * 10**9, 16, 5, _SHEET, ("h200 sxm",)),
)
CAUTIOUS = TABLE[2]  # for an unknown card, to put policies in order: of the table, that with least bandwidth and lanes


def find_card(name: str) -> CardFigures | None:
    """Find a card in the table.

    Args:
        name: as torch gives it, or as people write it: "NVIDIA GeForce RTX 4090", "rtx 4090" or "4090".

    Returns:
        The card; None where it is not there. A laptop's card of the same number is another card.
    """
    wanted = _plain(name)
    for card in TABLE:
        if wanted in {_plain(known) for known in (card.name, *card.names)}:
            return card
    return None


def card_named(name: str) -> CardFigures:
    """Return a card of the table.

    Args:
        name: as people write it.

    Returns:
        The card.

    Raises:
        ConfigError: the table has no such card.
    """
    if card := find_card(name):
        return card
    known = ", ".join(card.name for card in TABLE)
    raise ConfigError(
        f"There are no figures for a GPU named {name!r}. Known are: {known}. For another, give its memory alone: "
        "--gpu-memory 16GB"
    )


def derive_card(name: str, properties: Any) -> tuple[CardFigures | None, str]:
    """Derive a card's figures from what CUDA says of it.

    Args:
        name: as torch gives it.
        properties: torch.cuda.get_device_properties' result.

    Returns:
        The figures, None where the properties are missing or cannot be those of a card; and a sentence that says where
        the figures come from, or what is taken without them.
    """
    read = {key: _number(properties, key) for key in _LIMITS}
    if absurd := {key: value for key, value in read.items() if value is None or not _is_within(value, *_LIMITS[key])}:
        said = ", ".join(f"{key} {'unknown' if value is None else f'{value:g}'}" for key, value in absurd.items())
        return None, (
            f"{name} is not in the table of cards, and by what CUDA says of it ({said}) nothing can be computed: the "
            "time of a step is not estimated, and where training.micro_batch_tokens is auto, a micro-batch is one "
            "longest row."
        )
    clock, bandwidth = 1e3 * read["clock_rate"], 1e3 * read["memory_clock_rate"] * 2 * read["memory_bus_width"] / 8
    is_geforce = "geforce" in name.lower()
    capability = int(read["major"]), int(read["minor"])
    operations = OPERATIONS.get(capability, 1024 if capability >= (7, 0) else OLDER_OPERATIONS)
    operations = min(operations, GEFORCE_OPERATIONS) if is_geforce else operations
    flops = operations * read["multi_processor_count"] * clock
    figures = CardFigures(name, flops, bandwidth, int(read["total_memory"]), *UNKNOWN_LINK, "its properties")
    half = ", a GeForce's at half rate" if is_geforce else ""
    return figures, (
        f"{name} is not in the table of cards: by its properties it does {flops / 1e12:.0f} TFLOP/s{half}, at "
        f"{bandwidth / 1e9:,.0f} GB/s, on PCIe {UNKNOWN_LINK[1]}.0 x{UNKNOWN_LINK[0]}."
    )


_LIMITS: Mapping[str, tuple[float, float]] = {  # of what a card can be
    "major": (5, 20),
    "minor": (0, 9),
    "multi_processor_count": (1, 1000),
    "total_memory": (2**30, 2**42),
    "clock_rate": (2e5, 5e6),  # kHz
    "memory_clock_rate": (2e5, 3e7),  # kHz
    "memory_bus_width": (32, 16384),  # bits
}


def _number(properties: Any, key: str) -> Any:
    """Return a property; None where it is missing or no number."""
    value = getattr(properties, key, None)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _is_within(value: float, least: float, most: float) -> bool:
    return least <= value <= most


def _plain(name: str) -> str:
    words = re.split(r"[^a-z0-9.]+", name.lower())
    return " ".join(word for word in words if word not in ("", "nvidia", "geforce", "rtx"))
