"""The Triton kernels: interpreted in a process of their own, compiled for seven architectures, and run on a GPU.

The interpreter's tests are in tests/kernels/interpreted; its bf16 is repaired there. How each kernel is launched,
and what its code promises, is said in benchmarks/ahead_of_time.py, which prints the same as a table.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from marks import slow

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TABLES = ("packed", "absmax", "nested_absmax", "nested_code", "offset")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
try:
    from benchmarks.ahead_of_time import SHARED_MEMORY, cases, compile_ahead

    # Of a kernel in another dtype or setting three architectures tell enough.
    COMPILED = [
        (name, architecture) if case.quick_on is None or architecture in case.quick_on else slow((name, architecture))
        for name, case in cases().items()
        for architecture in SHARED_MEMORY
        if architecture >= case.oldest and (not case.is_variant or architecture in (75, 86, 120))
    ]
except ImportError:  # Triton is there for Linux only
    COMPILED = []


@pytest.mark.slow
def test_every_kernel_holds_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "QLORA_KERNELS": "auto"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(Path(__file__).parent / "interpreted")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[100%]" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on: TRITON_INTERPRET=1")
@pytest.mark.parametrize(("kernel", "architecture"), COMPILED)
def test_kernel_compiles_as_it_promises(kernel: str, architecture: int) -> None:
    case = cases()[kernel]
    compiled = compile_ahead(case, architecture)
    assert (compiled.stack, compiled.spills) == (0, 0)
    assert compiled.registers < 255
    assert compiled.shared <= SHARED_MEMORY[architecture]
    assert not (case.rounds_each and compiled.fuses_rounding)
    assert not case.on_tensor_cores or compiled.uses_tensor_cores


# One element; odd counts; rows that begin inside a block or inside a byte; a layer of a 7B.
CASES = {
    "one element": ((1, 1), slice(None)),
    "short block": ((1, 63), slice(None)),
    "several programs": ((37, 129), slice(None)),
    "rows inside a block": ((50, 66), slice(17, 40)),
    "rows inside a byte": ((51, 65), slice(3, 46)),
    "no row": ((3, 64), slice(2, 2)),
    "a real layer": ((4096, 11008), slice(1, 4095)),
}


def weight_of(shape: tuple[int, int]) -> NF4Weight:
    return quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3e-5)  # fp16 subnormals too


def to_device(weight: NF4Weight, device: str) -> NF4Weight:
    return replace(weight, **{name: getattr(weight, name).to(device) for name in TABLES})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["reference", "fast"])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_cuda_gives_the_bits_of_the_cpu(
    case: str, dtype: torch.dtype, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", choice)
    shape, rows = CASES[case]
    weight = weight_of(shape)
    on_gpu = dequantize_nf4(to_device(weight, "cuda"), dtype, rows=rows)
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), dequantize_nf4(weight, dtype, rows=rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")
def test_cuda_reaches_above_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "fast")
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rows, small = (1 << 19) + 3, weight_of((3, 4096))
    packed = torch.zeros(rows * 2048, dtype=torch.uint8, device="cuda")
    absmax = torch.zeros(rows * 64, dtype=torch.uint8, device="cuda")
    nested_absmax = torch.zeros(-(rows * 64 // -256), device="cuda")
    packed[-3 * 2048 :], absmax[-3 * 64 :] = small.packed.cuda(), small.absmax.cuda()
    nested_absmax[-1:] = small.nested_absmax.cuda()
    tables = (packed, absmax, nested_absmax, small.nested_code.cuda(), small.offset.cuda())
    huge = NF4Weight(*tables, shape=(rows, 4096))
    wanted = dequantize_nf4(small, torch.bfloat16)
    last = slice(rows - 3, rows)
    assert torch.equal(dequantize_nf4(huge, torch.bfloat16, rows=last).cpu(), wanted)
    assert torch.equal(dequantize_nf4(huge, torch.bfloat16)[last].cpu(), wanted)
