"""Parse amounts of memory such as 24GiB, and format amounts and dtypes as text."""

import re
from typing import TYPE_CHECKING

from qlora_trainer.common.errors import ConfigError

if TYPE_CHECKING:
    import torch

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Parse an amount of memory or disk.

    Args:
        text: such as "24GiB", "24 GB" or "512MiB", in upper or lower case.

    Returns:
        Bytes.

    Raises:
        ConfigError: it is not such an amount, or is less than a byte.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(B|[KMG]i?B)\s*", text, re.ASCII | re.IGNORECASE)
    amount = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if amount < 1:
        raise ConfigError(f"{text!r} is no amount of memory or disk; write it as 24GiB, or 24GB for 24 billion bytes.")
    return amount


def gibibytes(count: float) -> str:
    """Format a number of bytes in the largest of GiB, MiB, KiB and B of which it has one.

    Args:
        count: bytes.

    Returns:
        Such as "1.5 GiB".
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def gib(count: int) -> str:
    """Format a number of bytes in GiB, to two decimals.

    Args:
        count: bytes.

    Returns:
        Such as "0.52 GiB".
    """
    return f"{count / 2**30:.2f} GiB"


def dtype_name(dtype: "torch.dtype") -> str:
    """Return a dtype's name without "torch.".

    Args:
        dtype: such as torch.bfloat16.

    Returns:
        Such as "bfloat16".
    """
    return str(dtype).removeprefix("torch.")


def counted(count: int, noun: str, plural: str = "") -> str:
    """Write a number with its noun, in the singular for one.

    Args:
        count: how many.
        noun: of one, such as "row".
        plural: of several, where it is not the noun with an s.

    Returns:
        Such as "1 row" or "2,000 rows".
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Write a time in seconds, minutes or hours, as coarse as an estimate is.

    Args:
        seconds: from 0.

    Returns:
        Such as "1 s", "18 s", "3 min" or "2.5 h".
    """
    if seconds < 119.5:
        return f"{max(seconds, 1.0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 119.5 * 60 else f"{seconds / 3600:.1f} h"
