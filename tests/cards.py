"""Pretend a CUDA card to torch's device functions."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # what torch 2.11 for CUDA 13.0 says


def a_card_is_here(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], processors: int = 40) -> None:
    """Have torch say that there is one."""
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # which torch's AdamW asks
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def pretend(monkeypatch: pytest.MonkeyPatch, architectures: list[str], *capabilities: tuple[int, int]) -> None:
    """Torch's device functions as of these cards, and of a torch built for these architectures."""
    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: len(capabilities),
        "current_device": lambda: 0,
        "get_arch_list": lambda: architectures,
        "get_device_capability": lambda device=0: capabilities[torch.device("cuda", device).index],
        "get_device_name": lambda device=0: f"Card {torch.device('cuda', device).index}",
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)


def pretend_free_memory(monkeypatch: pytest.MonkeyPatch, free: Callable[[torch.device], int]) -> None:
    """Have a device report this much free memory to all who load a model onto it."""
    for module in ("device", "load"):
        monkeypatch.setattr(f"qlora_trainer.model.{module}.free_memory", free)
