"""Examine the machine for `qlora doctor`: system, GPUs, paging, memory with its limits, and disks."""

import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from qlora_trainer.cli.findings import FAILURES, Finding
from qlora_trainer.common.atomic import nearest_existing, unwritable
from qlora_trainer.common.errors import first_line
from qlora_trainer.common.machine import host_memory, is_wsl
from qlora_trainer.common.units import counted, gibibytes
from qlora_trainer.model.device import as_only_card, card_name, missing_card, unusable, way_to_cpu
from qlora_trainer.training.memory.managed_memory import paging_refusal_here

SMALL_HOST_BYTES = 8 * 2**30
SMALL_GPU_BYTES = 6 * 2**30
SMALL_DISK_BYTES = 20 * 2**30
FIRST_WITH_TENSOR_CORES = (7, 0)
BROKEN_CARD = (
    "nvidia-smi shows whether another program holds the card. If none does, update the driver, or install a torch that "
    "fits it (pytorch.org, 'Get started')."
)


def system() -> Finding:
    """Report the Python version and the operating system, with a note under WSL.

    Returns:
        The finding.
    """
    detail = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if is_wsl():
        return Finding(
            "System",
            "note",
            f"{detail}, under WSL: optimizer state is not paged, memory is not mapped by expandable segments",
            "If GPU memory runs out, take a smaller adapter.rank or optimizer.name=paged_adamw_8bit. Windows gives WSL "
            r"half of its memory; [wsl2] memory=... in %UserProfile%\.wslconfig raises that.",
        )
    return Finding("System", "ok", detail)


def cards() -> list[Finding]:
    """Examine every GPU that torch sees.

    Returns:
        A finding for each GPU and, if there are several, one on which of them is used; or one on why there is none.
    """
    if not torch.cuda.is_available():
        why, advice = missing_card()
        if shutil.which("nvidia-smi") is None:
            found = f"none found: {why}" if why else "none found"
            return [Finding("GPU", "note", f"{found}; everything runs on the CPU, slowly", advice)]
        if why:
            return [Finding("GPU", "problem", f"this machine has nvidia-smi, and {why}", advice)]
        return [
            Finding(
                "GPU",
                "problem",
                f"this machine has an NVIDIA driver, but torch {torch.__version__} (built without CUDA) sees no GPU",
                "Install a CUDA build of torch that fits the driver (pytorch.org, 'Get started'), then try again.",
            )
        ]
    try:
        return _cards_seen()
    except FAILURES as error:
        return [Finding("GPU", "problem", first_line(error), BROKEN_CARD)]


def _cards_seen() -> list[Finding]:
    count = torch.cuda.device_count()
    used = torch.cuda.current_device()
    findings = [_card(index, is_used=index == used) for index in range(count)]
    if count > 1:
        other = next((index for index in range(count) if index != used and not unusable(index)[0]), None)
        way = "" if other is None else f"Put {as_only_card(other)} in front of the command to use GPU {other}. "
        findings.append(
            Finding(
                "GPU used",
                "note",
                f"a run uses one GPU, the first that torch sees: GPU {used}",
                f"{way}With CUDA_DEVICE_ORDER=PCI_BUS_ID the numbers are those of nvidia-smi.",
            )
        )
    return findings


def _card(index: int, is_used: bool) -> Finding:
    name, detail = f"GPU {index}", card_name(index)
    why, advice = unusable(index)
    if why:
        advice = f"{advice} {way_to_cpu('auto')}".lstrip() if is_used else advice
        return Finding(name, "problem" if is_used else "note", f"{detail}, cannot be used: {why}", advice)
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=torch.device("cuda", index))
        works = bool((ones @ ones == 64).all())
    except FAILURES as error:
        return Finding(name, "problem" if is_used else "note", f"{detail}: {first_line(error)}", BROKEN_CARD)
    detail += f", {gibibytes(free)} of {gibibytes(total)} free, torch built for CUDA {torch.version.cuda}"
    if not works:
        return Finding(name, "problem", f"{detail}; it multiplies matrices wrongly", "Update the driver.")
    notes = {
        "Another program uses this GPU; nvidia-smi shows which.": free < 0.8 * total,
        "Enough for models of up to about 3B parameters.": total < SMALL_GPU_BYTES,
        "An old card, without tensor cores: steps take several times as long.": (
            torch.cuda.get_device_capability(index) < FIRST_WITH_TENSOR_CORES
        ),
    }
    reported = " ".join(note for note, holds in notes.items() if holds)
    return Finding(name, "note" if reported else "ok", detail, reported)


def paged_optimizer() -> Finding:
    """Try whether optimizer state can be paged between the GPU and host memory.

    Returns:
        The finding; a note if it cannot.
    """
    name = "Paged optimizer"
    if not torch.cuda.is_available():
        return Finding(name, "note", "on a CPU nothing is paged: optimizer state is in host memory anyway")
    try:
        refusal = paging_refusal_here()
    except FAILURES as error:
        return Finding(name, "problem", first_line(error), "See the GPU above.")
    if refusal:
        return Finding(
            name,
            "note",
            f"optimizer state stays on the card: {refusal}",
            "If memory runs out, take a smaller adapter.rank or optimizer.name=paged_adamw_8bit.",
        )
    return Finding(name, "ok", "tried: optimizer state can move to host memory when the GPU is full")


def processors() -> Finding:
    """Report the processor's cores, torch's threads, and the library of fp32 matrix products.

    Returns:
        The finding.
    """
    from qlora_kernels.products import library

    detail = (
        f"{counted(os.cpu_count() or 1, 'logical core')}, torch computes with "
        f"{counted(torch.get_num_threads(), 'thread')}"
    )
    try:
        return Finding("Processors", "ok", f"{detail}, fp32 products by {library()}")
    except ValueError:  # QLORA_KERNELS has an unknown value, which another finding reports
        return Finding("Processors", "ok", detail)


def memory() -> Finding:
    """Report host memory and whether a container or job limits it.

    Returns:
        The finding; a note if it is limited or small.
    """
    found = host_memory()
    detail = f"{gibibytes(found.available)} of {gibibytes(found.total)} available"
    notes = []
    if found.is_limited:
        detail += ", limited by this container or job to less than the machine has"
        notes.append(
            "docker run --memory=..., resources.limits.memory of a Kubernetes pod, sbatch --mem=... or systemd's "
            "MemoryMax raise it."
        )
    if found.available < SMALL_HOST_BYTES:
        notes.append("Enough for small models; close other programs for a 7B.")
    return Finding("Host memory", "note" if notes else "ok", detail, " ".join(notes))


def disk(name: str, directory: Path, advice: str) -> Finding:
    """Examine the disk of a folder, which may not exist yet: free space, and whether it can be written.

    Args:
        name: of the finding.
        directory: the folder.
        advice: printed if it cannot be written.

    Returns:
        The finding.
    """
    if reason := unwritable(directory):
        return Finding(name, "problem", f"{directory} cannot be written: {reason}", advice)
    free = shutil.disk_usage(nearest_existing(directory)).free
    detail = f"{gibibytes(free)} free for {directory}"
    if free < SMALL_DISK_BYTES:
        return Finding(name, "note", detail, "A 7B model in 16 bits takes 15 GiB, and so does its merged copy.")
    return Finding(name, "ok", detail)
