"""Run calls in a thread: one after another, as writing while the next values are computed, or one ahead of its use.

`Background` lets few calls wait at a time, so what they hold is bounded, and a caller that is faster than the thread
waits for it. The exception of a call is raised in the caller, at the next `submit` that has to wait or at `finish`;
none is lost. Until then the later calls still run, so each must work even if an earlier one has failed. `Ahead` raises
its exception where its result is taken.
"""

import collections
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

_Result = TypeVar("_Result")


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


class Ahead(Generic[_Result]):
    """Run one call in a thread of its own, which ends with it, whether its result is taken or not.

    It begins at once. Nobody needs to wait for it, but the end of the process does.

    Args:
        function: called in the thread; it reads only what does not change meanwhile.
        *arguments: passed to it.
    """

    def __init__(self, function: Callable[..., _Result], *arguments: Any) -> None:
        self._future: Future[_Result] = Future()
        threading.Thread(target=self._run, args=(function, arguments)).start()

    def _run(self, function: Callable[..., _Result], arguments: tuple[Any, ...]) -> None:
        try:
            result = function(*arguments)
        except BaseException as error:  # handed on whole, as it would have come without a thread
            self._future.set_exception(error)
        else:
            self._future.set_result(result)

    def take(self) -> _Result:
        """Wait for the call, and return its result or raise its exception.

        Returns:
            The result.
        """
        return self._future.result()
