"""An 8B model's config, and plans that are remembered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from large_models import LLAMA_8B

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.loader import micro_batch_tokens
from qlora_trainer.planning import estimate as estimating
from qlora_trainer.planning import fit as fitting
from qlora_trainer.planning.memory_plan import MemoryPlan, plan_memory
from qlora_trainer.planning.speed import ways
from qlora_trainer.training.memory.activations import Level
from qlora_trainer.weights.model_directory import ModelDirectory


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    """A directory that holds nothing but the config.json of an 8B model."""
    directory = tmp_path / "llama-8b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    return directory


@pytest.fixture
def fitting_in(tiny_config: Callable[..., RunConfig], tiny_llama: Path) -> list[tuple[int, Level]]:
    """The bytes that a run on a CPU takes, and the level of checkpointing that fits into so many."""
    found: list[tuple[int, Level]] = []
    for level in get_args(Level)[:2]:
        config = tiny_config(
            model={"device": "cpu"}, data={"max_length": 512}, training={"activation_checkpointing": level}
        )
        found.append((plan_memory(ModelDirectory.open(tiny_llama), config).total, level))
    return found


@pytest.fixture
def plans_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test has planned once is not planned again."""
    known: dict[tuple[Path, str, int | None], MemoryPlan] = {}

    def remembered(directory: ModelDirectory, config: RunConfig, layers: int | None = None) -> MemoryPlan:
        same = config.replace({"training.micro_batch_tokens": micro_batch_tokens(config)})
        whole = layers in (None, len(directory.facts.layer_kinds))
        left_out = {"training": {"output_dir"}}
        key = directory.path, same.model_dump_json(exclude=left_out), None if whole else layers
        if key not in known:
            known[key] = plan_memory(directory, config, layers)
        return known[key]

    for module in (fitting, estimating, ways):
        monkeypatch.setattr(module, "plan_memory", remembered)
