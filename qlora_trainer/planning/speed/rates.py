"""Say how fast a device does the parts of a step: the constants of the formula, each with its measurement.

Nothing is measured when a run starts, so that one machine chooses the same each time. A card's rates are published
figures (cards.py) times the share that a step was seen to reach; a processor's are those of this project's benchmarks.
Left out: what is done at these rates (cost.py).
"""

import dataclasses

import numpy as np
import torch

from qlora_kernels.products import library
from qlora_trainer.planning.speed.cards import CAUTIOUS, CardFigures, derive_card, find_card

# On a card. Measured on one H200 (docs/benchmarks.md, "One H200", 29 November 2026): a recomputed step of an 8B in one
# row of 16,384 tokens took 2.34 s, the card busy for 98 % of it, of which by this formula products are 2.0 s.
PRODUCTS_SHARE = 0.53  # of the published rate; on other cards not measured
BANDWIDTH_SHARE = 0.8  # of the published bandwidth; not measured
LINK_SHARE = 0.8  # of PCIe's; not measured

# Seconds of the host a layer: forward, backward, and forward again in backward with what checkpointing adds. Measured
# there with rows of 2,048 tokens, where the card waits for the host: 0.625 s a step of 32 layers with all kept, 0.916 s
# recomputed, 3.49 s in tiles (held to the memory of a card of 8 GB). Measured at so many operations of a layer, all
# kept and recomputed (commit 1173730), and scaled to those of now; not measured since.
HOST_MEASURED = (8.5e-3, 11e-3, 9.1e-3)
LAYER_OPERATIONS_MEASURED, LAYER_OPERATIONS = (361, 491), (160, 215)  # python -m benchmarks.host_overhead
_ONCE = LAYER_OPERATIONS[0] / LAYER_OPERATIONS_MEASURED[0]
_AGAIN, _AGAIN_MEASURED = (full - none for none, full in (LAYER_OPERATIONS, LAYER_OPERATIONS_MEASURED))
HOST_FORWARD, HOST_BACKWARD = HOST_MEASURED[0] * _ONCE, HOST_MEASURED[1] * _ONCE
HOST_AGAIN = HOST_MEASURED[2] * _AGAIN / _AGAIN_MEASURED
HOST_OFFLOAD = 1e-3  # the copies of a layer's input; not measured
HOST_TILED = 3.8  # times as much in tiles

PACKED_BYTES = 0.52  # of a number in NF4, with its statistics
NF4_BYTES = PACKED_BYTES + 2 * 2  # of a number that is read, written in 16 bits, and read again

# On a CPU, of fp32 products a second and thread (decision 0023: 410 GFLOP/s on two cores by oneDNN, 174 by MKL without
# AVX-512; what an adapter multiplies goes at half of that). A processor without AVX2 was not measured.
CPU_PRODUCTS = {"oneDNN": 190e9, "AVX512": 190e9, "AVX2": 87e9, "": 20e9}
CPU_EXPANSION = 1.1e-9  # seconds and thread to make a number from NF4: 1.2 s in five passes of SmolLM2-135M, both ways
# Fitted to python -m benchmarks.fastest cpu MODEL alpaca_en_demo.json --limits 256 512 1024 --tokens 1024 --turns 1
# --processor: SmolLM2-135M, one thread of a Zen 5 processor, busy with other work (30 November 2026). One pass more
# took 0.6 s, all layers' forward once more 2.1 to 2.6 s, and the whole step 7.0 s. (With 56 bytes a logit, where fp32
# moves 40: that is at most 0.2 s of these.)
CPU_BANDWIDTH = 4.5e9  # bytes a second and thread of what is done between products
CPU_HOST = 6e-3  # seconds a layer, pass and direction; with it what products take for themselves in each pass
CPU_PARALLEL = 2 / 3  # of the work: two threads were 1.5 times as fast as one; with more threads not measured


@dataclasses.dataclass(frozen=True)
class Rates:
    """Say what a device does in a second, and what a layer takes of the host; of a processor, what one thread does."""

    name: str  # of the device, for people
    products: float  # operations a second
    bandwidth: float  # bytes a second
    link: float  # bytes a second to the host, and from it
    expansion: float  # seconds to make a number from NF4, and to read it
    host: tuple[float, float, float]  # seconds a layer: forward, backward, forward again
    host_tiled: float  # times as much of the host in tiles
    overlaps: bool  # the host runs ahead of the device, and copies go on meanwhile
    note: str = ""  # where the figures come from, if that must be said
    threads: int = 1  # of a processor
    parallel: float = 0.0  # share of the work of which several threads each do a part
    is_known: bool = True  # False: only the order of policies is taken from these, and one longest row

    def speedup(self, threads: np.ndarray) -> np.ndarray:
        """Compute how many times as fast several threads are as one (Amdahl's law).

        Args:
            threads: that work on one operation, (any,).

        Returns:
            Times, (any,).
        """
        return 1 / (1 - self.parallel + self.parallel / threads)


def rates_of_card(card: CardFigures, note: str = "", *, is_known: bool = True) -> Rates:
    """Compute what a step reaches on a card.

    Args:
        card: its published figures.
        note: on where these come from.
        is_known: False: the figures are another card's.

    Returns:
        The rates.
    """
    return Rates(
        card.name,
        PRODUCTS_SHARE * card.flops,
        BANDWIDTH_SHARE * card.bandwidth,
        LINK_SHARE * card.link,
        NF4_BYTES / (BANDWIDTH_SHARE * card.bandwidth),
        (HOST_FORWARD, HOST_BACKWARD, HOST_AGAIN),
        HOST_TILED,
        overlaps=True,
        note=note,
        is_known=is_known,
    )


def rates_of_processor(threads: int | None = None) -> Rates:
    """Return what a step reaches on this machine's processor, by what it is and by the threads that torch takes.

    Args:
        threads: by default torch's present number.

    Returns:
        The rates.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    kind = "oneDNN" if library() == "oneDNN" else capability.split("_")[0]
    threads = threads or torch.get_num_threads()
    name = f"a CPU with {capability}, {threads} {'thread' if threads == 1 else 'threads'}"
    return Rates(
        name,
        CPU_PRODUCTS.get(kind, CPU_PRODUCTS[""]),
        CPU_BANDWIDTH,
        CPU_BANDWIDTH,
        CPU_EXPANSION,
        (CPU_HOST, CPU_HOST, CPU_HOST),
        host_tiled=1.0,
        overlaps=False,
        threads=threads,
        parallel=CPU_PARALLEL,
    )


def rates_here(device: torch.device) -> Rates:
    """Return the rates of a device of this machine.

    Args:
        device: that a run uses.

    Returns:
        The rates; of a card that is not in the table by its properties, and the note says so. Where these cannot be
        those of a card, the cautious ones, which are not known.
    """
    if device.type == "cpu":
        return rates_of_processor()
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "name", None)
    name = name if isinstance(name, str) and name else "This GPU"
    if card := find_card(name):
        return rates_of_card(card)
    figures, note = derive_card(name, properties)
    return rates_of_card(figures or CAUTIOUS, note, is_known=figures is not None)
