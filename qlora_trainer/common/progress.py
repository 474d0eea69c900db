"""How long work tells where it is: a callable passed in, so that no module below the command line draws anything."""

from typing import Protocol


class Progress(Protocol):
    """Called as work proceeds; `total` is None where it is not known."""

    def __call__(self, label: str, done: int, total: int | None) -> None: ...


def silent(label: str, done: int, total: int | None) -> None:
    """The progress of a caller who does not look."""
