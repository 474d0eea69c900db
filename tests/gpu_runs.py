"""What tests of whole runs on a GPU share: a model and rows that fill it, its plan compared, and its run resumed."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model_directory
from tiny_runs import final_adapter, quiet

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.memory_plan import CUBLAS, plan_memory
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.state import with_micro_batch, with_policy
from qlora_trainer.weights.model_directory import ModelDirectory

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def wide_model(directory: Path) -> Path:
    """A model whose step is far larger than the allocator's segments: four layers of a quarter of an 8B's width."""
    shape: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    }
    return make_model_directory(directory, "llama", **shape)


def write_long_rows(path: Path) -> Path:
    """Rows that are all cut to the full length: a text would be divided into equal parts that are shorter."""
    answer = "the quick brown fox jumps over a lazy dog " * 500
    path.write_text("".join(json.dumps({"prompt": f"{index} ", "completion": answer}) + "\n" for index in range(12)))
    return path


def clear() -> None:
    """Let go of what tests before have left. cuBLAS' workspaces stay for good, so they are made first if need be."""
    gc.collect()
    small = torch.ones(64, 64, device="cuda", requires_grad=True)
    (small @ small).sum().backward()
    del small
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def assert_plan_is_what_torch_reserves(config: RunConfig, name: str) -> Run:
    """Train by micro-batches of 2,048 tokens: the plan is within a twentieth and two segments. Returns the run."""
    clear()
    before = torch.cuda.memory_reserved()
    run = start_run(config)
    run.train(quiet)
    measured = torch.cuda.max_memory_reserved() - before
    assert run.state.loader.micro_batch_tokens == 2048
    model = ModelDirectory.open(Path(config.model.name))
    plan = plan_memory(model, with_policy(with_micro_batch(config, 2048, 2048), run.state.policy))
    allowed = 0.05 * measured + 2 * 20 * 2**20
    planned = plan.reserved - plan.components[CUBLAS]
    print(f"{name}, without cuBLAS: planned {planned / 2**20:.0f} MiB, reserved {measured / 2**20:.0f} MiB")
    assert abs(planned - measured) <= allowed
    return run


def assert_resumed_is_uninterrupted(
    tiny_config: Callable[..., RunConfig], changes: dict[str, Any]
) -> tuple[Run, Run, Run]:
    """Train a deterministic run whole, and in two parts. Returns it and the parts, which have learned the same bits."""
    whole = start_run(tiny_config("whole", **changes))
    assert not any("not deterministic" in warning for warning in whole.warnings)
    whole.train(quiet)
    assert not torch.are_deterministic_algorithms_enabled()
    first = start_run(tiny_config("parts", **changes))
    first.train(quiet, stop_after=3)
    first.save()
    second = resume_run(first.directory)
    assert second.state.step == 3
    second.train(quiet)
    wanted, found = final_adapter(whole.directory), final_adapter(second.directory)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    losses = [[r["loss"] for r in read_metrics(run.directory / "metrics.jsonl")] for run in (whole, second)]
    assert losses[0] == losses[1]
    return whole, first, second
