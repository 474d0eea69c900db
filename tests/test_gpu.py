"""What only a GPU can show of a whole run: its plan, its paging, its resuming, its numbers. `make test-gpu` runs all.

Operations and kernels are compared with their references in test_operations.py and test_triton_kernels.py, memory that
runs out is provoked in test_recovery_from_real_failures.py, and copies to host memory in test_activations.py. Each kind
of adapter is tried in test_gpu_kinds.py.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gpu_runs import (
    assert_plan_is_what_torch_reserves,
    assert_resumed_is_uninterrupted,
    needs_cuda,
    wide_model,
    write_long_rows,
)
from tiny_runs import quiet

from qlora_kernels.card import Card
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.planning.step_memory import PAGED
from qlora_trainer.planning.workspaces import cublas_bytes
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.training.recovery import take_step
from qlora_trainer.training.step import accumulate_gradients
from qlora_trainer.weights.model_directory import ModelDirectory

pytestmark = needs_cuda

Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model(tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_rows(tmp_path_factory.mktemp("rows") / "long.jsonl")


@pytest.mark.parametrize("level", ["none", "full", "offload", "tiled"])
def test_a_plan_is_what_torch_reserves(tiny_config: Config, wide: Path, long_rows: Path, level: str) -> None:
    """Two steps of two rows of 2,048 tokens, each a micro-batch: within a twentieth and two segments."""
    config = tiny_config(
        model={"name": str(wide), "device": "cuda"},
        adapter={"rank": 16},
        data={"train": str(long_rows), "eval": 0.0, "max_length": 2048},
        training={
            "global_batch_size": 2,
            "max_steps": 2,
            "activation_checkpointing": level,
            "micro_batch_tokens": 2048,
        },
    )
    run = assert_plan_is_what_torch_reserves(config, level)
    assert run.state.policy.level == level
    run.release()


@pytest.mark.parametrize("setting", [None, ":4096:8"])
def test_cublas_takes_what_a_plan_allows_it(setting: str | None) -> None:
    """In a process that has not multiplied before; forward and backward are two threads."""
    program = """if True:
        import torch
        one = torch.ones(64, 64, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        torch.autograd.backward((one @ one).sum(), inputs=[one])
        one.grad = None
        print(torch.cuda.memory_allocated() - before)
    """
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    environment |= {"CUBLAS_WORKSPACE_CONFIG": setting} if setting else {}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert abs(int(done.stdout) - cublas_bytes(Card.of(torch.device("cuda")), setting)) <= 2**20


@pytest.mark.parametrize("policy", [Policy("none"), Policy("full"), Policy("offload"), Policy("tiled")], ids=str)
@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw"])
def test_a_deterministic_run_resumed_on_cuda_is_the_uninterrupted_one(
    tiny_config: Config, wide: Path, long_rows: Path, policy: Policy, optimizer: str
) -> None:
    """By rows of 2,048 tokens: flash attention adds the gradients of so many blocks of keys in any order otherwise."""
    changes = {
        "model": {"name": str(wide), "device": "cuda"},
        "data": {"train": str(long_rows), "eval": 0.0, "max_length": 2048},
        "adapter": {"rank": 128, "dropout": 0.1},
        "optimizer": {"name": optimizer},
        "training": {**policy.as_settings(), "global_batch_size": 2, "max_steps": 5, "deterministic": True},
    }
    whole, first, second = assert_resumed_is_uninterrupted(tiny_config, changes)
    assert max(whole.prepared.train.lengths) == 2048
    paged = first.state.optimizer.paged_bytes
    assert second.state.optimizer.paged_bytes == paged == whole.state.optimizer.paged_bytes
    assert (paged > 0) == optimizer.startswith("paged")


@contextmanager
def waits(mode: str) -> Iterator[list[str]]:
    """List what the host waits for in the block: "error": it must not; "warn": it may."""
    synchronize, seen = torch.cuda.synchronize, []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize = lambda *_: seen.append("synchronize")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield seen
        seen += [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    finally:
        torch.cuda.synchronize = synchronize
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("level", ["none", "full", "offload", "tiled"])
@pytest.mark.parametrize("model", [{}, {"embeddings": "cpu", "lm_head": "4bit"}], ids=["on the card", "on the CPU"])
@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "adamw"])
def test_a_dense_step_of_packed_rows_waits_for_the_device_once(
    tiny_config: Config, model: dict[str, str], level: str, optimizer: str
) -> None:
    """For loss and norm together. Copies go through pinned memory: embeddings on the CPU, and offloaded inputs too."""
    training = {"global_batch_size": 8, "micro_batch_tokens": 200, "activation_checkpointing": level}
    config = tiny_config(
        model={"device": "cuda", **model},
        adapter={"rank": 128, "dropout": 0.1},
        optimizer={"name": optimizer},
        training={**training, "max_steps": 4},
    )
    run = start_run(config)
    assert run.state.loader.packing
    run.state.model.train()
    for _ in range(2):  # kernels are compiled, casts and workspaces made
        take_step(run.state)
    packs = run.state.loader.peek()
    assert len(packs) > 1
    with waits("error") as seen:
        accumulate_gradients(run.state, packs)
    assert seen == []
    with waits("warn") as seen:
        take_step(run.state)
    assert len(seen) == 1, seen
    run.release()


def test_a_plan_says_what_pages(tiny_config: Config, tiny_llama: Path) -> None:
    config = tiny_config(model={"device": "cuda"}, adapter={"rank": 128})
    run = start_run(config)
    assert plan_memory(ModelDirectory.open(tiny_llama), config).components[PAGED] == run.state.optimizer.paged_bytes > 0


@pytest.mark.parametrize("choice", ["reference", "fast"])
def test_a_step_on_cuda_learns_what_a_cpu_learns(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    """In fp32, with every kernel or none."""
    losses = []
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("QLORA_KERNELS", "auto")
        run = start_run(tiny_config(f"{device}-{choice}", model={"device": device, "compute_dtype": "float32"}))
        # `fast` would refuse operations that have no fast version only where theirs cannot be had: none, on a GPU.
        monkeypatch.setenv("QLORA_KERNELS", choice if device == "cuda" else "auto")
        run.train(quiet)
        losses.append([record["loss"] for record in read_metrics(run.directory / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)


def test_kernels_change_bf16_losses_by_no_more_than_rounding(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for choice in ("reference", "auto"):
        monkeypatch.setenv("QLORA_KERNELS", choice)
        run = start_run(tiny_config(choice, model={"device": "cuda", "compute_dtype": "bfloat16"}))
        run.train(quiet)
        losses.append([record["loss"] for record in read_metrics(run.directory / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
