"""Compute the seconds of an optimizer step: the one formula by which ways of taking it are ordered.

A micro-batch costs, forward and backward:

- products: 2 operations for each number of a weight and token, forward, for the gradient of the input, and again where
  a layer is recomputed; adapters also for their own gradient; attention 2 for each pair of tokens of a row and number
  of its heads, half of the pairs being masked, 5/2 of that in backward (Dao et al. 2022, arXiv:2205.14135); the LM
  head for the loss and its gradient;
- bytes: each weight read in NF4, written and read again wherever it is multiplied by, per micro-batch; the LM head
  once a chunk of tokens and direction, and what is done with the logits; hidden states between products;
- work of the host, a layer and direction; and bytes to the host and back of what is offloaded.

On a card the host runs ahead and copies go on meanwhile, so of these three the longest counts, in forward and in
backward; on a CPU they follow one another. Rates are in rates.py. Where the formula is wrong: decision 0045.
"""

from dataclasses import dataclass

import numpy as np

from qlora_kernels.linear_cross_entropy import LOGIT_PASSES, tokens_of_a_chunk
from qlora_trainer.planning.speed.rates import HOST_OFFLOAD, Rates
from qlora_trainer.planning.speed.rows import MicroBatches
from qlora_trainer.planning.speed.shape import Shape
from qlora_trainer.training.memory.activations import TILES, Policy
from qlora_trainer.training.patches import tile_tokens

LOGIT_BYTES_ON_CPU = {2: 56, 4: 40}
"""Moved for each logit of a label token, by the bytes of a number (`python -m benchmarks.bytes_moved`)."""
UPDATE_BYTES = 28  # moved for each number of the adapters: gradient, weight, two moments


@dataclass(frozen=True)
class Seconds:
    """Hold the seconds of a step on average, and those of them in which the device waits for the host's work."""

    step: float
    waiting: float


def recomputed_share(shape: Shape, policy: Policy) -> float:
    """Return how much of the model's forward a policy runs again in backward.

    Of n layers, of which one has its input on the host, n - 1 run once more for the inputs of those after them.

    Args:
        shape: of the model.
        policy: what backward keeps.

    Returns:
        1.0 for all layers once.
    """
    if policy.level == "none":
        return 0.0
    every = policy.offload_every_n_layers if policy.offloads else 1
    return (1 + (every - 1) / every) * max(1 - policy.uncheckpointed_layers / shape.layers, 0.0)


def step_seconds(shape: Shape, rates: Rates, policy: Policy, layout: MicroBatches, trained: float = 1.0) -> Seconds:
    """Compute the seconds of a step.

    Args:
        shape: of the model and its adapters.
        rates: of the device.
        policy: what backward keeps.
        layout: the micro-batches of some steps.
        trained: share of the tokens that has a label.

    Returns:
        The seconds, on average over the steps.
    """
    threads = rates.speedup(layout.threads)
    forward = _forward(shape, rates, layout, trained) / threads
    backward = _backward(shape, rates, policy, layout) / threads
    copies = _copies(shape, rates, policy, layout.tokens) / threads
    host = _host(shape, rates, policy)
    if rates.overlaps:
        busy = np.maximum(forward, copies) + np.maximum(backward, copies)
        waiting = np.maximum(host[0] - np.maximum(forward, copies), 0)
        waiting = waiting + np.maximum(host[1] - np.maximum(backward, copies), 0)
    else:
        busy, waiting = forward + backward + 2 * copies, np.full_like(forward, sum(host))
    waited = float(waiting.sum()) / layout.steps
    update = UPDATE_BYTES * shape.adapters / rates.bandwidth
    return Seconds(float(busy.sum()) / layout.steps + waited + update, waited)


def forward_seconds(shape: Shape, rates: Rates, layout: MicroBatches, trained: float = 1.0) -> float:
    """Compute the seconds of a forward pass over a layout, as evaluation takes it.

    Args:
        shape: of the model and its adapters.
        rates: of the device.
        layout: the micro-batches.
        trained: share of the tokens that has a label.

    Returns:
        The seconds of all micro-batches.
    """
    device = _forward(shape, rates, layout, trained) / rates.speedup(layout.threads)
    host = rates.host[0] * shape.layers
    return float((np.maximum(device, host) if rates.overlaps else device + host).sum())


def _forward(shape: Shape, rates: Rates, layout: MicroBatches, trained: float) -> np.ndarray:
    labels = trained * layout.tokens
    on_card = rates.overlaps
    taken = [tokens_of_a_chunk(shape.vocabulary, int(n) or 1, shape.itemsize, on_card=on_card) for n in labels]
    logit_bytes = LOGIT_PASSES * shape.itemsize if on_card else LOGIT_BYTES_ON_CPU[shape.itemsize]
    products = 4 * shape.head * labels
    moved = 2 * np.ceil(labels / taken) * shape.head * shape.itemsize + logit_bytes * shape.vocabulary * labels
    return _once(shape, rates, layout) + products / rates.products + moved / rates.bandwidth


def _backward(shape: Shape, rates: Rates, policy: Policy, layout: MicroBatches) -> np.ndarray:
    again = recomputed_share(shape, policy)
    products = (2 * shape.active + 4 * shape.adapters) * layout.tokens + 5 * shape.attention * layout.squares
    products = products + 2 * (1 - again) * shape.remade * layout.tokens
    seconds = products / rates.products + _expansions(shape, rates) + 2 * _between(shape, rates, layout)
    seconds = seconds + again * _once(shape, rates, layout)
    if policy.level == "tiled":
        seconds = seconds + _tiles(shape, rates, layout, again)
    return seconds


def _once(shape: Shape, rates: Rates, layout: MicroBatches) -> np.ndarray:
    """Compute the seconds of all layers once, forward."""
    products = 2 * (shape.active + shape.adapters) * layout.tokens + 2 * shape.attention * layout.squares
    return products / rates.products + _expansions(shape, rates) + _between(shape, rates, layout)


def _tiles(shape: Shape, rates: Rates, layout: MicroBatches, again: float) -> np.ndarray:
    """Compute what tiles of MLPs add: each expands the weights for itself, and runs forward once more in backward."""
    tiles = np.array([-(-n // tile_tokens(int(n) or 1, TILES)) for n in layout.tokens])
    expanded = rates.expansion * shape.tiled * ((tiles - 1) * (2 + again) + tiles)
    return np.where(tiles > 1, expanded + 2 * shape.tiled * layout.tokens / rates.products, 0.0)


def _expansions(shape: Shape, rates: Rates) -> float:
    """Compute the seconds to make every weight from NF4 once, and to read it."""
    return shape.stored * rates.expansion


def _between(shape: Shape, rates: Rates, layout: MicroBatches) -> np.ndarray:
    return shape.between * shape.itemsize * layout.tokens / rates.bandwidth


def _host(shape: Shape, rates: Rates, policy: Policy) -> tuple[float, float]:
    """Compute the seconds of the host's work in a micro-batch: (forward, backward)."""
    forward, backward, again = rates.host
    copies = HOST_OFFLOAD / policy.offload_every_n_layers if policy.offloads else 0.0
    layers = shape.layers * (rates.host_tiled if policy.level == "tiled" else 1)
    return layers * (forward + copies), layers * (backward + copies + recomputed_share(shape, policy) * again)


def _copies(shape: Shape, rates: Rates, policy: Policy, tokens: np.ndarray) -> np.ndarray:
    """Compute the seconds of the copies to the host, or of those back."""
    if not policy.offloads:
        return np.zeros_like(tokens)
    layers = max(shape.layers - policy.uncheckpointed_layers, 0) / policy.offload_every_n_layers
    return layers * shape.hidden * shape.itemsize * tokens / rates.link
