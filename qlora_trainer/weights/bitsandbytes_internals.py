"""Gather every private name of bitsandbytes that this project uses, each behind a function of its own.

Private is what bitsandbytes' documentation does not describe: it may change with any release. So it is used here and
nowhere else, and tests/weights/test_bitsandbytes_internals.py has a test for each that fails by its name after an
upgrade. One exception is training/memory/paged_trial.py, a program that imports bitsandbytes alone; what it calls is
tested there too.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.torch_internals import OpOverload
from qlora_trainer.weights.nf4 import load_bitsandbytes


def native_library() -> Any:
    """Return bitsandbytes' compiled library.

    Returns:
        The library; a stand-in of another class where it could not be loaded.
    """
    return load_bitsandbytes().cextension.lib


def makes_state_early(optimizer: torch.optim.Optimizer) -> bool:
    """Return True for bitsandbytes' optimizers, whose state `make_state` makes before the first step.

    Args:
        optimizer: of torch or bitsandbytes.

    Returns:
        True if it is one.
    """
    return isinstance(optimizer, load_bitsandbytes().optim.optimizer.Optimizer8bit)


def make_state(optimizer: Any) -> None:
    """Make the state of every parameter, paged where the optimizer pages and the state is large.

    Args:
        optimizer: of bitsandbytes.
    """
    for index, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, index, place)


def update_parameters(optimizer: Any) -> None:
    """Update every parameter as the optimizer's `step` does, but without waiting for the device after each.

    `step` waits so that the host may read paged state next. Here who reads it waits first (training/optimizer.py); the
    next step's work on the device comes after this in any case.

    Args:
        optimizer: of bitsandbytes, whose state `make_state` has made and whose parameters all have a gradient.
    """
    with torch.no_grad():
        for index, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                optimizer.prefetch_state(parameter)
                optimizer.update_step(group, parameter, index, place)


def is_paged(optimizer_or_state: Any) -> bool:
    """Return True for an optimizer that pages where the device can, and for a tensor of state that is paged.

    Args:
        optimizer_or_state: of bitsandbytes; others are not paged.

    Returns:
        True if it is.
    """
    return bool(getattr(optimizer_or_state, "is_paged", False))


def forget_paged(tensors: Iterable[Tensor]) -> None:
    """Take tensors off the list of paged ones, which would hold them as long as the process lives.

    Args:
        tensors: of an optimizer's state.
    """
    manager = load_bitsandbytes().functional.GlobalPageManager.get_instance()
    gone = {id(tensor) for tensor in tensors}
    manager.paged_tensors[:] = [tensor for tensor in manager.paged_tensors if id(tensor) not in gone]


def update_operations() -> tuple[OpOverload, OpOverload]:
    """Return the operations that update a parameter, with state of 32 bits and of 8.

    Returns:
        Both; argument 2 of each is the parameter.
    """
    load_bitsandbytes()  # registers them
    operations = torch.ops.bitsandbytes
    return operations.optimizer_update_32bit.default, operations.optimizer_update_8bit_blockwise.default
