"""Report versions, the card, and whether it allows what torch and bitsandbytes are going to ask of it.

Expandable segments and managed memory may be refused, by a virtual machine for one. Each is tried here, and a line is
printed where it works; first_gpu.sh looks for the lines and goes on without what has none. Managed memory is tried as
every run tries it, in a process of its own (training/memory/managed_memory.py), and before this one uses the card.
"""

import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.first_gpu.device import Device
from benchmarks.first_gpu.kit import Kit
from qlora_kernels.torch_features import varlen_attention_arguments
from qlora_trainer.common.units import gib
from qlora_trainer.planning.allocator import uses_expandable_segments
from qlora_trainer.training.memory.managed_memory import paging_refusal

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "numpy", "datasets", "gguf")
NO_CUDA = 4  # exit code


def report_environment(kit: Kit, device: Device) -> int:
    """Report this machine; returns 4 where it should have a card and torch sees none."""
    versions = {name: _version(name) for name in PACKAGES}
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "versions": versions,
        "cores": os.cpu_count(),
        "memory_disk_free": _free(Path("/dev/shm")),
        "work_free": _free(kit.work),
        "gcc": shutil.which("gcc"),
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF"),
        "varlen_attention": sorted(varlen_attention_arguments()),
    }
    installed = f"python {facts['python']}, " + ", ".join(f"{name} {version}" for name, version in versions.items())
    if not device.is_cuda:
        kit.result("env", **facts)
        kit.verdict(f"env: no card, {installed}")
        return 0
    if not torch.cuda.is_available():
        kit.result("env", **facts)
        kit.verdict(f"env: torch sees no CUDA device, and nothing else is worth the time; {installed}")
        return NO_CUDA
    refusal = paging_refusal(torch.device("cuda", 0)) if kit.may_page else None
    properties = torch.cuda.get_device_properties(0)
    kit.verdict(f"env: {properties.name}, {gib(properties.total_memory)}, {installed}")
    started = time.perf_counter()
    ones = torch.ones(2**26, device="cuda")
    assert float(ones.sum()) == 2**26
    is_expandable = any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
    facts |= {
        "start_seconds": time.perf_counter() - started,
        "card": properties.name,
        "capability": [properties.major, properties.minor],
        "total": properties.total_memory,
        "cache": properties.L2_cache_size,
        "context": device.used - torch.cuda.memory_reserved(),
        "expandable": is_expandable,
    }
    kit.result("env", **facts)
    if is_expandable or not uses_expandable_segments():
        kit.verdict(
            f"env: allocating works, expandable segments {'on' if is_expandable else 'off'};"
            f" context {facts['context'] / 2**20:.0f} MiB before any kernel of ours,"
            f" cache {properties.L2_cache_size / 2**20:.0f} MiB, {gib(facts['memory_disk_free'])} free in /dev/shm"
        )
    if refusal == "":
        kit.verdict("env: managed memory works")
    elif refusal:
        print(refusal)  # the last line, which first_gpu.sh repeats
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _free(directory: Path) -> int:
    return shutil.disk_usage(directory).free if directory.is_dir() else 0
