"""What the tests of Triton kernels need on a machine without a GPU: a true interpreter, and compiling ahead of time.

The two cannot share a process: the interpreter is chosen by TRITON_INTERPRET=1 before triton is imported.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def round_bfloat16_in_the_interpreter() -> None:
    """Casts fp32 -> bf16 to nearest even, as a GPU does; Triton 3.9's interpreter cuts the low bits off."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.cast_impl

    def cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            bits = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return original(self, source, target)

    for name in ("cast_impl", "create_fp_trunc"):
        setattr(interpreter.InterpreterBuilder, name, cast)


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],  # argument -> "*fp32", "i64", ...
    constants: Mapping[str, int],
    architecture: int,
    multiples_of_16: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """The kernel as a launch on this architecture would compile it, pointers aligned. Has .asm["ptx"] and ["cubin"]."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in multiples_of_16
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def spilled_bytes(compiled: Any, architecture: int) -> int:
    """Bytes of stack, spill stores and spill loads, from ptxas' own report on the PTX."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    counts = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert counts is not None, report
    return sum(int(count) for count in counts.groups())
