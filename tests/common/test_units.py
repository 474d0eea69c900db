"""Promises of sizes: amounts of bytes as people write them, and an error message where they are none."""

import pytest

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.common.units import counted, duration, parse_bytes


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


@pytest.mark.parametrize(
    ("count", "nouns", "expected"),
    [
        (0, ("row",), "0 rows"),
        (1, ("row",), "1 row"),
        (2, ("row",), "2 rows"),
        (12345, ("row",), "12,345 rows"),
        (1, ("tensor stays", "tensors stay"), "1 tensor stays"),
        (2, ("tensor stays", "tensors stay"), "2 tensors stay"),
    ],
)
def test_one_is_counted_in_the_singular(count: int, nouns: tuple[str, ...], expected: str) -> None:
    assert counted(count, *nouns) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, "1 s"), (1.0, "1 s"), (108.4, "108 s"), (120.0, "2 min"), (3600.0, "60 min"), (9000.0, "2.5 h")],
)
def test_a_time_is_written_as_coarsely_as_an_estimate_is(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected
