"""A CUDA card as torch's device functions tell of it, without one."""

from types import SimpleNamespace

import pytest
import torch


def a_card_is_here(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], processors: int = 40) -> None:
    """Have torch say that there is one."""
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # which torch's AdamW asks
    monkeypatch.setattr(torch.version, "cuda", "13.0")
