"""End a chat template that does not come to an end, or that fills the memory.

A template is a program from elsewhere. One that loops forever would hang a run before its first step, and say nothing.
While a text is rendered, a thread looks at the processor time and the memory that it takes, and raises an error in the
rendering thread where that is too much. An operation that makes a huge value at once cannot be interrupted: those are
checked before they are computed.
"""

import contextlib
import ctypes
import re
import threading
import time
import types
from collections.abc import Callable, Iterator, Sized
from typing import Any

import psutil
from jinja2.exceptions import TemplateRuntimeError

SECONDS = 5.0  # of processor time, for one text of one row; a usual one takes a ten-thousandth of that
BYTES = 2**30  # more in memory than at the first look
LARGEST = 2**26  # characters or items that one operation may make, and number that it may be given
_LOOK_EVERY = 0.05  # seconds
_IDLE = 2.0  # seconds after which the watching thread ends
_METHODS = (types.MethodType, types.BuiltinMethodType)
_WIDE = re.compile(r"%[^a-zA-Z%]*[0-9]{8}|:[^{}]*[0-9]{8}[^{}]*\}")  # a format with a width of eight digits


class TemplateLimitError(TemplateRuntimeError):
    """Report a template that was ended, since it took too much time or memory.

    Args:
        message: what it did.
    """

    def __init__(self, message: str = "it did not come to an end, or filled the memory, and was ended") -> None:
        super().__init__(message)


class _Watch:
    """Limit the renderings of one thread at a time, from another that lives while there are any.

    A rendering takes no lock, as there are millions: only an error that is being raised makes it wait.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: list[int] | None = None  # the thread; a new list for each rendering
        self._raising = False
        self._thread: threading.Thread | None = None
        self._last = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise TemplateLimitError in the block where it takes too long, or too much memory."""
        self._current = [threading.get_ident()]
        if self._thread is None:
            self._start()
        try:
            yield
        finally:
            self._current = None
            if self._raising:
                with self._lock:  # an error that comes too late is none
                    self._raising = False
                    _raise_in(threading.get_ident(), None)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._last = time.monotonic()
                self._thread = threading.Thread(target=self._look, name="template watch", daemon=True)
                self._thread.start()

    def _look(self) -> None:
        process = psutil.Process()
        seen: list[int] | None = None
        began, memory = 0.0, 0
        while True:
            time.sleep(_LOOK_EVERY)
            current = self._current
            if current is None:
                if time.monotonic() - self._last > _IDLE:
                    self._thread = None
                    return
                continue
            self._last = time.monotonic()
            if current is not seen:
                seen, began, memory = current, _processor_time(current[0]), 0
            elif memory == 0:  # it takes longer than others
                memory = process.memory_info().rss
            elif (
                _processor_time(current[0]) - began > SECONDS or process.memory_info().rss - memory > BYTES
            ) and self._end(current):
                seen = None

    def _end(self, rendering: list[int]) -> bool:
        """Raise the error in a rendering, if it is still going on."""
        with self._lock:
            self._raising = True
            if self._current is not rendering:
                self._raising = False
                return False
            _raise_in(rendering[0], TemplateLimitError)
            return True


_WATCH = _Watch()
limited = _WATCH.watched


def _processor_time(thread: int) -> float:
    """Return the seconds that a thread has computed; where a system does not tell, those of the whole process."""
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.process_time()


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Make a thread raise an error before its next step in Python; with None, take that back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)


def limit_operations(environment: Any) -> None:
    """Make an environment refuse operations whose value would be huge: products, powers, padding, formats.

    Args:
        environment: jinja2's SandboxedEnvironment, changed in place; templates that are compiled in it from now on are
            limited.
    """
    operate, call, format_of = environment.call_binop, environment.call, environment.wrap_str_format

    def checked_operate(context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and any(isinstance(side, Sized) for side in (left, right)):
            length, count = (len(left), right) if isinstance(left, Sized) else (len(right), left)
            _refuse_if(isinstance(count, int) and length * count > LARGEST)
        elif operator == "**":
            _refuse_if(not all(isinstance(side, int | float) and abs(side) < 2**10 for side in (left, right)))
        elif operator == "%":
            _refuse_if(isinstance(left, str) and bool(_WIDE.search(left)))
        return operate(context, operator, left, right)

    def checked_call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | list):
            _check_numbers(*args, *kwargs.values())
        return call(context, function, *args, **kwargs)

    def checked_format(value: Any) -> Any:
        """Choose what runs in place of str.format, as the environment does.

        Args:
            value: what a template calls.

        Returns:
            The function; None if `value` is no str.format.
        """
        if not isinstance(value, _METHODS):  # as nearly all are
            return None
        owner = getattr(value, "__self__", None)
        if isinstance(owner, str) and value.__name__ in ("format", "format_map"):
            _refuse_if(bool(_WIDE.search(owner)))
        return format_of(value)

    environment.intercepted_binops = frozenset({"*", "**", "%"})
    environment.call_binop, environment.call = checked_operate, checked_call
    environment.wrap_str_format = checked_format
    for name in ("center", "indent", "batch", "slice", "format"):
        environment.filters[name] = _checked_filter(name, environment.filters[name])


def _checked_filter(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(*args, *kwargs.values())
        _refuse_if(name == "format" and isinstance(args[0], str) and bool(_WIDE.search(args[0])))
        return run(*args, **kwargs)

    vars(checked).update(vars(run))  # what jinja passes it, such as the environment
    return checked


def _check_numbers(*values: Any) -> None:
    _refuse_if(any(isinstance(value, int) and abs(value) > LARGEST for value in values))


def _refuse_if(is_too_large: bool) -> None:
    if is_too_large:
        raise TemplateLimitError("it makes a text that would fill the memory")
