"""Record where torch's random generators are, to run something again with the same random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from qlora_kernels.side_by_side import cpu_generator


class RandomState:
    """Record the state of this thread's CPU generator and of that of a tensor's device.

    Args:
        tensor: on the device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._generator = cpu_generator()
        self._cpu = self._generator.get_state()
        self._devices, self._states = get_device_states(tensor)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Repeat in the block the random numbers that followed then; after it, those come that would have come."""
        before = self._generator.get_state()
        device_states = [torch.cuda.get_rng_state(device) for device in self._devices]
        try:
            self._generator.set_state(self._cpu)
            set_device_states(self._devices, self._states)
            yield
        finally:
            self._generator.set_state(before)
            set_device_states(self._devices, device_states)
