"""The whole training step walks its CUDA branches on a machine without a GPU: on fake tensors of device cuda."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from marks import needs_compiler
from torch.utils import cpp_extension

HERE = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, needs_compiler()]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> dict[str, dict[str, list[str]]]:
    """By setting, the operations of two steps and one of generation on cuda, and those of the steps that waited."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has a CUDA of its own")
    library = tmp_path_factory.mktemp("fake_cuda") / "fake_cuda.so"
    headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    options = ["-O0", "-std=c++20", "-fPIC", "-shared", *headers]
    command = [cpp_extension.get_cxx_compiler(), *options, str(HERE / "fake_cuda.cpp"), "-o"]
    made = subprocess.run([*command, str(library)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    program = [sys.executable, str(HERE / "fake_cuda_steps.py"), str(library), str(tiny_llama)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels")])}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def operations(found: dict[str, dict[str, list[str]]]) -> dict[str, set[str]]:
    return {name: set(seen["on cuda"]) for name, seen in found.items()}


def test_a_step_waits_for_the_device_once(found: dict[str, dict[str, list[str]]]) -> None:
    """Two steps of two micro-batches each: loss and norm are read together, and nothing else is.

    Counted are reads, copies from memory that is not pinned, and calls that wait until the device is idle.
    """
    once = ["read by aten::_to_copy"]
    assert {name: seen["waits"] for name, seen in found.items()} == dict.fromkeys(found, once * 2)


def test_every_setting_takes_its_steps_and_generates(operations: dict[str, set[str]]) -> None:
    for name, seen in operations.items():
        both_ways = ("rms_norm", "rms_norm_backward", "gated_product", "gated_gradients", "rotate", "dequantize_nf4")
        dropped = () if "prefix" in name else ("keep_mask",)  # its dropout is of other adapters
        for operation in (*both_ways, *dropped, "nf4_matmul_few", "softmax_loss", "add_lora_rows"):
            assert f"qlora_kernels::{operation}" in seen, f"{name}: {operation}"


def test_packed_documents_take_flash_attention_in_16_bits_only(operations: dict[str, set[str]]) -> None:
    for name, seen in operations.items():
        flash = {"aten::_flash_attention_forward", "aten::_flash_attention_backward"}
        efficient = "aten::_scaled_dot_product_efficient_attention_backward"
        assert flash <= seen if "bf16" in name else flash.isdisjoint(seen) and efficient in seen


def test_no_operation_of_a_step_is_without_a_deterministic_version(operations: dict[str, set[str]]) -> None:
    """Of those on CUDA for which torch says so; cumsum is here one of integers, which has one."""
    without = {"put_", "histc", "nll_loss2d_forward", "kthvalue", "median.dim", "_ctc_loss", "grid_sampler_2d_backward"}
    assert not any(seen & {f"aten::{name}" for name in without} for seen in operations.values())


def test_only_what_offloads_copies_to_the_host(operations: dict[str, set[str]]) -> None:
    copying = {name for name, seen in operations.items() if "qlora_kernels::copy_to_host" in seen}
    assert copying == {"bf16, tiled"}, "which offloads too"


def test_an_optimizer_that_cannot_page_has_its_state_on_the_card(operations: dict[str, set[str]]) -> None:
    """bitsandbytes' and torch's own; the process has the kernel of WSL, where nothing pages."""
    assert "bitsandbytes::optimizer_update_32bit" in operations["bf16, full"]
    assert "bitsandbytes::optimizer_update_8bit_blockwise" in operations["bf16, tiled"]
    assert "aten::_fused_adamw_" in operations["fp32, full"]
