"""Note what a function is called with, what operations torch runs and what they make, and which files Python opens."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from qlora_kernels.torch_internals import OpOverload, TorchDispatchMode

_listening: list[list[str]] = []  # a hook cannot be taken away, so one is there for all, and adds to these


def noting(function: Callable[..., Any], note: Callable[..., object]) -> Callable[..., Any]:
    """Return a function that gives its arguments to `note`, then to `function`, whose result it returns."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return function(*args, **kwargs)

    return noted


def unchanged(value: Any) -> Any:
    """Return the value, as a hook on saved tensors does that only looks at them."""
    return value


class Operations(TorchDispatchMode):
    """List the operations of torch that run in the block, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [operation.name() for operation in self.seen]


class TensorSizes(TorchDispatchMode):
    """List the number of elements of every tensor that an operation makes in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        self.sizes += [output.numel() for output in outputs if isinstance(output, Tensor)]
        return result


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Yield a list to which the path of every file is added that Python opens in the block."""
    _install_hook()
    paths: list[str] = []
    _listening.append(paths)
    try:
        yield paths
    finally:
        _listening.remove(paths)


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_note_open)


def _note_open(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        for paths in _listening:
            paths.append(os.fsdecode(args[0]))
