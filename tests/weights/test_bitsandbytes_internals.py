"""bitsandbytes still has each private name that weights.bitsandbytes_internals uses, and it works as it did there."""

import gc

import torch
from spying import Operations
from torch import nn

from qlora_kernels import torch_internals
from qlora_trainer.weights import bitsandbytes_internals
from qlora_trainer.weights.nf4 import load_bitsandbytes


def test_bitsandbytes_has_a_native_library() -> None:
    assert hasattr(bitsandbytes_internals.native_library(), "compiled_with_cuda")


def test_bitsandbytes_has_optimizers_that_make_state_early() -> None:
    parameter = nn.Parameter(torch.ones(8))
    optimizer = load_bitsandbytes().optim.PagedAdamW32bit([parameter])
    assert bitsandbytes_internals.makes_state_early(optimizer)
    assert not bitsandbytes_internals.makes_state_early(torch.optim.AdamW([parameter]))
    bitsandbytes_internals.make_state(optimizer)
    assert optimizer.state[parameter].keys() >= {"state1", "state2", "step"}


def test_bitsandbytes_has_optimizers_that_say_whether_they_page() -> None:
    kinds = (load_bitsandbytes().optim.PagedAdamW32bit, load_bitsandbytes().optim.AdamW32bit)
    assert [bitsandbytes_internals.is_paged(kind([nn.Parameter(torch.ones(8))])) for kind in kinds] == [True, False]


def test_bitsandbytes_has_a_list_of_paged_tensors() -> None:
    manager = load_bitsandbytes().functional.GlobalPageManager.get_instance()
    ours, others = torch.zeros(3), torch.zeros(3)
    manager.paged_tensors += [ours, others]
    try:
        bitsandbytes_internals.forget_paged([ours])
        assert [id(tensor) for tensor in manager.paged_tensors] == [id(others)]
    finally:
        manager.paged_tensors.clear()
        gc.collect()


def test_bitsandbytes_has_operations_that_update_a_parameter() -> None:
    parameter = nn.Parameter(torch.ones(8))
    parameter.grad = torch.ones(8)
    update_32bit, update_8bit = bitsandbytes_internals.update_operations()
    optimizer = load_bitsandbytes().optim.AdamW32bit([parameter])
    with Operations() as operations:
        optimizer.step()
    assert update_32bit in operations.seen
    for operation in (update_32bit, update_8bit):
        assert torch_internals.operation_schema(operation).arguments[2].name == "p"


def test_bitsandbytes_has_paged_memory() -> None:
    """What training/memory/paged_trial.py calls."""
    assert callable(load_bitsandbytes().functional.get_paged)
    assert callable(load_bitsandbytes().functional.fill)
