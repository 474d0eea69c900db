"""Define the errors a user can cause, each with a short message: what was found, what was expected, what to do.

Every kind inherits QLoRATrainerError, which the command line prints as one message with exit code 2, and the stdlib
kind that fits, so that a program using the library can catch either. What only we could break is an assertion and ends
with a traceback and exit code 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager

LFS_HEADER = b"version https://git-lfs.github.com/spec/"  # of what git leaves in place of a file that git-lfs keeps


class QLoRATrainerError(Exception):
    """Report something the user can fix: the message says what was found, where, and what to do."""


class ConfigError(QLoRATrainerError, ValueError):
    """Report a config key that is unknown, or a value of the wrong type or out of range."""


class DataError(QLoRATrainerError, ValueError):
    """Report a data file or row that cannot be used; the message names the file and the line or row."""


class ModelError(QLoRATrainerError, ValueError):
    """Report a base model that cannot be read, or is of a kind that cannot be trained here."""


class QuantizationError(QLoRATrainerError, ValueError):
    """Report weights that cannot be quantized, or are quantized otherwise than asked for."""


class AdapterError(QLoRATrainerError, ValueError):
    """Report an adapter that does not fit the model, or whose files are not what they should be."""


class CheckpointError(QLoRATrainerError, ValueError):
    """Report a checkpoint that is missing, damaged, or belongs to another run or base."""


class MergeError(QLoRATrainerError, ValueError):
    """Report a merge that cannot be made, or a merged model that failed its verification."""


class DtypeRangeError(MergeError):
    """Report a merge whose dtype cannot hold a weight or an activation, where bfloat16 can.

    Args:
        reason: what does not fit, in sentences.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{reason} Merge with --dtype bfloat16, which has the range. Nothing was kept.")


class TrainingError(QLoRATrainerError, ArithmeticError):
    """Report that training cannot go on, for example after several non-finite gradients in a row."""


class InsufficientMemoryError(QLoRATrainerError, MemoryError):
    """Report that the device or host has too little memory; the message says what would fit."""


class MicroBatchError(InsufficientMemoryError):
    """Report that memory ran out in the forward or backward pass of one micro-batch; nothing was updated.

    Args:
        row_lengths: tokens of each row of the micro-batch, padding counted.
        error: torch's, of which the message quotes the first line.
    """

    def __init__(self, row_lengths: list[int], error: BaseException) -> None:
        self.row_lengths = row_lengths  # tokens of each of its rows, padding counted
        self.reason = first_line(error)
        super().__init__(
            f"Memory ran out in a micro-batch of {len(row_lengths)} row{'s' * (len(row_lengths) != 1)}, "
            f"{sum(row_lengths):,} tokens in all ({self.reason}). "
            "Lower training.micro_batch_tokens or data.max_length, or set training.activation_checkpointing to a "
            "level that needs less memory."
        )


class FileMissingError(QLoRATrainerError, FileNotFoundError):
    """Report a file or directory that the user named and that does not exist."""


class OutputExistsError(QLoRATrainerError, FileExistsError):
    """Report an output directory that exists and is not empty; nothing was overwritten."""


class DiskError(QLoRATrainerError, OSError):
    """Report a write that failed: the disk is full or the directory cannot be written."""


class NotInstalledError(QLoRATrainerError, ImportError):
    """Report an optional package that is needed for what was asked; the message has the pip command."""


@contextmanager
def missing_files_name(key: str) -> Iterator[None]:
    """Begin the message of a FileMissingError from the block with the key of the config that names the file.

    Args:
        key: such as data.eval.

    Raises:
        FileMissingError: a file is missing.
    """
    try:
        yield
    except FileMissingError as error:
        message = str(error)
        begins_with_a_word = message[:2].istitle() or message.startswith("No ")
        raise FileMissingError(
            f"{key}: {message[0].lower() if begins_with_a_word else message[0]}{message[1:]}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the device's or the host's memory ran out.

    torch raises a plain RuntimeError for some of these failures, so its text is searched.

    Args:
        error: any. InsufficientMemoryError, which we raise, does not count: it has been dealt with.

    Returns:
        True if memory ran out.
    """
    if isinstance(error, QLoRATrainerError):
        return False
    reported = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or is_out_of_host_memory(error)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in reported))
    )


def is_out_of_host_memory(error: BaseException) -> bool:
    """Return True if torch's CPU allocator failed, for which it raises a plain RuntimeError.

    Args:
        error: any.

    Returns:
        True if host memory ran out.
    """
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def is_broken_allocator(error: BaseException) -> bool:
    """Return True if torch's CUDA allocator failed one of its own checks; from then on every allocation fails.

    With expandable segments it may break when memory runs out, because what was mapped halfway is never unmapped
    (pytorch#188008).

    Args:
        error: any.

    Returns:
        True if the allocator is broken.
    """
    reported = ("INTERNAL ASSERT FAILED", "CUDACachingAllocator")
    return isinstance(error, RuntimeError) and all(words in str(error) for words in reported)


@contextmanager
def memory_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn errors of memory that runs out in the block, the device's or the host's, into an InsufficientMemoryError.

    Args:
        what: the work in the block, which begins the message, such as "Loading base on cuda".
        advice: ends the message.

    Raises:
        InsufficientMemoryError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InsufficientMemoryError(f"{what} ran out of memory: {first_line(error)} {advice}".rstrip()) from error


def is_cuda_not_starting(error: BaseException) -> bool:
    """Return True if CUDA or its driver refuses to start on a card: in use by another program, or an unsuitable driver.

    torch and CUDA report this by the text of a RuntimeError alone.

    Args:
        error: any.

    Returns:
        True if CUDA does not start.
    """
    reported = (
        "busy or unavailable",  # another program has the card for itself
        "driver initialization failed",
        "initialization error",
        "No CUDA GPUs are available",
        "driver version is insufficient",
        "display driver / cuda driver combination",
        "system not yet initialized",
        "CUDA unknown error",
    )
    return isinstance(error, RuntimeError) and any(words in str(error) for words in reported)


def first_line(error: BaseException) -> str:
    """Summarize another library's error for use in a message of ours.

    Args:
        error: any.

    Returns:
        Its class, and the first line of its text.
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
