"""Tensor operations of the QLoRA trainer: torch and triton only, no knowledge of models.

Each operation is a contract in plain torch; some have a faster version for CUDA with the same results. Import them
from their modules, which README.md beside this package lists.
"""

import os

_CHOICES = ("auto", "torch", "triton")


def kernel_choice() -> str:
    """What the environment variable QLORA_KERNELS asks for: the one place that reads it.

    `auto` (default): the fast version where the device and the installation have one, else plain torch. `torch`: plain
    torch everywhere. `triton`: as auto, but a CUDA tensor without Triton installed is an error. CPU tensors always take
    plain torch.

    Raises:
        ValueError: the variable holds another word.
    """
    choice = os.environ.get("QLORA_KERNELS", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"QLORA_KERNELS is {choice!r}; it can be {', '.join(_CHOICES)}. Set one of these or unset it.")
    return choice
