"""Note what a function replaces in a model, so that it can be put back, and done again, at once.

An adapter of any kind is put on a model by replacing some of its modules, parameters, hooks and attributes by others.
What was there before is kept, not made again: with the changes undone the model is the base itself, with the same bits.
Left out: what is changed inside of an object that stays, such as the values of a parameter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

_ABSENT = object()  # an entry that is not there
_OF_TORCH = vars(nn.Module()).keys()  # attributes of every module: children, parameters, buffers, kinds of hooks, mode


class Change(NamedTuple):
    """Hold an entry of one of a module's dictionaries, a child or parameter mostly, before and after the change."""

    entries: dict[Any, Any]
    name: Any
    before: Any
    after: Any


def changes_made(model: nn.Module, make: Callable[[], object]) -> list[Change]:
    """Find out what a function replaces, and put back what was there before; also where the function raises.

    Args:
        model: is changed by it.
        make: the function.

    Returns:
        The changes.
    """
    before = [(entries, entries.copy(), others) for module in model.modules() for entries, others in _entries(module)]
    changes: list[Change] = []
    try:
        make()
    finally:
        for entries, was, others in before:
            own = [name for name in was | entries if name not in others]
            found = (Change(entries, name, was.get(name, _ABSENT), entries.get(name, _ABSENT)) for name in own)
            changes += [change for change in found if change.before is not change.after]
        undo(changes)
    return changes


def apply(changes: Iterable[Change]) -> None:
    """Replace what was there before by what came after.

    Args:
        changes: none of which is made.
    """
    for change in changes:
        _set(change, change.after)


def undo(changes: Iterable[Change]) -> None:
    """Put back what was there before.

    Args:
        changes: all of which are made.
    """
    for change in changes:
        _set(change, change.before)


def _entries(module: nn.Module) -> Iterator[tuple[dict[Any, Any], Collection[str]]]:
    """Yield what holds attributes, children, parameters, buffers and hooks of a module; and entries to leave aside."""
    yield vars(module), _OF_TORCH
    yield from ((value, ()) for name, value in vars(module).items() if name in _OF_TORCH and isinstance(value, dict))


def _set(change: Change, value: Any) -> None:
    if value is _ABSENT:
        del change.entries[change.name]
    else:
        change.entries[change.name] = value
