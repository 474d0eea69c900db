"""Promises of recovery where a real allocation fails: on a host whose address space is limited, and on a card."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import quiet

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.device import current_card
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.memory.activations import Policy

Config = Callable[..., RunConfig]


def long_rows(path: Path, count: int) -> Path:
    """Plain text, two rows of up to 256 tokens each line."""
    text = "the quick brown fox jumps over a lazy dog " * 60
    path.write_text("".join(json.dumps({"text": f"{index} {text}"}) + "\n" for index in range(count)))
    return path


LIMITED_RUN = """
import gc, resource, sys
from pathlib import Path
from qlora_trainer.runs.start import resume_run

run = resume_run(Path(sys.argv[1]))
gc.collect()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, resource.RLIM_INFINITY))
assert run.train(lambda record: None)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells and limits a process's address space")
def test_a_host_that_is_too_small_recovers(tiny_config: Config, tmp_path: Path) -> None:
    """A real allocation fails: the process may take 60 MiB more than it has before its step, which takes some 300."""
    config = {
        "data": {"train": str(long_rows(tmp_path / "long.jsonl", 32)), "eval": 0, "max_length": 256},
        "training": {
            "global_batch_size": 64,
            "micro_batch_tokens": 64 * 256,
            "max_steps": 1,
            "activation_checkpointing": "none",
        },
    }
    roomy, tight = start_run(tiny_config("roomy", **config)), start_run(tiny_config("tight", **config))
    roomy.train(quiet)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED_RUN, str(tight.directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (expected,), (found,) = (read_metrics(run.directory / "metrics.jsonl") for run in (roomy, tight))
    assert "recovered" not in expected
    assert "Memory ran out in step 1, on 64 rows" in found["recovered"]
    assert found["micro_batch_tokens"] < found["tokens"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_card_that_is_too_small_recovers(tiny_config: Config, tmp_path: Path) -> None:
    """A real allocation fails: torch may take no more than half of what the first step took besides the weights."""
    whole_step = 256 * 256
    config = {
        "data": {"train": str(long_rows(tmp_path / "long.jsonl", 300)), "eval": 0.1, "max_length": 256},
        "training": {
            "global_batch_size": 256,
            "micro_batch_tokens": whole_step,
            "max_steps": 2,
            "activation_checkpointing": "none",
        },
    }
    device = current_card()
    roomy = start_run(tiny_config("roomy", **config))
    gc.collect()
    torch.cuda.empty_cache()
    at_rest = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    roomy.train(quiet)
    assert roomy.state.loader.micro_batch_tokens == whole_step, "the whole step fits an unlimited card"
    needed = torch.cuda.max_memory_reserved(device) - at_rest
    assert needed > 100 * 2**20, "what a step takes must be out from the allocator's 20 MiB segments"
    expected = [record["loss"] for record in read_metrics(roomy.directory / "metrics.jsonl")]
    roomy.release()

    run = start_run(tiny_config("tight", **config))
    gc.collect()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(device) + needed // 2
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(device).total_memory, device)
    try:
        assert run.train(quiet)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    records = read_metrics(run.directory / "metrics.jsonl")
    assert "tried before the first step" in records[0]["recovered"]
    assert run.state.loader.micro_batch_tokens < whole_step
    assert run.state.policy == Policy("none"), "splitting was enough"
    assert max(record["peak_memory_bytes"] for record in records) <= allowed
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=2e-2)
