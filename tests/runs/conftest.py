"""A finished run, which a test may change."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import quiet

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.start import start_run


@pytest.fixture
def finished(tiny_config: Callable[..., RunConfig]) -> Path:
    run = start_run(tiny_config("finished", training={"max_steps": 2}))
    assert run.train(quiet)
    return run.directory
