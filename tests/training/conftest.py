"""A device that runs out of memory, and a run wide enough to be split."""

from collections.abc import Callable
from typing import Any

import pytest
from scarcity import Scarcity

from qlora_trainer.config.schema import RunConfig

Config = Callable[..., RunConfig]


@pytest.fixture
def scarcity(monkeypatch: pytest.MonkeyPatch) -> Scarcity:
    return Scarcity(monkeypatch)


@pytest.fixture
def wide_config(tiny_config: Config) -> Config:
    """Five steps of 8 rows, two an epoch, in one or a few micro-batches, with dropout."""

    def config(output: str = "run", **changes: dict[str, Any]) -> RunConfig:
        own = {"global_batch_size": 8, "micro_batch_tokens": 400, "max_steps": 5}
        training = {**own, **changes.pop("training", {})}
        return tiny_config(output, adapter={"rank": 4, "alpha": 8, "dropout": 0.2}, training=training, **changes)

    return config
