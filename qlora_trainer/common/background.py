"""Calls that run one after another in a thread next to the caller's: writing while the next values are computed.

Few calls wait at a time, so what they hold is bounded, and the caller is slowed to the pace of the thread. An exception
of a call surfaces in the caller, at the next `submit` that has to wait, or at `finish`; nothing is swallowed. Until
then the calls behind it still run, so a call must bear that those before it have failed.
"""

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class Background:
    """A thread that takes calls, as a context manager; leaving it by an exception drops the calls that wait."""

    def __init__(self, most_waiting: int = 2) -> None:
        self.most_waiting = most_waiting  # calls that were submitted and have not ended
        self._pool = ThreadPoolExecutor(1)
        self._calls: collections.deque[Future[Any]] = collections.deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run function(*arguments) after the calls before it; waits where too many wait already."""
        while len(self._calls) >= self.most_waiting:
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(function, *arguments))

    def finish(self) -> None:
        """Wait for all calls."""
        while self._calls:
            self._calls.popleft().result()
