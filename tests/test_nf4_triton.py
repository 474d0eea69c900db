"""The Triton kernel gives the bits of plain torch: interpreted here, compiled for six architectures, run on a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4, dequantize_torch, quantize_nf4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TABLES = ("packed", "absmax", "nested_absmax", "nested_code", "offset")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# One element; odd counts; rows that begin inside a block or inside a byte; more than one program; a last one not full.
CASES = {
    "one element": ((1, 1), slice(None)),
    "short block": ((1, 63), slice(None)),
    "whole blocks": ((5, 128), slice(None)),
    "several programs": ((37, 129), slice(None)),
    "rows at a block": ((9, 64), slice(3, 8)),
    "rows inside a block": ((50, 66), slice(17, 40)),
    "rows inside a byte": ((51, 65), slice(3, 46)),
    "last row": ((51, 65), slice(-1, None)),
    "nested blocks": ((3, 64 * 257), slice(1, 2)),
    "one column": ((2049, 1), slice(1, None)),  # half a byte more than one program's
    "no row": ((3, 64), slice(2, 2)),
}


def weight_of(shape: tuple[int, int]) -> NF4Weight:
    return quantize_nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3e-5)  # fp16 subnormals too


def start_and_count(shape: tuple[int, int], rows: slice) -> tuple[int, int]:
    start, stop, _ = rows.indices(shape[0])
    return start * shape[1], (stop - start) * shape[1]


def between_guards(tensor: Tensor) -> Tensor:
    """The same values inside a larger buffer of absurd ones, which a read out of bounds would bring in."""
    guard = 200 if tensor.dtype == torch.uint8 else 1e30
    buffer = torch.full((tensor.numel() + 128,), guard, dtype=tensor.dtype)
    inner = buffer[64 : 64 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def interpret() -> Iterator[str]:
    """Runs every case in the interpreter, and yields the names of those that hold. (A process of its own runs this.)"""
    import triton_support

    from qlora_kernels import nf4_triton

    triton_support.round_bfloat16_in_the_interpreter()
    for case, (shape, rows) in CASES.items():
        weight = weight_of(shape)
        tables = [between_guards(getattr(weight, name)) for name in TABLES]
        start, count = start_and_count(shape, rows)
        for name, dtype in DTYPES.items():
            buffer = torch.full((count + 128,), -7.0, dtype=dtype)
            nf4_triton.dequantize(*tables, start, 64, 256, buffer[64 : 64 + count])
            wanted = buffer.new_full(buffer.shape, -7.0)
            dequantize_torch(*tables, start, 64, 256, wanted[64 : 64 + count])
            if torch.equal(buffer, wanted):
                yield f"{case}, {name}"

    # Above 2**31 elements: only the last bytes are written or read, and what nobody touches takes no memory.
    elements = (1 << 31) + 640
    huge = NF4Weight(
        packed=torch.empty(elements // 2, dtype=torch.uint8),
        absmax=torch.empty(elements // 64, dtype=torch.uint8),
        nested_absmax=torch.ones(-(elements // -(64 * 256))),
        nested_code=weight.nested_code,
        offset=torch.tensor(1.5),
        shape=(elements // 64, 64),
    )
    huge.packed[-320:] = torch.arange(320).to(torch.uint8)
    huge.absmax[-10:] = torch.arange(10, dtype=torch.uint8) * 20
    tables = [getattr(huge, name) for name in TABLES]
    found, wanted = torch.empty(500), torch.empty(500)
    nf4_triton.dequantize(*tables, elements - 500, 64, 256, found)
    dequantize_torch(*tables, elements - 500, 64, 256, wanted)
    if torch.equal(found, wanted):
        yield "above 2**31 elements"


@pytest.fixture(scope="module")
def holding() -> set[str]:
    """The names of the cases that hold under the interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return set(json.loads(process.stdout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_gives_the_bits_of_plain_torch(case: str, dtype: str, holding: set[str]) -> None:
    assert f"{case}, {dtype}" in holding


def test_interpreted_kernel_reaches_above_2_to_the_31_elements(holding: set[str]) -> None:
    assert "above 2**31 elements" in holding


COMPILED = [(architecture, "bf16", "aligned") for architecture in (80, 86, 89, 90, 100, 120)]
COMPILED += [(86, "fp16", "aligned"), (86, "fp32", "aligned"), (80, "bf16", "odd"), (120, "fp16", "huge")]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on: TRITON_INTERPRET=1")
@pytest.mark.parametrize(("architecture", "dtype", "launch"), COMPILED)
def test_kernel_compiles_without_spills_fused_rounding_or_flushing(architecture: int, dtype: str, launch: str) -> None:
    pytest.importorskip("triton")
    from triton_support import compile_ahead, spilled_bytes

    from qlora_kernels.nf4_triton import BYTES_PER_PROGRAM, dequantize_kernel

    integer = "i64" if launch == "huge" else "i32"
    signature = dict.fromkeys(("nested_absmax_ptr", "nested_code_ptr", "offset_ptr", "nf4_code_ptr"), "*fp32")
    signature |= {"packed_ptr": "*u8", "absmax_ptr": "*u8", "out_ptr": f"*{dtype}"}
    signature |= {"first_byte": integer, "count": integer, "odd": "i32"}
    constants = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256, "BYTES": BYTES_PER_PROGRAM}
    if launch == "odd":  # a launch turns the argument 1 into a constant
        constants["odd"] = 1
    multiples_of_16 = () if launch == "odd" else ("first_byte", "odd", "count")
    options = {"num_warps": 4, "enable_fp_fusion": False}
    compiled = compile_ahead(dequantize_kernel, signature, constants, architecture, multiples_of_16, **options)
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    assert "mul.f32" in compiled.asm["ptx"] or "mul.rn.f32" in compiled.asm["ptx"]
    assert "fma" not in compiled.asm["ptx"]
    assert ".ftz" not in compiled.asm["ptx"]
    assert spilled_bytes(compiled, architecture) == 0


def to_device(weight: NF4Weight, device: str) -> NF4Weight:
    return replace(weight, **{name: getattr(weight, name).to(device) for name in TABLES})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["reference", "fast"])
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64])
@pytest.mark.parametrize("case", [*CASES, "a real layer"])
def test_cuda_gives_the_bits_of_the_cpu(
    case: str, dtype: torch.dtype, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", choice)
    shape, rows = CASES.get(case, ((4096, 11008), slice(1, 4095)))
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


if __name__ == "__main__":
    print(json.dumps(list(interpret())))
