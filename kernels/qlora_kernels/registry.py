"""Register operations: each is a torch op with a plain-torch reference and perhaps faster versions.

torch's dispatcher chooses by the device of the arguments, so callers hold no `if cuda`, and a fake implementation lets
a step be planned on tensors without memory. A faster version is made at its first use; where it cannot be (no Triton,
no compiler) the reference does the work, and `implementations` says why. The environment variable QLORA_KERNELS is read
here and nowhere else.
"""

import dataclasses
import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

NAMESPACE = "qlora_kernels"
_CHOICES = ("auto", "reference", "fast")
ONLY_VERSION = "reference: plain torch is the only version"
_DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # torch's dispatch keys


class UnavailableError(Exception):
    """Say why a faster version cannot be had here, and what would bring it."""


@dataclasses.dataclass(frozen=True)
class Op:
    """Hold an operation: what it computes, and what computes it faster on which device."""

    name: str
    reference: Callable[..., Any]
    fast: dict[str, Callable[[], Callable[..., Any]]]  # device type -> what makes the faster version, or raises
    made: dict[str, Callable[..., Any] | str] = dataclasses.field(default_factory=dict, init=False)  # or why not

    def fast_version(self, device_type: str) -> Callable[..., Any] | str:
        """Return the faster version for a device, made once, or why there is none.

        Args:
            device_type: such as "cuda".

        Returns:
            The function, or the reason as text.
        """
        if device_type not in self.made:
            try:
                self.made[device_type] = self.fast[device_type]()
            except UnavailableError as reason:
                self.made[device_type] = str(reason)
        return self.made[device_type]

    def run(self, device_type: str, *arguments: Any) -> Any:
        """Compute by the version that QLORA_KERNELS and the kind of device choose.

        Args:
            device_type: cpu or cuda.
            *arguments: of the operation.

        Returns:
            Its result.

        Raises:
            UnavailableError: QLORA_KERNELS is fast, and this device has no fast version.
        """
        choice = kernel_choice()
        if choice == "reference":
            return self.reference(*arguments)
        version = self.fast_version(device_type)
        if not isinstance(version, str):
            return version(*arguments)
        if choice == "fast":
            raise UnavailableError(f"QLORA_KERNELS=fast, but {self.name} has no fast version here: {version}")
        return self.reference(*arguments)


_OPS: dict[str, Op] = {}


def kernel_choice() -> str:
    """Read what the environment variable QLORA_KERNELS asks for.

    `auto` (default): the fast version where device and installation have one, else the reference. `reference`: plain
    torch everywhere. `fast`: as auto, but an operation whose fast version cannot be had here is an error.

    Returns:
        The word.

    Raises:
        ValueError: the variable holds another word.
    """
    choice = os.environ.get("QLORA_KERNELS", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"QLORA_KERNELS is {choice!r}; it can be {', '.join(_CHOICES)}. Set one of these or unset it.")
    return choice


def define(
    schema: str,  # such as "scale(Tensor x, float by) -> Tensor"
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    **fast: Callable[[], Callable[..., Any]],
) -> Op:
    """Make torch.ops.qlora_kernels.<name>.

    Args:
        schema: name, arguments and results, as torch.library takes them.
        reference: plain torch, for any device: the contract.
        fake: gives results of the right shape and dtype without reading values.
        **fast: by device type (cpu, cuda), a function that gives the faster version or raises UnavailableError. Called
            at the first use, once.

    Returns:
        The operation.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    op = _OPS[name] = Op(name, reference, fast)
    torch.library.define(qualified, schema.removeprefix(name))
    torch.library.impl(qualified, "CompositeExplicitAutograd", reference)
    for device_type in fast:
        torch.library.impl(qualified, _DEVICES[device_type], functools.partial(op.run, device_type))
    torch.library.register_fake(qualified, fake)
    return op


@contextmanager
def other_versions(device_type: str, versions: Mapping[str, Callable[..., Any] | None]) -> Iterator[None]:
    """Take other faster versions of some operations within the block, such as to compare one with the reference.

    Args:
        device_type: such as "cpu".
        versions: by operation the function to take; None to make the operation's own anew at its first use.
    """
    before = {name: _OPS[name].made.copy() for name in versions}
    for name, version in versions.items():
        _OPS[name].made.pop(device_type, None)
        if version is not None:
            _OPS[name].made[device_type] = version
    try:
        yield
    finally:
        for name, made in before.items():
            _OPS[name].made.clear()
            _OPS[name].made.update(made)


def from_triton(module: str, function: str) -> Callable[[], Callable[..., Any]]:
    """Return what `define` takes for cuda: it imports a module of this package that needs Triton at the first use.

    The version is unavailable where Triton cannot compile and launch, which is tried once a process.

    Args:
        module: name of the module.
        function: name of the faster version in it.

    Returns:
        A function that returns the faster version, or raises UnavailableError.
    """

    def load() -> Callable[..., Any]:
        try:
            version = getattr(importlib.import_module(f"{NAMESPACE}.{module}"), function)
            why = importlib.import_module(f"{NAMESPACE}.probe_triton").why_unavailable()
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
            reason = (
                "Triton is not installed: pip install triton" if missing else f"{module} cannot be imported: {error}"
            )
            raise UnavailableError(reason) from error
        if why:
            raise UnavailableError(why)
        return version

    return load


def implementations(device_type: str) -> dict[str, str]:
    """Say by operation of this package what a tensor on this kind of device takes.

    It makes the fast versions that are not made yet.

    Args:
        device_type: such as "cuda".

    Returns:
        By operation "fast", or "reference" and why.
    """
    package = importlib.import_module(NAMESPACE)
    for limit in pkgutil.iter_modules(package.__path__):
        if not limit.name.endswith("_triton"):  # those define no operation, and need Triton
            importlib.import_module(f"{NAMESPACE}.{limit.name}")
    found = {}
    for name, op in sorted(_OPS.items()):
        if kernel_choice() == "reference":
            found[name] = "reference: QLORA_KERNELS=reference"
        elif device_type not in op.fast:
            found[name] = ONLY_VERSION
        else:
            version = op.fast_version(device_type)
            found[name] = f"reference: {version}" if isinstance(version, str) else "fast"
    return found
