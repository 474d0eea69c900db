"""Run calls one after another in a thread, such as writing while the next values are computed.

Few calls wait at a time, so what they hold is bounded, and a caller that is faster than the thread waits for it. The
exception of a call is raised in the caller, at the next `submit` that has to wait or at `finish`; none is lost. Until
then the later calls still run, so each must work even if an earlier one has failed.
"""

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class Background:
    """Run submitted calls in one thread, as a context manager.

    Its end waits for all calls; after an exception it drops those that have not begun.

    Args:
        most_waiting: calls that may be submitted and not finished.
    """

    def __init__(self, most_waiting: int = 2) -> None:
        self.most_waiting = most_waiting
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
        """Run function(*arguments) after the calls before it.

        Waits while too many calls are unfinished, and raises the exception of a call that it waited for.

        Args:
            function: called in the thread.
            *arguments: passed to it.
        """
        while len(self._calls) >= self.most_waiting:
            self._calls.popleft().result()
        self._calls.append(self._pool.submit(function, *arguments))

    def finish(self) -> None:
        """Wait for all calls, and raise the exception of the first that failed."""
        while self._calls:
            self._calls.popleft().result()
