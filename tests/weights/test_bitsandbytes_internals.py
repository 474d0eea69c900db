"""bitsandbytes still has each private name that weights.bitsandbytes_internals uses, and it works as it did there."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spying import Operations
from torch import Tensor, nn

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


@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedAdamW8bit", "AdamW8bit"])
def test_bitsandbytes_has_updates_that_do_as_its_step_without_waiting(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several groups and parameters, bit for bit; `step` waits for the device of each parameter."""

    def updated(take: Callable[[Any], object]) -> tuple[list[Tensor], int]:
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(5000, generator=generator)) for _ in range(3)]
        groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
        optimizer = getattr(load_bitsandbytes().optim, name)(groups, lr=1e-2)
        bitsandbytes_internals.make_state(optimizer)
        waits.clear()
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(5000, generator=generator)
            take(optimizer)
        return [parameter.detach() for parameter in parameters], len(waits)

    waits: list[object] = []
    monkeypatch.setattr(load_bitsandbytes().optim.optimizer, "sync_gpu", waits.append)
    expected, waited = updated(lambda optimizer: optimizer.step())
    found, without = updated(bitsandbytes_internals.update_parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert waited >= 9
    assert without == 0


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
