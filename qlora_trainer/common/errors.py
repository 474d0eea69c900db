"""The errors a user can cause, each a short error message: what was found, what was expected, what to do.

Every kind inherits QLoRATrainerError, which the command line turns into one message and exit code 2, and the
stdlib kind that fits, so that a program using the library can catch either. What only we could break is an
assertion and ends with a traceback and exit code 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class QLoRATrainerError(Exception):
    """Something the user can mend. The message says what was found, where, and what to do."""


class ConfigError(QLoRATrainerError, ValueError):
    """A config key is unknown, or a value has the wrong type or is out of range."""


class DataError(QLoRATrainerError, ValueError):
    """A data file or row cannot be used. The message names the file and the line or row."""


class ModelError(QLoRATrainerError, ValueError):
    """A base model cannot be read, or is of a kind that cannot be trained here."""


class QuantizationError(QLoRATrainerError, ValueError):
    """Weights cannot be quantized, or are quantized otherwise than asked for."""


class AdapterError(QLoRATrainerError, ValueError):
    """An adapter does not fit the model, or its files are not what they should be."""


class CheckpointError(QLoRATrainerError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another run or base."""


class MergeError(QLoRATrainerError, ValueError):
    """A merge cannot be made, or the merged model failed its verification."""


class TrainingError(QLoRATrainerError, ArithmeticError):
    """Training cannot go on, for example after several non-finite gradients in a row."""


class InsufficientMemoryError(QLoRATrainerError, MemoryError):
    """The device or host has too little memory. The message says what would fit."""


class MicroBatchError(InsufficientMemoryError):
    """Memory ran out in the forward or backward pass of one micro-batch; nothing was updated."""

    def __init__(self, row_lengths: list[int], error: BaseException) -> None:
        self.row_lengths = row_lengths  # tokens of each of its rows, padding counted
        self.reason = first_line(error)
        super().__init__(
            f"Memory ran out in a micro-batch of {len(row_lengths)} rows, {sum(row_lengths):,} tokens ({self.reason}). "
            "Lower training.micro_batch_tokens or data.max_length, or set training.activation_checkpointing to a "
            "level that needs less memory."
        )


class FileMissingError(QLoRATrainerError, FileNotFoundError):
    """A file or directory that the user named does not exist."""


class OutputExistsError(QLoRATrainerError, FileExistsError):
    """An output directory exists and is not empty; nothing was overwritten."""


class DiskError(QLoRATrainerError, OSError):
    """A write failed: the disk is full or the directory cannot be written."""


class NotInstalledError(QLoRATrainerError, ImportError):
    """An optional package is needed for what was asked. The message has the pip command."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's memory ran out; torch tells several kinds of it by the text alone.

    InsufficientMemoryError, which we raise, is not one: it is a MemoryError that has been dealt with.
    """
    if isinstance(error, QLoRATrainerError):
        return False
    reported = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in reported)
    )


def is_broken_allocator(error: BaseException) -> bool:
    """Whether torch's CUDA allocator failed a check of its own, as it does at every allocation once it is broken.

    With expandable segments it can be after memory ran out: what was mapped half way stays so (pytorch#188008).
    """
    reported = ("INTERNAL ASSERT FAILED", "CUDACachingAllocator")
    return isinstance(error, RuntimeError) and all(words in str(error) for words in reported)


@contextmanager
def memory_errors(what: str, advice: str = "") -> Iterator[None]:
    """Within, memory that runs out, the device's or the host's, becomes an InsufficientMemoryError on `what` did so."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InsufficientMemoryError(f"{what} ran out of memory: {first_line(error)} {advice}".rstrip()) from error


def is_cuda_not_starting(error: BaseException) -> bool:
    """True if CUDA or its driver refuses to start on a card: held by another program, a driver that does not fit.

    torch and CUDA say it by the text of a RuntimeError alone.
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
    """Another library's error for use in an error message: its kind, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
