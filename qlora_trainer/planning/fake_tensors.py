"""Run a training step as it is on tensors without memory, and fast.

A fake tensor has a shape, a dtype, a storage and a lifetime, but no memory. torch works out what an operation makes of
such tensors in Python, in a tenth of a millisecond and more. The step of a long row has half a million operations but
only some thousand different ones: layers are alike, and so are the tiles of a row. So what an operation gave is kept by
the shapes, strides and dtypes of its arguments, and the next time made from that.

Left out: operations that give several tensors, or change the shape of what they are given; torch works those out each
time.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

import torch

from qlora_kernels.card import Card, planned_for
from qlora_kernels.torch_internals import (
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    default_device,
    is_reading_of_a_number,
    without_dispatch,
)
from qlora_trainer.common.transformers_internals import masks_as_for_real_tensors

PLAIN = (NoneType, bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments, next to tensors, by which an operation is known again: compared by value, holding nothing."""

Again = Callable[[Sequence[Any], Mapping[str, Any]], Any]  # an operation's arguments -> its result, made once more


class FakeRun:
    """Make tensors without memory in the block; a number read from one is 1.

    Training reads a loss, a norm, and whether it is finite; so a plan sees a finite loss and norm.

    Args:
        card: attention and loss go as on this card; None: as where the tensors are.
    """

    def __init__(self, card: Card | None = None) -> None:
        self.card = card
        self.mode = FakeTensorMode()
        self._remembering = _Remembering(self.mode)
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        stack = contextlib.ExitStack()
        for context in (self.mode, self._remembering, masks_as_for_real_tensors(), planned_for(self.card)):
            stack.enter_context(context)
        self._entered.append(stack)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


class _Remembering(TorchDispatchMode):
    """Wrap a FakeTensorMode, and ask it only for what it has not given before.

    Args:
        mode: to wrap.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self._known: dict[tuple[Any, ...], Again | None] = {}  # None: to be worked out each time

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_reading_of_a_number(func) and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        key = _key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        if key in self._known:
            again = self._known[key]
            return func(*args, **kwargs) if again is None else again(args, kwargs)
        result = func(*args, **kwargs)
        has_changed_them = _key(func, args, kwargs) != key  # as resize_ does
        self._known[key] = None if has_changed_them else self._recipe(func, args, kwargs, result)
        return result

    def _recipe(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Again | None:
        if type(result) in PLAIN:
            return lambda args, kwargs: result
        if not isinstance(result, FakeTensor):
            return None
        for place, argument in enumerate(args):
            if argument is result:
                return lambda args, kwargs: args[place]
        for name, argument in kwargs.items():
            if argument is result:
                return lambda args, kwargs: kwargs[name]
        form = result.shape, result.stride(), result.dtype, result.fake_device
        for place, argument in enumerate(args):
            if isinstance(argument, FakeTensor) and argument.untyped_storage() is result.untyped_storage():
                return functools.partial(self._view, place, int(result.storage_offset()), *form)
        again = functools.partial(self._new, *form)
        has_all = again((), {}).untyped_storage().nbytes() == result.untyped_storage().nbytes()
        return again if has_all else None

    def _new(
        self,
        shape: torch.Size,
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> FakeTensor:
        with without_dispatch():
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(self.mode, tensor, device)

    def _view(
        self,
        place: int,
        offset: int,
        shape: torch.Size,
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> FakeTensor:
        with without_dispatch():
            tensor = torch.empty(0, dtype=dtype, device="meta")
            tensor.set_(args[place].untyped_storage(), offset, shape, stride)
        return FakeTensor(self.mode, tensor, device)


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return all that an operation's result depends on; None where an argument cannot be identified by its value."""
    parts = [func, torch.get_default_dtype(), default_device(), torch.is_inference_mode_enabled()]
    if not _describe(args, parts):
        return None
    if kwargs:
        parts += kwargs
        if not _describe(kwargs.values(), parts):
            return None
    return tuple(parts)


def _describe(arguments: Iterable[Any], parts: list[Any]) -> bool:
    """Append what distinguishes the arguments to `parts`; return False where one cannot be described."""
    for argument in arguments:
        kind = type(argument)
        if kind in PLAIN:
            parts += (kind, argument)  # the kind too: 1, 1.0 and True are equal
        elif isinstance(argument, FakeTensor):
            if argument.constant is not None:
                return False
            parts += (argument.fake_device, argument.dtype, argument.shape, argument.stride())
            parts.append(argument.storage_offset())
        elif kind in (list, tuple):
            parts += (kind, len(argument))
            if not _describe(argument, parts):
                return False
        else:
            return False
    return True
