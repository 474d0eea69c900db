"""Record where torch's random generators are, to run something again with the same random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState:
    """Record the state of the CPU's generator and of that of a tensor's device.

    Args:
        tensor: on the device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(tensor)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Repeat in the block the random numbers that followed then; after it, those come that would have come."""
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states)
            yield
