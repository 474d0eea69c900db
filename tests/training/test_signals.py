"""A real process that is asked to stop: it saves at the next step boundary, says how to go on, and nothing is
lost."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from marks import PATIENCE

from qlora_trainer.config.load import save_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.checkpoint import newest_checkpoint
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.start import resume_run

STEPS = 100_000  # more than any test waits for


def wait_for_first_step(process: "subprocess.Popen[str]", metrics: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < deadline, "no step was taken"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_process_asked_to_stop_saves_and_says_how_to_go_on(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, signum: signal.Signals
) -> None:
    training = {"max_steps": STEPS, "global_batch_size": 2, "evaluate_every": STEPS, "save_every": STEPS}
    run = tmp_path / "run"
    save_config(tiny_config(training=training, evaluation={"samples": 0}), tmp_path / "config.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_trainer", "train", str(tmp_path / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "500"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_first_step(process, run / "metrics.jsonl")
        process.send_signal(signum)
        out, output = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, output
    assert f"-m qlora_trainer resume {run}" in out
    assert re.search(r"Stopping when (step|the checkpoint of step) \d+", output), output  # by where the signal found it
    assert "Traceback" not in output

    stopped_at = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert 1 <= stopped_at < STEPS
    found = newest_checkpoint(run)
    assert found.path.name == f"step-{stopped_at:06}"
    assert found.passed_over == []
    assert not (run / "adapter").exists()

    resumed = resume_run(run)
    assert resumed.state.step == stopped_at
    assert not resumed.train(lambda record: None, stop_after=stopped_at + 2)
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, stopped_at + 3))
