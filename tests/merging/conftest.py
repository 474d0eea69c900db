"""Runs to merge: one that is made once, and one of the test's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from merge_runs import LLAMA, Run, make_base, train
from tiny_runs import quiet
from transformers import LlamaConfig

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.start import start_run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run whose base is tied and sharded."""
    config = LlamaConfig(**LLAMA, tie_word_embeddings=True)
    return train(make_base(tmp_path_factory.mktemp("llama"), config, shard="200KB"))


@pytest.fixture
def run_dir(tiny_config: Callable[..., RunConfig]) -> Path:
    """A run trained hard enough that its adapter matters."""
    run = start_run(tiny_config(optimizer={"learning_rate": 2e-2}))
    assert run.train(quiet)
    return run.directory
