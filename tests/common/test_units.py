"""Promises of sizes: amounts of bytes as people write them, and an error message where they are none."""

import pytest

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.common.units import parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"), [("24GiB", 24 * 2**30), ("24 GB", 24 * 10**9), ("0.5gib", 2**29), ("512MiB", 2**29)]
)
def test_memory_is_read_in_both_kinds_of_units(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["24", "a lot", "24G", "-1GiB", "0GiB", "", "5iB", "5 \u212aB", "9" * 400 + "B", "0.1B"]
)
def test_no_amount_of_memory_ends_with_an_error_message(text: str) -> None:
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_bytes(text)
