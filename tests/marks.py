"""Choose which of a test's cases are quick, the others being run by `make test-all` alone; skip where a compiler is
missing; say when a process hangs."""

import shutil
from collections.abc import Iterable
from typing import Any

import pytest
from torch.utils import cpp_extension

from qlora_kernels.compiled import NO_COMPILER

PATIENCE = 600  # seconds, after which a process is taken to hang: a busy machine takes long over any


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Mark all of a test's cases slow but the quick ones; a tuple holds the values of several arguments."""
    chosen = [value for value in values if value in quick]
    assert len(chosen) == len(quick), f"of {quick} only {chosen} are cases of the test"
    return [value if value in quick else slow(value) for value in values]


def slow(value: Any) -> Any:
    """Mark one case of a test slow."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)


def needs_compiler(program: str = cpp_extension.get_cxx_compiler()) -> pytest.MarkDecorator:
    """Skip a test where this compiler is missing; g++ brings those of C, gcc and cc, with it."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=NO_COMPILER)
