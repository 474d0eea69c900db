"""Define the progress callback `(label, done, total)`: library code calls it, and only the command line draws."""

from typing import Protocol

# What a run does while it trains, as it labels its progress, of which `done` counts the steps that were taken.
TRAINING, EVALUATING, SAVING = "training", "evaluating", "saving"


class Progress(Protocol):
    """Receive the progress of long work."""

    def __call__(self, label: str, done: int, total: int | None) -> None:
        """Report how far the work is.

        Args:
            label: what is being done, such as "Reading weights".
            done: bytes or elements that are finished.
            total: all of them, in the same unit; None where it is not known.
        """
        ...


def silent(label: str, done: int, total: int | None) -> None:
    """Ignore progress, for callers that show none.

    Args:
        label: ignored.
        done: ignored.
        total: ignored.
    """
