"""Is this machine ready? What `qlora doctor` finds, as data; the command line prints it.

Each check looks at one thing, says what it found in a line, and what to do about it where that is not well. A package
that cannot be imported is a finding, not a crash, so everything heavy is imported inside its check. Left out: whether
a given model fits, which is the plan's question.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from qlora_trainer.errors import QuantizationError, first_line

GIB = 2**30
SMALL_HOST_BYTES = 8 * GIB
SMALL_GPU_BYTES = 6 * GIB
SMALL_DISK_BYTES = 20 * GIB

# What the tests ran with. Others may well work, so a difference is a note.
TESTED_VERSIONS = {
    "torch": "2.13.0",
    "bitsandbytes": "0.50.2",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "datasets": "5.2.0",
    "gguf": "0.19.0",
}

# What a missing or broken package raises when it is imported, native libraries included.
IMPORT_FAILURES = (ImportError, OSError, RuntimeError, AttributeError)


@dataclass(frozen=True)
class Finding:
    """One line of the report. note: works, but worth knowing; problem: training will fail or be wrong."""

    name: str
    status: Literal["ok", "note", "problem"]
    detail: str
    advice: str = ""


def examine(cache_dir: Path | None = None) -> list[Finding]:
    """Run every check. `cache_dir` is where prepared models and data are kept, if its disk should be looked at."""
    findings = [_python(), *_versions(), *_devices()]
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    checks: list[Callable[[], Finding]] = [
        _compute_dtype,
        _bitsandbytes,
        *(functools.partial(check, kind) for kind in kinds for check in (_kernels, _attention, _nf4)),
        _paged_optimizer,
        _triton,
        _tensorboard,
    ]
    findings += [check() for check in checks]
    findings += [_processors(), _memory(), _disk("Disk here", Path.cwd())]
    if cache_dir is not None:
        findings.append(_disk("Disk of the cache", cache_dir))
    findings.append(_hub())
    return findings


def _python() -> Finding:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    return Finding("Python", "ok", detail)


def _versions() -> list[Finding]:
    findings = []
    for package, tested in TESTED_VERSIONS.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "problem", "not installed", f"pip install {package}=={tested}"))
            continue
        if version.split("+")[0] == tested:
            findings.append(Finding(package, "ok", version))
        else:
            findings.append(
                Finding(package, "note", f"{version}; tests ran with {tested}", f"pip install {package}=={tested}")
            )
    return findings


def _devices() -> list[Finding]:
    """One finding a GPU, or one that says why there is none."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is None:
            return [Finding("GPU", "note", "none found; everything runs on the CPU, slowly")]
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return [
            Finding(
                "GPU",
                "problem",
                f"this machine has an NVIDIA driver, but torch {torch.__version__} (built {build}) sees no GPU",
                "Install a CUDA build of torch that fits the driver (pytorch.org, 'Get started'), then try again.",
            )
        ]
    return [_gpu(index) for index in range(torch.cuda.device_count())]


def _gpu(index: int) -> Finding:
    device = torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)
    name = f"GPU {index}"
    detail = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    try:
        free, total = torch.cuda.mem_get_info(device)
        ones = torch.ones(64, 64, device=device)
        works = bool((ones @ ones == 64).all())
    except RuntimeError as error:
        return Finding(
            name, "problem", f"{detail}: {first_line(error)}", "Update the driver, or install another torch."
        )
    detail += f", {free / GIB:.1f} of {total / GIB:.1f} GiB free, torch built for CUDA {torch.version.cuda}"
    if not works:
        return Finding(name, "problem", f"{detail}; it multiplies matrices wrongly", "Update the driver.")
    if free < 0.8 * total:
        return Finding(name, "note", detail, "Another program uses this GPU; nvidia-smi shows which.")
    if total < SMALL_GPU_BYTES:
        return Finding(name, "note", detail, "Enough for models of up to about 3B parameters.")
    return Finding(name, "ok", detail)


def _compute_dtype() -> Finding:
    try:
        from qlora_trainer.model import choose_compute_dtype, choose_device

        device = choose_device("auto")
        dtype = str(choose_compute_dtype("auto", device)).removeprefix("torch.")
    except IMPORT_FAILURES as error:
        return Finding("Compute dtype", "problem", first_line(error), "See the packages above.")
    if dtype == "float16":
        return Finding(
            "Compute dtype",
            "note",
            "float16 with loss scaling: this GPU has no fast bfloat16",
            "Steps whose gradients overflow are skipped; a few at the start are normal.",
        )
    return Finding("Compute dtype", "ok", f"{dtype} on {device.type}")


def _bitsandbytes() -> Finding:
    advice = "pip install --force-reinstall bitsandbytes; `python -m bitsandbytes` says more."
    try:
        from qlora_trainer.quantization import bitsandbytes

        library = bitsandbytes.cextension.lib
    except IMPORT_FAILURES as error:
        return Finding("bitsandbytes' library", "problem", first_line(error), advice)
    kind = type(library).__name__
    if "ErrorHandler" in kind:
        return Finding("bitsandbytes' library", "problem", "the native library did not load", advice)
    with_cuda = bool(getattr(library, "compiled_with_cuda", False))
    if torch.cuda.is_available() and not with_cuda:
        return Finding("bitsandbytes' library", "problem", "loaded for the CPU only, beside a GPU", advice)
    return Finding("bitsandbytes' library", "ok", f"loaded, for {'CUDA' if with_cuda else 'the CPU'}")


def _kernels(kind: str) -> Finding:
    """Which version of each operation a tensor on this kind of device takes, and why it is not the fast one."""
    name = f"Kernels on {kind}"
    try:
        from qlora_kernels.registry import implementations

        found = implementations(kind)
    except ValueError as error:  # the variable that chooses holds a word unknown
        return Finding(name, "problem", str(error), "unset QLORA_KERNELS")
    except IMPORT_FAILURES as error:
        return Finding(name, "problem", first_line(error), "See the packages above.")
    by_version: dict[str, list[str]] = {}
    for operation, version in found.items():
        by_version.setdefault(version, []).append(operation)
    detail = "; ".join(f"{version}: {', '.join(operations)}" for version, operations in sorted(by_version.items()))
    # Why an operation that has a fast version does not take it, which says what to do.
    missing = [
        version.removeprefix("reference: ")
        for version in by_version
        if version not in ("fast", "reference: plain torch is the only version")
    ]
    return Finding(name, "note" if missing else "ok", detail, "; ".join(missing))


def _attention(kind: str) -> Finding:
    """How packed documents are attended to, in the dtype taken here and by heads of 128 numbers, as most are."""
    name = f"Attention on {kind}"
    try:
        from qlora_kernels.varlen_attention import Card, attention_in_words
        from qlora_trainer.model import choose_compute_dtype

        device = torch.device(kind)
        card, dtype = Card.of(device) if kind == "cuda" else None, choose_compute_dtype("auto", device)
        has_better = card is not None and card.flash_refusal(dtype, 128) is not None
        return Finding(name, "note" if has_better else "ok", attention_in_words(card, dtype, 128))
    except ValueError as error:  # QLORA_KERNELS holds a word unknown
        return Finding(name, "problem", str(error), "unset QLORA_KERNELS")
    except IMPORT_FAILURES as error:
        return Finding(name, "problem", first_line(error), "See the packages above.")


def _nf4(kind: str) -> Finding:
    """Quantise and dequantise a sample, and compare both with their definition in plain torch, to the last bit."""
    name = f"NF4 to the bit on {kind}"
    try:
        from qlora_kernels.nf4 import quantize_torch
        from qlora_trainer.bitsandbytes_format import check_dequantization
        from qlora_trainer.quantization import quantize_weight

        device = torch.device(kind)
        sample = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
        codes, maxima = torch.empty(128 * 128, dtype=torch.uint8), torch.empty(128 * 4)
        quantize_torch(sample.view(-1), codes, maxima)
        found = quantize_weight(sample.to(device))
        notices = check_dequantization(device)
    except QuantizationError as error:
        return Finding(name, "problem", str(error))
    except IMPORT_FAILURES as error:
        return Finding(name, "problem", first_line(error), "See bitsandbytes above.")
    if not torch.equal(found.packed.cpu(), codes):
        tested = f"Use the tested version: pip install bitsandbytes=={TESTED_VERSIONS['bitsandbytes']}"
        advice = tested if kind == "cuda" else "Set QLORA_KERNELS=reference, and please report this."
        return Finding(name, "problem", f"a weight on {kind} is quantised to other codes than it should be", advice)
    if notices:
        return Finding(name, "note", "ours is right; " + " ".join(notices), "Nothing to do: training takes ours.")
    return Finding(name, "ok", "quantised and dequantised as defined, in fp32, bf16 and fp16")


def _paged_optimizer() -> Finding:
    if not torch.cuda.is_available():
        return Finding(
            "Paged optimizer", "note", "there is nothing to page on a CPU: its state is in host memory anyway"
        )
    if platform.system() == "Windows" or "microsoft" in platform.release().lower():
        return Finding(
            "Paged optimizer",
            "note",
            "state is paged only up to the GPU's memory under Windows and WSL",
            "If memory runs out, take a smaller adapter.rank or optimizer.name=paged_adamw_8bit.",
        )
    return Finding("Paged optimizer", "ok", "optimizer state can move to host memory when the GPU is full")


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is not None:
        return Finding("Triton", "ok", importlib.metadata.version("triton"))
    if torch.cuda.is_available():
        return Finding("Triton", "note", "not installed: plain torch kernels, right but slower", "pip install triton")
    return Finding("Triton", "ok", "not installed, and only used on GPUs")


def _tensorboard() -> Finding:
    if importlib.util.find_spec("tensorboard") is not None:
        return Finding("TensorBoard", "ok", f"{importlib.metadata.version('tensorboard')}; runs are logged for it too")
    return Finding("TensorBoard", "ok", "not installed; metrics.jsonl and report.html hold the same numbers")


def _processors() -> Finding:
    from qlora_kernels.products import library

    threads = torch.get_num_threads()
    detail = f"{os.cpu_count()} logical cores, torch computes with {threads} threads, fp32 products by {library()}"
    return Finding("Processors", "ok", detail)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    if memory.available < SMALL_HOST_BYTES:
        return Finding("Host memory", "note", detail, "Enough for small models; close other programs for a 7B.")
    return Finding("Host memory", "ok", detail)


def _disk(name: str, directory: Path) -> Finding:
    existing = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIB:.1f} GiB free for {directory}"
    if not os.access(existing, os.W_OK):
        return Finding(name, "problem", f"{directory} cannot be written", "Choose another directory, or its rights.")
    if free < SMALL_DISK_BYTES:
        return Finding(name, "note", detail, "A 7B model in 16 bits takes 15 GiB, and so does its merged copy.")
    return Finding(name, "ok", detail)


def _hub() -> Finding:
    try:
        from huggingface_hub import constants
    except IMPORT_FAILURES as error:
        return Finding("Model hub", "problem", first_line(error), "pip install huggingface_hub")
    detail = f"downloads are kept in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Finding("Model hub", "note", f"{detail}; HF_HUB_OFFLINE is set, so only those are used")
    return Finding("Model hub", "ok", f"{detail}; the network is used only for hub names")
