"""Promises of what a step holds: state that a card cannot page is in torch's memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import slow_but

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.empty_run import empty_run
from qlora_trainer.planning.step_memory import PAGED, PAGED_ELEMENTS, STATE, persistent_tensors
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


@pytest.mark.parametrize("works", slow_but([True, False], False))
def test_state_that_the_card_here_cannot_page_is_planned_in_torchs_memory(
    tiny_config: Config,
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    bitsandbytes_of_the_child: Callable[..., Path],
    works: bool,
) -> None:
    bitsandbytes_of_the_child("return torch.empty(shape, dtype=dtype)" if works else "ctypes.CDLL(None).exit(1)")
    config = tiny_config(adapter={"rank": 64})
    state, *_ = empty_run(ModelDirectory.open(tiny_llama), config, torch.bfloat16, Policy("none"))
    size = state.groups[0].data.numel()
    assert size > PAGED_ELEMENTS
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kinds = persistent_tensors(state, on_cuda=True)
    bytes_of = {kind: sum(tensor.nbytes for tensor in kinds[kind]) for kind in (STATE, PAGED)}
    moments = 2 * 4 * size
    expected = {STATE: 0, PAGED: moments} if works else {STATE: moments, PAGED: 0}
    assert bytes_of == expected
