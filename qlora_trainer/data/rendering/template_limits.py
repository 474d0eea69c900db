"""End a chat template that does not come to an end, or that fills the memory.

A template is a program from elsewhere. One that loops forever would hang a run before its first step, and say nothing.
While a text is rendered, a thread looks at the processor time and the memory that it takes, and raises an error in the
rendering thread where that is too much. An operation in C cannot be interrupted: what it may make is bounded before it
is computed, by the sizes of what it is given. Only operations that are known to make little more than they are given
are left alone, so that one which nobody thought of is bounded too.
"""

import contextlib
import ctypes
import math
import re
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import psutil
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import TemplateRuntimeError

SECONDS = 5.0  # of processor time, for one text of one row; a usual one takes a ten-thousandth of that
BYTES = 2**30  # more in memory than before
LARGEST = 2**26  # characters or items that one operation may make
LONGEST = 2**20  # characters of a text that may be many times as long as its row
TIMES = 16  # as long as the row, a longer text may be
_LOOK_EVERY = 0.05  # seconds
_IDLE = 2.0  # seconds after which the watching thread ends
_METHODS = (types.MethodType, types.BuiltinMethodType)
# A format with a width of eight digits, or one that is given with the values.
_WIDE = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{8}|\*)|:[^{}]*(?:[0-9]{8}[^{}]*\}|\{)")
_BITS = 2**12  # of the integers that may be multiplied or divided
# What makes little more than it is given, however it is called.
_LINEAR_METHODS = frozenset(
    re.findall(
        r"\w+",
        "strip lstrip rstrip split rsplit splitlines partition rpartition startswith endswith removeprefix "
        "removesuffix find rfind index rindex count upper lower title capitalize casefold swapcase isalnum "
        "isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper "
        "get items keys values copy",
    )
)
_LINEAR_FILTERS = frozenset(
    re.findall(
        r"\w+",
        "abs attr count d default dictsort filesizeformat first float groupby int items last length list map max min "
        "random reject rejectattr reverse round safe select selectattr sort unique",
    )
)
# What makes little more than the text of what it is given, be it a list.
_LINEAR_TEXT_FILTERS = frozenset(
    re.findall(r"\w+", "capitalize e escape forceescape lower striptags title trim truncate upper urlencode wordcount")
)
_OPERAND = "an operand of ~"  # the name of a filter, which no template can write


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
        self._memory = 0  # in use at the last look, bytes

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
                self._memory = psutil.Process().memory_info().rss
                self._thread = threading.Thread(target=self._look, name="template watch", daemon=True)
                self._thread.start()

    def _look(self) -> None:
        process = psutil.Process()
        seen: list[int] | None = None
        began, memory = 0.0, 0
        while True:
            time.sleep(_LOOK_EVERY)
            current, before = self._current, self._memory
            self._memory = process.memory_info().rss
            if current is None:
                if time.monotonic() - self._last > _IDLE:
                    self._thread = None
                    return
                continue
            self._last = time.monotonic()
            if current is not seen:
                seen, began, memory = current, _processor_time(current[0]), before
            is_long = _processor_time(current[0]) - began > SECONDS
            if (is_long or self._memory - memory > BYTES) and self._end(current):
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


def check_length(text: str, *given: Any) -> None:
    """Refuse a finished text that is much longer than what it was made of: it would be tokenized for hours.

    Args:
        text: that a template made.
        *given: turns and tools.

    Raises:
        TemplateLimitError: it is too long.
    """
    _refuse_if(len(text) > LONGEST and len(text) > TIMES * sum(map(_size, given)))


def limit_operations(environment: Any) -> None:
    """Make an environment refuse operations whose value would be huge, or would take long to compute.

    Args:
        environment: jinja2's SandboxedEnvironment, changed in place; templates that are compiled in it from now on are
            limited.
    """
    operate, call, format_of = environment.call_binop, environment.call, environment.wrap_str_format

    def checked_operate(context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _refuse_if(bool(_WIDE.search(left)) or _written_size(right) > LARGEST)
        elif operator == "**":
            _refuse_if(not all(isinstance(side, int | float) and abs(side) < 2**10 for side in (left, right)))
        elif any(isinstance(side, Sized) for side in (left, right)):
            _refuse_if(_size(left) * _size(right) > LARGEST)
        else:
            _refuse_if(sum(side.bit_length() for side in (left, right) if isinstance(side, int)) > _BITS)
        return operate(context, operator, left, right)

    def checked_call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, types.BuiltinMethodType) and function.__name__ not in _LINEAR_METHODS:
            args = _bounded(function.__name__, (function.__self__, *args), kwargs)[1:]
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
        run = format_of(value)

        def checked_run(*args: Any, **kwargs: Any) -> Any:
            _refuse_if(_written_size(args, kwargs) > LARGEST)
            return run(*args, **kwargs)

        return run and checked_run

    def checked_output(value: Any) -> Any:
        """Refuse to write a list of lists of lists, and so on, that would be huge as text.

        Args:
            value: that a template writes, or joins to others by ~.

        Returns:
            The value.
        """
        if not isinstance(value, str):
            _refuse_if(_written_size(value) > LARGEST)
        return value

    environment.finalize = environment.filters[_OPERAND] = checked_output
    environment.code_generator_class = _BoundedCode
    environment.intercepted_binops = frozenset({"*", "**", "%", "//", "/"})
    environment.call_binop, environment.call = checked_operate, checked_call
    environment.wrap_str_format = checked_format
    for name, run in environment.filters.items():
        if name not in _LINEAR_FILTERS and name != _OPERAND:
            environment.filters[name] = _checked_filter(name, run)


class _BoundedCode(CodeGenerator):
    """Compile templates with a look at each operand of ~, of which Jinja makes text without asking its environment."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        for joined in node.find_all(nodes.Concat):
            joined.nodes = [
                one if isinstance(one, nodes.Const) else nodes.Filter(one, _OPERAND, [], [], None, None)
                for one in joined.nodes
            ]
            for one in joined.nodes:
                one.set_environment(self.environment).set_lineno(joined.lineno)
        super().visit_Template(node, frame)


def _checked_filter(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    passed = int(hasattr(run, "jinja_pass_arg"))  # whether the environment or such comes first

    def checked(*args: Any, **kwargs: Any) -> Any:
        return run(*args[:passed], *_bounded(name, args[passed:], kwargs), **kwargs)

    vars(checked).update(vars(run))
    return checked


def _bounded(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Refuse an operation that may make too much, and return what it is to be given."""
    value, *others = (list(arg) if isinstance(arg, Iterator) else arg for arg in args)
    others_and_named = [*others, *kwargs.values()]
    if name == "format":
        made = _written_size(others_and_named)
        _refuse_if(isinstance(value, str) and bool(_WIDE.search(value)))
    elif name in _LINEAR_TEXT_FILTERS:
        made = 0 if isinstance(value, str) else _written_size(value)
    elif name == "replace" and len(others) >= 2 and all(isinstance(one, str) for one in (value, *others[:2])):
        made = value.count(others[0]) * len(others[1])
    elif name == "join" and isinstance(value, str) and others:  # the method
        made = len(value) * _length(others[0]) + _size(others[0])
    elif name == "join":
        made = _length(value) * sum(map(_size, others[:1])) + _size(value)
    elif name == "sum":
        made = _length(value) * _size(value)  # a list is copied for each that is added to it
    else:
        made = math.prod(map(_size, (value, *others_and_named)))
    _refuse_if(made > LARGEST)
    return (value, *others)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 1


def _written_size(*values: Any) -> int:
    """Count the characters and items of values that are written as text, where a number is short."""
    return _size(values)


def _size(value: Any, seen: dict[int, int] | None = None) -> int:
    """Count the characters and items of a value, those of its items among them; of a number, what it may count.

    A list that is in another many times is counted as often, and looked at once: `seen` holds sizes by identity.
    """
    if isinstance(value, str | bytes):
        return max(len(value), 1)
    if isinstance(value, int):
        return max(abs(value), 1) if seen is None else 1
    if not isinstance(value, list | tuple | set | Mapping):
        return 1
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = 1
        items = (*value, *value.values()) if isinstance(value, Mapping) else value
        seen[id(value)] = 1 + sum(_size(item, seen) for item in items)
    return seen[id(value)]


def _refuse_if(is_too_large: bool) -> None:
    if is_too_large:
        raise TemplateLimitError("it makes a text that would fill the memory")
