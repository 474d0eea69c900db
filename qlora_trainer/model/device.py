"""Find out what a run's device can do before anything is loaded: whether this torch runs on the card, and its kernels.

A card is too old, or too new, for a torch that has no code for it: the first operation would fail with "no kernel
image is available". torch's own list of architectures decides, so that no version is written down here. A torch built
for CUDA that sees no card is a warning: who installed one rarely means the CPU.
"""

import ctypes
import gc
import os
import platform
import re

import torch

from qlora_kernels.registry import ONLY_VERSION, implementations, kernel_choice
from qlora_kernels.torch_features import release_pinned_memory
from qlora_trainer.common.command_line import command_line
from qlora_trainer.common.errors import ConfigError, InsufficientMemoryError, ModelError, first_line
from qlora_trainer.common.machine import host_memory
from qlora_trainer.common.units import gib

OLDEST_CAPABILITY = (6, 0)  # the oldest that bitsandbytes' CUDA libraries have code for
DRIVER_LIBRARY = "libcuda.so.1"
FAST = "fast"


def card_name(index: int) -> str:
    """Return a card's name and compute capability, as messages give them.

    Args:
        index: torch's, from 0.

    Returns:
        Such as "NVIDIA A100, compute capability 8.0".
    """
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"


def missing_card() -> tuple[str, str]:
    """Find out why a torch built for CUDA sees no card, and what to do.

    Returns:
        The reason and the advice; ("", "") where nothing is missing.
    """
    if torch.version.cuda is None or torch.cuda.is_available():
        return "", ""
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    if platform.system() == "Linux":
        try:
            ctypes.CDLL(DRIVER_LIBRARY)
        except OSError as error:
            return (
                f"{built}, but the NVIDIA driver's library cannot be loaded ({first_line(error)})",
                "Install the NVIDIA driver; in a container, start it with --gpus all.",
            )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"{built}, but sees no card under CUDA_VISIBLE_DEVICES={hidden!r}", "Unset CUDA_VISIBLE_DEVICES."
    return (
        f"{built}, but sees no card",
        "nvidia-smi says whether the driver runs and for which CUDA. Update it where that is older; in a container, "
        "start it with --gpus all.",
    )


def missing_card_warnings(wanted: str) -> list[str]:
    """Warn that `model.device=auto` takes the CPU because a card is missing that this torch could use.

    Args:
        wanted: the value of `model.device`.

    Returns:
        The warning, or none.
    """
    why, advice = missing_card() if wanted == "auto" else ("", "")
    if not why:
        return []
    return [f"This run takes the CPU, slowly: {why}. {advice} If the CPU is meant, model.device=cpu says so."]


def unusable(index: int) -> tuple[str, str]:
    """Find out why the installed torch cannot use a card, and what to do.

    Args:
        index: of the card, torch's.

    Returns:
        The reason and the advice; ("", "") where it can.
    """
    architectures = [code for code in torch.cuda.get_arch_list() if _version(code)]
    if not architectures:  # torch for a CPU, or for AMD's cards
        return "", ""
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return "bitsandbytes has no code for cards below compute capability {}.{}".format(*OLDEST_CAPABILITY), ""
    if any(_runs_on(code, capability) for code in architectures):
        return "", ""
    why = f"torch {torch.__version__} has code for {', '.join(architectures)} only"
    is_older = capability < min(_version(code) for code in architectures)
    wanted = "a torch built for CUDA 12.6, which has code for older cards" if is_older else "a newer torch"
    return why, f"Install {wanted} (pytorch.org, 'Get started')."


def as_only_card(index: int) -> str:
    """Return the setting of the environment under which a card is the only one.

    Args:
        index: of the card as torch counts now: of those that CUDA_VISIBLE_DEVICES names, where it is set.

    Returns:
        Such as "CUDA_VISIBLE_DEVICES=1", to be written in front of a command.
    """
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return f"CUDA_VISIBLE_DEVICES={visible[index] if index < len(visible) and visible[index] else index}"


def way_to_cpu(wanted: str) -> str:
    """Say how any command takes the CPU in place of a card, in a sentence.

    Args:
        wanted: what it was asked to take: auto, or cuda.

    Returns:
        The sentence. An environment without a card is enough for auto; evaluate, generate and merge take no settings.
    """
    if wanted == "cuda":
        return (
            "To take the CPU, slowly, add model.device=cpu to the command; evaluate, generate and merge take it from "
            "the run's config.yaml."
        )
    return "CUDA_VISIBLE_DEVICES= in front of the command takes the CPU, slowly."


def refuse_unusable(index: int, wanted: str) -> None:
    """Check that the installed torch can use a card.

    Args:
        index: of the card.
        wanted: what was asked for: auto, or cuda.

    Raises:
        ModelError: it cannot; the message has the ways out.
    """
    why, advice = unusable(index)
    if why:
        others = [other for other in range(torch.cuda.device_count()) if not unusable(other)[0]]
        ways = [advice] if advice else []
        ways += [f"{as_only_card(others[0])} takes {card_name(others[0])}."] if others else []
        raise ModelError(
            f"GPU {index} ({card_name(index)}) cannot be used: {why}. {' '.join([*ways, way_to_cpu(wanted)])}"
        )


def operations_by_version(device_type: str) -> dict[str, list[str]]:
    """Group the operations by the version that runs on a kind of device.

    An unknown word in QLORA_KERNELS raises ValueError.

    Args:
        device_type: "cpu" or "cuda".

    Returns:
        The operations' names by version: "fast", or "reference: " and the reason.
    """
    found: dict[str, list[str]] = {}
    for operation, version in implementations(device_type).items():
        found.setdefault(version, []).append(operation)
    return found


def kernels_in_words(device_type: str) -> str:
    """Say how many operations are fast on a kind of device, and which could be and are not; a warning has the reason.

    Args:
        device_type: "cpu" or "cuda".

    Returns:
        Such as "5 fast, plain torch for linear".
    """
    found = operations_by_version(device_type)
    slower = sorted(name for version, names in found.items() if version not in (FAST, ONLY_VERSION) for name in names)
    return f"{len(found.get(FAST, []))} fast" + (f", plain torch for {', '.join(slower)}" if slower else "")


def kernel_warnings(device_type: str) -> list[str]:
    """Warn of operations that lack their fast version on a kind of device, and say what would bring it.

    Args:
        device_type: "cpu" or "cuda".

    Returns:
        One warning for each reason.

    Raises:
        ConfigError: QLORA_KERNELS holds an unknown word, or asks for fast versions that cannot be had.
    """
    refuse_unknown_kernels()
    found = operations_by_version(device_type)
    lines = [
        f"Plain torch takes the place of faster kernels for {', '.join(operations)}: "
        f"{version.removeprefix('reference: ')}."
        for version, operations in found.items()
        if version not in (FAST, ONLY_VERSION)
    ]
    if lines and kernel_choice() == "fast":
        raise ConfigError(f"QLORA_KERNELS=fast, but: {' '.join(lines)} Or unset QLORA_KERNELS.")
    return lines


def _version(code: str) -> tuple[int, int]:
    """Return the compute capability in `sm_86`, `sm_90a` or `compute_120`; () where it is none."""
    found = re.fullmatch(r"(?:sm|compute)_(\d+)(\d)[a-z]?", code)
    return (int(found[1]), int(found[2])) if found else ()  # type: ignore[return-value]


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Return True if code runs on a card: machine code on later cards of its major version, PTX on all later ones."""
    version = _version(code)
    return version <= capability and (code.startswith("compute_") or version[0] == capability[0])


def refuse_unknown_kernels() -> None:
    """Refuse an environment variable QLORA_KERNELS that holds an unknown word.

    Raises:
        ConfigError: it does.
    """
    try:
        kernel_choice()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def choose_device(wanted: str) -> torch.device:
    """Choose the device to train on.

    A CUDA device has its index: without one it would mean the current card of each thread, and threads that read or
    hash begin with the first.

    Args:
        wanted: the value of `model.device`.

    Returns:
        The device.

    Raises:
        ModelError: CUDA is asked for and absent, or the card cannot be used.
    """
    refuse_unknown_kernels()
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            f"CUDA is asked for, but torch sees no CUDA device here. `{command_line('doctor')}` says what it sees. "
            f"{way_to_cpu(wanted)}"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    card = current_card()
    refuse_unusable(card.index, wanted)
    return card


def current_card() -> torch.device:
    """Find the CUDA device that this thread works on.

    Returns:
        The device with its index.
    """
    return torch.device("cuda", torch.cuda.current_device())


def choose_compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Choose the dtype of computation for a device of this machine, as `compute_dtype_of` does.

    Args:
        wanted: the value of `model.compute_dtype`.
        device: to compute on.

    Returns:
        The dtype.
    """
    is_asked = wanted == "auto" and device.type != "cpu"
    return compute_dtype_of(wanted, torch.cuda.get_device_capability(device) if is_asked else None)


def compute_dtype_of(wanted: str, capability: tuple[int, int] | None) -> torch.dtype:
    """Choose the dtype of computation: fp32 on a CPU, where it is faster than bf16; bf16 on CUDA, fp16 before Ampere.

    Args:
        wanted: "auto", or the name of the dtype to take.
        capability: the card's compute capability; None for a CPU.

    Returns:
        The dtype.
    """
    if wanted != "auto":
        return getattr(torch, wanted)
    if capability is None:
        return torch.float32
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def device_with_memory(needed: int, device: torch.device, what: str) -> torch.device:
    """Choose `device`, or the CPU where a GPU has too little free memory.

    Args:
        needed: bytes.
        device: to use if it has them.
        what: needs them, which begins the message.

    Returns:
        The device.

    Raises:
        InsufficientMemoryError: neither has the memory.
    """
    if device.type == "cuda" and needed > free_memory(device):
        device = torch.device("cpu")
    free = free_memory(device)
    if needed > free:
        raise InsufficientMemoryError(f"{what} takes {gib(needed)}, and {device} has {gib(free)} free.")
    return device


def give_back_memory() -> None:
    """Free what was just dropped: cycles, and the GPU and pinned memory that torch keeps and that counts as in use."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a copy to the host or back may still be reading or writing what is dropped here
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        release_pinned_memory()


def free_memory(device: torch.device) -> int:
    """Measure the memory that is free on a device.

    Args:
        device: a GPU, or the CPU for the host's memory.

    Returns:
        Bytes.
    """
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory().available
