"""Compile the Triton kernels for cards that are not here: registers, stack, spills, shared memory, instructions.

Each case is a kernel as a launch would compile it: the dtypes of its pointers, integers that are multiples of 16 said
to be so (else a compile shows spills that a launch would not have), the options of the launch. With each case is
reported what the code promises besides results: two roundings where bits are compared, tensor cores where there is a
product.

Needs triton, which brings NVIDIA's assembler, and no GPU. Must not share a process with Triton's interpreter.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_kernels import (
    gated_triton,
    lora_rows_triton,
    nf4_matmul_triton,
    nf4_triton,
    rms_norm_triton,
    rotary_triton,
    softmax_loss_triton,
)

# Shared memory that one block may ask for, in bytes (CUDA C++ Programming Guide, technical specifications by compute
# capability): 64, 163, 99, 99, 227, 227 and 99 KiB.
SHARED_MEMORY = {75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_CORE = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


@dataclass(frozen=True)
class Case:
    """Hold a kernel as one launch compiles it."""

    kernel: Any
    signature: Mapping[str, str]  # argument -> "*fp32", "i64", ...
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    multiples_of_16: tuple[str, ...] = ()
    rounds_each: bool = False  # no product is fused into a sum
    on_tensor_cores: bool = False
    oldest: int = 75  # architecture that launches it
    is_variant: bool = False  # of a case that is here in another dtype or setting
    quick_on: tuple[int, ...] | None = None  # architectures that the quick tests compile it for; None: all


@dataclass(frozen=True)
class Compiled:
    """Hold what the compiler made of it."""

    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # bytes stored and loaded
    shared: int  # bytes a block
    ptx: str = field(repr=False)

    @property
    def uses_tensor_cores(self) -> bool:
        return any(name in self.ptx for name in TENSOR_CORE)

    @property
    def fuses_rounding(self) -> bool:
        """Find a multiplication fused into an addition outside tensor cores, or small numbers flushed to zero."""
        return "fma" in self.ptx or ".ftz" in self.ptx


def compile_ahead(case: Case, architecture: int) -> Compiled:
    """Compile for a compute capability: 75, 80, 86, 89, 90, 100 or 120."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    types = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if types[name].startswith("*") or name in case.multiples_of_16
    }
    source = ASTSource(fn=case.kernel, signature=types, constexprs=dict(case.constants), attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options))
    assert made.asm["cubin"][:4] == b"\x7fELF"
    target = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.ptx"
        path.write_text(made.asm["ptx"])
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target}", str(path), "-o", os.devnull]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack, stores, loads = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output
    )
    (registers,) = _numbers(r"Used (\d+) registers", output)
    return Compiled(registers, stack, stores + loads, made.metadata.shared, made.asm["ptx"])


def _numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    assert found is not None, f"the assembler said otherwise than expected: {text}"
    return [int(number) for number in found.groups()]


def cases() -> dict[str, Case]:
    """List every kernel, as the largest layers of a 7B launch it, by name."""
    own = {**_dequantize(), **_multiply_few(), **_lora_rows()}
    return {**own, **_norm(), **_gated(), **_rotate(), **_softmax_loss()}


_TABLES = {
    "packed_ptr": "*u8",
    "absmax_ptr": "*u8",
    **dict.fromkeys(("nested_absmax_ptr", "nested_code_ptr", "offset_ptr", "nf4_code_ptr"), "*fp32"),
}
_BLOCKS = {"BLOCK_SIZE": 64, "NESTED_BLOCK_SIZE": 256}


def _dequantize() -> dict[str, Case]:
    def case(dtype: str, integer: str = "i32", odd: int = 0) -> Case:
        return Case(
            kernel=nf4_triton.dequantize_kernel,
            signature=_TABLES | {"out_ptr": f"*{dtype}", "first_byte": integer, "odd": "i32", "count": integer},
            # a launch turns the argument 1 into a constant
            constants=_BLOCKS | {"BYTES": nf4_triton.BYTES_PER_PROGRAM} | ({"odd": 1} if odd else {}),
            options=nf4_triton.NF4_OPTIONS,
            multiples_of_16=() if odd else ("first_byte", "odd", "count"),
            rounds_each=True,
            is_variant=dtype != "bf16",
        )

    return {
        "dequantize_nf4 bf16": case("bf16"),
        "dequantize_nf4 fp16, above 2^31 elements": case("fp16", "i64"),
        "dequantize_nf4 fp32, from inside a byte": case("fp32", odd=1),
    }


def _multiply_few() -> dict[str, Case]:
    def case(dtype: str, has_bias: bool) -> Case:
        module = nf4_matmul_triton
        return Case(
            kernel=module.multiply_few_kernel,
            signature=_TABLES
            | dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{dtype}")
            | dict.fromkeys(("tokens", "out_features", "in_features"), "i32"),
            constants=_BLOCKS
            | {
                "HAS_BIAS": has_bias,
                "TOKENS": module.MOST_FEW,
                "ROWS": module.ROWS_PER_PROGRAM,
                "BLOCKS": module.BLOCKS_PER_TURN[4 if dtype == "fp32" else 2],
            },
            options=module.NF4_MATMUL_OPTIONS,
            multiples_of_16=("out_features", "in_features"),
            rounds_each=dtype != "fp32",  # whose products are sums of fused multiplications, as everywhere
            on_tensor_cores=dtype != "fp32",
            oldest=75 if dtype == "fp32" else 80,
            is_variant=has_bias,
        )

    return {
        "nf4_matmul_few bf16": case("bf16", False),
        "nf4_matmul_few fp16, with bias": case("fp16", True),
        "nf4_matmul_few fp32": case("fp32", False),
    }


def _lora_rows() -> dict[str, Case]:
    module = lora_rows_triton

    def case(kernel: Any, dtype: str, multiples: tuple[str, ...], **constants: int) -> Case:
        return Case(
            kernel=kernel,
            signature=dict.fromkeys(("x_ptr", "A_ptr", "B_ptr", "output_ptr"), f"*{dtype}")
            | dict.fromkeys(("parts_ptr", "scalings_ptr"), "*fp32")
            | {"tiles_ptr": "*i32"}
            | dict.fromkeys(("tokens", "in_features", "out_features", "width", "parts"), "i32"),
            constants={"TOKENS": module.TOKENS_PER_TILE, "RANKS": module.RANKS_PER_TURN, **constants},
            options=module.LORA_ROWS_OPTIONS,
            multiples_of_16=("in_features", "out_features", *multiples),
            on_tensor_cores=dtype != "fp32",
            oldest=75 if dtype == "fp32" else 80,
            is_variant=dtype != "bf16" or not multiples,
            quick_on=(86,) if dtype == "bf16" else (),
        )

    def shrink(dtype: str, *multiples: str) -> Case:
        columns = module.IN_FEATURES_PER_TURN[4 if dtype == "fp32" else 2]
        kernel, part = module.shrink_rows_kernel, module.IN_FEATURES_PER_PART
        return case(kernel, dtype, multiples, COLUMNS=columns, PART=part)

    def expand(dtype: str, *multiples: str) -> Case:
        columns = module.OUT_FEATURES_PER_PROGRAM[4 if dtype == "fp32" else 2]
        return case(module.expand_rows_kernel, dtype, multiples, COLUMNS=columns)

    return {
        "add_lora_rows bf16, A": shrink("bf16", "tokens", "width"),
        "add_lora_rows bf16, B": expand("bf16", "tokens", "width"),
        "add_lora_rows fp16, A of rank 8, any tokens": shrink("fp16"),
        "add_lora_rows fp16, B of rank 8, any tokens": expand("fp16"),
        "add_lora_rows fp32, A": shrink("fp32", "width"),
        "add_lora_rows fp32, B": expand("fp32", "width"),
    }


def _norm() -> dict[str, Case]:
    def case(backward: bool, features: int, dtype: str = "bf16") -> Case:
        tile = rms_norm_triton.tile(features)
        pointers = ("grad_ptr", "x_ptr", "weight_ptr", "out_ptr")
        return Case(
            kernel=rms_norm_triton.backward_kernel if backward else rms_norm_triton.normalize_kernel,
            signature=dict.fromkeys(pointers, f"*{dtype}")
            | {"inverse_ptr": "*fp32", "eps": "fp32"}
            | dict.fromkeys(("rows", "features", "stride", "grad_stride"), "i32"),
            constants={"CAST_FIRST": True, "SHIFT": 0.0, "ROWS": tile["ROWS"], "FEATURES": tile["FEATURES"]},
            options=rms_norm_triton.RMS_NORM_OPTIONS | {"num_warps": tile["num_warps"]},
            multiples_of_16=("features", "stride", "grad_stride"),
            is_variant=features != 4096,
        )

    return {
        "rms_norm bf16, 4096 features": case(False, 4096),
        "rms_norm bf16, a head's 128": case(False, 128),
        "rms_norm_backward bf16, 4096 features": case(True, 4096),
        "rms_norm_backward fp32, 16384 features": case(True, 16384, "fp32"),
    }


def _gated() -> dict[str, Case]:
    def case(kernel: Any, activation: int) -> Case:
        return Case(
            kernel=kernel,
            signature=dict.fromkeys(("grad_ptr", "gate_ptr", "up_ptr", "grad_up_ptr", "out_ptr"), "*bf16")
            | dict.fromkeys(("width", "gate_stride", "up_stride"), "i32"),
            constants={"ACTIVATION": activation, "BLOCK": gated_triton.BLOCK},
            options=gated_triton.GATED_OPTIONS,
            multiples_of_16=("width", "gate_stride", "up_stride"),
            is_variant=activation != 0,
        )

    return {
        "gated_product bf16, silu": case(gated_triton.product_kernel, 0),
        "gated_gradients bf16, silu": case(gated_triton.gradients_kernel, 0),
        "gated_gradients bf16, gelu": case(gated_triton.gradients_kernel, 1),
        "gated_gradients bf16, gelu by tanh": case(gated_triton.gradients_kernel, 2),
    }


def _rotate() -> dict[str, Case]:
    strides = [f"{name}_{of}" for name in ("x", "out") for of in ("row", "head", "token")]
    integers = ("heads", "tokens", "half", "table_row", "table_token", *strides)
    case = Case(
        kernel=rotary_triton.rotate_kernel,
        signature=dict.fromkeys(("x_ptr", "cos_ptr", "sin_ptr", "out_ptr"), "*bf16") | dict.fromkeys(integers, "i32"),
        constants={"TRANSPOSED": False, "PLACES": rotary_triton.ELEMENTS_PER_PROGRAM // 64, "HALF": 64},
        options=rotary_triton.ROTARY_OPTIONS,
        multiples_of_16=("heads", "half", "table_row", "table_token", *strides),
    )
    return {"rotate bf16, heads of 128": case}


def _softmax_loss() -> dict[str, Case]:
    def case(dtype: str, has_bias: bool = False, has_cap: bool = False, with_gradient: bool = True) -> Case:
        module = softmax_loss_triton
        return Case(
            kernel=module.softmax_loss_kernel,
            signature=dict.fromkeys(("logits_ptr", "bias_ptr"), f"*{dtype}")
            | {"targets_ptr": "*i64", "losses_ptr": "*fp32"}
            | {"columns": "i32", "stride": "i32", "softcap": "fp32", "logit_scale": "fp32"},
            constants={
                "HAS_BIAS": has_bias,
                "HAS_CAP": has_cap,
                "WITH_GRADIENT": with_gradient,
                "BLOCK": module.LOGITS_PER_TURN,
            },
            options=module.SOFTMAX_LOSS_OPTIONS,
            multiples_of_16=("columns", "stride"),
            is_variant=dtype != "bf16" or has_cap or not with_gradient,
        )

    return {
        "softmax_loss bf16": case("bf16"),
        "softmax_loss bf16, without gradient": case("bf16", with_gradient=False),
        "softmax_loss fp16, with bias and soft cap": case("fp16", has_bias=True, has_cap=True),
        "softmax_loss fp32": case("fp32"),
    }
