"""Examine the installed packages for `qlora doctor`: versions, native libraries, kernels, and bit-exact 4-bit weights.

A package that cannot be imported is a finding, not a crash, so each check imports the packages that it examines.
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.cli.findings import FAILURES, Finding
from qlora_trainer.common.atomic import unwritable
from qlora_trainer.common.errors import QuantizationError, first_line
from qlora_trainer.common.units import dtype_name

PROJECT = "qlora-trainer"
# The tests ran with these. Other versions may work too, so a difference is a note.
TESTED_VERSIONS = {
    "torch": "2.13.0",
    "bitsandbytes": "0.50.2",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "datasets": "5.2.0",
    "gguf": "0.19.0",
}


def versions() -> list[Finding]:
    """Compare installed versions with those that the tests ran with.

    Returns:
        A finding for each package of TESTED_VERSIONS; a version that this project's requirements exclude is a problem.
    """
    findings = []
    for package, tested in TESTED_VERSIONS.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "problem", "not installed", f"pip install {package}=={tested}"))
            continue
        advice = f"pip install {package}=={tested}"
        allowed = _requirements().get(package)
        if version.split("+")[0] == tested:
            findings.append(Finding(package, "ok", version))
        elif allowed is not None and not allowed.contains(version, prereleases=True):
            findings.append(Finding(package, "problem", f"{version}; {PROJECT} needs {package}{allowed}", advice))
        else:
            findings.append(Finding(package, "note", f"{version}; tests ran with {tested}", advice))
    return findings


def _requirements() -> dict[str, Any]:
    """Return the installed project's version requirements by package; empty if it runs from a checkout."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires(PROJECT) or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    found = [Requirement(line) for line in lines]
    return {each.name: each.specifier for each in found if each.marker is None}


def compute_dtype() -> Finding:
    """Report the compute dtype that model.compute_dtype=auto chooses here.

    Returns:
        The finding; a note if it is float16.
    """
    try:
        from qlora_trainer.model.device import choose_compute_dtype, choose_device

        device = choose_device("auto")
        dtype = dtype_name(choose_compute_dtype("auto", device))
    except FAILURES as error:
        return Finding("Compute dtype", "problem", first_line(error), "See the packages above.")
    if dtype == "float16":
        return Finding(
            "Compute dtype",
            "note",
            "float16 with loss scaling: this GPU has no fast bfloat16",
            "Steps whose gradients overflow are skipped; a few at the start are normal.",
        )
    return Finding("Compute dtype", "ok", f"{dtype} on {device.type}")


def bitsandbytes_library() -> Finding:
    """Load bitsandbytes' native library, which must be built for CUDA if there is a GPU.

    Returns:
        The finding.
    """
    advice = "pip install --force-reinstall bitsandbytes; `python -m bitsandbytes` says more."
    try:
        from qlora_trainer.weights.bitsandbytes_internals import native_library

        library = native_library()
    except FAILURES as error:
        return Finding("bitsandbytes' library", "problem", first_line(error), advice)
    kind = type(library).__name__
    if "ErrorHandler" in kind:
        return Finding("bitsandbytes' library", "problem", "the native library did not load", advice)
    with_cuda = bool(getattr(library, "compiled_with_cuda", False))
    if torch.cuda.is_available() and not with_cuda:
        return Finding("bitsandbytes' library", "problem", "loaded without CUDA, though this machine has a GPU", advice)
    return Finding("bitsandbytes' library", "ok", f"loaded, for {'CUDA' if with_cuda else 'the CPU'}")


def kernels(kind: str) -> Finding:
    """Report the version of each operation that a kind of device uses, and why it is not the fast one.

    Args:
        kind: of device, cpu or cuda.

    Returns:
        The finding; a note if an operation that has a fast version does not use it.
    """
    name = f"Kernels on {kind}"
    try:
        from qlora_trainer.model.device import FAST, ONLY_VERSION, operations_by_version

        found = operations_by_version(kind)
    except ValueError as error:  # QLORA_KERNELS has an unknown value
        return Finding(name, "problem", str(error), "unset QLORA_KERNELS")
    except FAILURES as error:
        return Finding(name, "problem", first_line(error), "See the packages above.")
    slower = {version: operations for version, operations in found.items() if version not in (FAST, ONLY_VERSION)}
    parts = {
        "fast": found.get(FAST, []),
        "plain torch, which is the only version": found.get(ONLY_VERSION, []),
        "plain torch instead of a faster version": sorted(name for names in slower.values() for name in names),
    }
    detail = "; ".join(f"{part}: {', '.join(operations)}" for part, operations in parts.items() if operations)
    # The reason why an operation does not use its fast version says what to do.
    advice = "; ".join(version.removeprefix("reference: ") for version in slower)
    return Finding(name, "note" if slower else "ok", detail, advice)


def attention(kind: str) -> Finding:
    """Report how packed rows are attended to, in the compute dtype used here, by heads of 128 numbers as most have.

    Args:
        kind: of device, cpu or cuda.

    Returns:
        The finding; a note if a GPU does not use flash attention.
    """
    name = f"Attention on {kind}"
    try:
        from qlora_kernels.card import Card, attention_in_words
        from qlora_trainer.model.device import choose_compute_dtype

        device = torch.device(kind)
        card, dtype = Card.of(device) if kind == "cuda" else None, choose_compute_dtype("auto", device)
        has_better = card is not None and card.flash_refusal(dtype, 128) is not None
        return Finding(name, "note" if has_better else "ok", attention_in_words(card, dtype, 128))
    except ValueError as error:  # QLORA_KERNELS has an unknown value
        return Finding(name, "problem", str(error), "unset QLORA_KERNELS")
    except FAILURES as error:
        return Finding(name, "problem", first_line(error), "See the packages above.")


def nf4(kind: str) -> Finding:
    """Quantize and dequantize a sample, and compare both with their definition in plain torch, bit for bit.

    Args:
        kind: of device, cpu or cuda.

    Returns:
        The finding; a problem if our codes differ, a note if only bitsandbytes' numbers do.
    """
    name = f"NF4 to the bit on {kind}"
    try:
        from qlora_kernels.nf4_reference import quantize_torch
        from qlora_trainer.weights.bitsandbytes_format import check_dequantization
        from qlora_trainer.weights.nf4 import quantize_weight

        device = torch.device(kind)
        sample = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
        codes, maxima = torch.empty(128 * 128, dtype=torch.uint8), torch.empty(128 * 4)
        quantize_torch(sample.view(-1), codes, maxima)
        found = quantize_weight(sample.to(device))
        warnings = check_dequantization(device)
    except QuantizationError as error:
        return Finding(name, "problem", str(error))
    except FAILURES as error:
        return Finding(name, "problem", first_line(error), "See bitsandbytes above.")
    if not torch.equal(found.packed.cpu(), codes):
        tested = f"Use the tested version: pip install bitsandbytes=={TESTED_VERSIONS['bitsandbytes']}"
        advice = tested if kind == "cuda" else "Set QLORA_KERNELS=reference, and please report this."
        return Finding(name, "problem", f"a weight on {kind} is quantized to wrong codes", advice)
    if warnings:
        return Finding(
            name,
            "note",
            "ours is right; " + " ".join(warnings),
            "Nothing to do: training uses this project's own kernel.",
        )
    return Finding(name, "ok", "quantized and dequantized as defined, in fp32, bf16 and fp16")


def triton() -> Finding:
    """Report whether Triton, which the fast kernels on GPUs need, is installed.

    Returns:
        The finding.
    """
    if importlib.util.find_spec("triton") is not None:
        return Finding("Triton", "ok", importlib.metadata.version("triton"))
    if torch.cuda.is_available():
        return Finding("Triton", "note", "not installed: plain torch kernels, right but slower", "pip install triton")
    return Finding("Triton", "ok", "not installed, and only used on GPUs")


def tensorboard() -> Finding:
    """Report whether TensorBoard is installed.

    Returns:
        The finding, always ok.
    """
    if importlib.util.find_spec("tensorboard") is not None:
        return Finding("TensorBoard", "ok", f"{importlib.metadata.version('tensorboard')}; runs are logged for it too")
    return Finding("TensorBoard", "ok", "not installed; metrics.jsonl and report.html hold the same numbers")


def hub() -> Finding:
    """Report the folder of downloads from the hub and whether it can be written.

    Returns:
        The finding.
    """
    name = "Model hub"
    try:
        from huggingface_hub import constants

        from qlora_trainer.model.source import hub_variable
    except FAILURES as error:
        return Finding(name, "problem", first_line(error), "pip install huggingface_hub")
    detail = f"downloads are kept in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Finding(name, "note", f"{detail}; HF_HUB_OFFLINE is set, so only those are used")
    if reason := unwritable(Path(constants.HF_HUB_CACHE)):
        advice = f"Set {hub_variable()} to a writable folder, or name directories instead of hub names."
        return Finding(name, "note", f"{detail}, which cannot be written: {reason}", advice)
    return Finding(name, "ok", f"{detail}; the network is used only for hub names")
