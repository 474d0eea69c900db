"""Read files that may come from anyone: JSON within bounds, and whatever a library raises as an error of ours.

What is wrong with a file is reported by its name, and where a library reads a model directory by the key at fault too.
Libraries raise what they like for a file that they cannot read: ValueError, AssertionError, errors of their own, plain
Exception, a panic of their Rust code. So nothing is caught here by its type. What passes is what says nothing about the
file: our own errors, memory that ran out, a device that failed, and an interruption.
"""

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from qlora_trainer.common.errors import LFS_HEADER, ModelError, QLoRATrainerError, first_line, is_out_of_memory
from qlora_trainer.common.units import counted

_Container = TypeVar("_Container", dict[str, Any], list[Any])

_SECONDS_OF_TRIES = 5.0
_PANIC = "PanicException"  # of Rust code under Python; it is no Exception, and has no class that could be imported
# After the first of them all of torch's calls of the device fail, so it says nothing about a file or model. Known by
# name, as torch is not imported to read data.
_DEVICE_FAILURES = ("AcceleratorError", "OutOfMemoryError")


def read_bounded_json(
    path: Path, container: type[_Container], max_bytes: int, error: type[QLoRATrainerError], advice: str
) -> _Container:
    """Read a JSON file in UTF-8 that holds one object or one list.

    Args:
        path: the file.
        container: dict for an object, list for a list.
        max_bytes: a larger file is not read.
        error: what to raise.
        advice: ends the message: what to do about a file that is missing, damaged or another one.

    Returns:
        The object's keys and values, or the list's items.

    Raises:
        QLoRATrainerError: of the kind `error`; the file is missing, cannot be read, is larger, or holds something else.
    """
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise error(f"{path} has {counted(size, 'byte')}, more than the {max_bytes} that are read. {advice}")
        text = path.read_bytes()
        refuse_pointer_text(path, text, error)
        content = json.loads(text.decode("utf-8"))
    except FileNotFoundError as reason:
        raise error(f"{path} is missing. {advice}") from reason
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror}.") from reason
    except (ValueError, RecursionError) as reason:
        if isinstance(reason, QLoRATrainerError):
            raise
        raise error(f"{path} is not JSON: {reason}. {advice}") from reason
    if not isinstance(content, container):
        wanted = "object" if container is dict else "list"
        raise error(f"{path} should hold a JSON {wanted}, but holds a {type(content).__name__}. {advice}")
    return content


def refuse_pointer_text(path: Path, text: bytes, error: type[QLoRATrainerError] = ModelError) -> None:
    """Refuse a file that begins as what git leaves in place of a file that is kept by git-lfs.

    Args:
        path: of the file.
        text: its first bytes, or all.
        error: what to raise.

    Raises:
        QLoRATrainerError: of the kind `error`; it is a git-lfs pointer.
    """
    if text.startswith(LFS_HEADER):
        raise error(
            f"{path} is a git-lfs pointer, not the file itself. Fetch it: "
            f"{shlex.join(['git', '-C', str(path.parent), 'lfs', 'pull'])}"
        )


def is_from_library(error: BaseException) -> bool:
    """Return True if an error says that a library could not do its work with what it was given.

    Args:
        error: any.

    Returns:
        False for our own errors, for memory that ran out, a device that failed, and what interrupts a program.
    """
    kind = type(error)
    is_from_device = kind.__module__.partition(".")[0] == "torch" and kind.__name__ in _DEVICE_FAILURES
    if isinstance(error, QLoRATrainerError) or is_out_of_memory(error) or is_from_device:
        return False
    return isinstance(error, Exception) or type(error).__name__ == _PANIC


@contextmanager
def as_model_error(describe: Callable[[BaseException], str]) -> Iterator[None]:
    """Turn whatever a library raises in the block into a ModelError.

    Args:
        describe: makes the message of the error.

    Raises:
        ModelError: a library raised something.
        BaseException: what is not a library's, as it was raised in the block.
    """
    try:
        yield
    except BaseException as error:
        if not is_from_library(error):
            raise
        raise ModelError(describe(error)) from error


@contextmanager
def library_boundary(
    what: str, values: Mapping[str, Any] | None = None, attempt: Callable[[dict[str, Any]], object] | None = None
) -> Iterator[None]:
    """Turn whatever a library raises in the block into a ModelError that names the file and the key.

    Args:
        what: begins the message: the file and what it cannot be read as, such as "base/config.json cannot be read".
        values: what the file holds, by key.
        attempt: does the work of the block again with other values, to find the key at fault.

    Raises:
        ModelError: a library raised something.
        BaseException: what is not a library's, as it was raised in the block.
    """

    def describe(error: BaseException) -> str:
        key = key_at_fault(values, attempt, error) if values and attempt else None
        named = "" if key is None or values is None else f" The key at fault is {key}: {values[key]!r:.80}."
        return f"{what}: {first_line(error.__cause__ or error).rstrip('.')}.{named}"

    with as_model_error(describe):
        yield


def key_at_fault(
    values: Mapping[str, Any], attempt: Callable[[dict[str, Any]], object], error: BaseException
) -> str | None:
    """Find the key of a file without which a library can read it, by trying; keys that the error names come first.

    Args:
        values: what the file holds, by key.
        attempt: reads other values in place of the file's.
        error: that reading the file raised.

    Returns:
        The key; None where no single one is at fault, or it was not found within seconds.

    Raises:
        BaseException: an interrupt, or memory that ran out, in one of the tries.
    """
    text = _alphanumeric(f"{error} {error.__cause__ or ''}")

    def is_named(key: str) -> bool:
        value = values[key]
        return _alphanumeric(key) in text or (isinstance(value, str) and bool(value) and _alphanumeric(value) in text)

    deadline = time.monotonic() + _SECONDS_OF_TRIES
    for key in sorted(values, key=lambda key: not is_named(key)):
        try:
            attempt({other: value for other, value in values.items() if other != key})
        except BaseException as other:
            if not is_from_library(other) and not isinstance(other, QLoRATrainerError):
                raise
        else:
            return key
        if time.monotonic() > deadline:
            break
    return None


def _alphanumeric(text: str) -> str:
    """Drop all but what names are made of, so that pre_tokenizer is found in PreTokenizerUntagged."""
    return "".join(character for character in text.lower() if character.isalnum())
