"""Being asked to stop: a first signal waits for the step boundary, where all can be saved; a second one does not."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGINT or SIGTERM is only noted, for the next step boundary; the second acts at once."""
    requested = False
    previous: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(signum, previous[signum])

    try:
        for signum in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[signum] = signal.signal(signum, note)
    except ValueError:  # only the main thread may; a caller in another thread handles its own signals
        previous.clear()
    try:
        yield lambda: requested
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
