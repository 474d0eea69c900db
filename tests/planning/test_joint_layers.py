"""Layers over one input as one function take no more memory in a step than one after another."""

from collections.abc import Callable
from pathlib import Path

import pytest
from marks import slow_but

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.training import patches
from qlora_trainer.weights.model_directory import ModelDirectory

POLICIES = [(level, dropout) for level in ("none", "full", "offload", "tiled") for dropout in (0.0, 0.1)]


@pytest.mark.parametrize(("level", "dropout"), slow_but(POLICIES, ("full", 0.0)))
def test_a_step_with_joint_layers_takes_no_more_than_with_each_alone(
    level: str,
    dropout: float,
    llama_8b: Path,
    tiny_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lives at the fullest moment, to a rank-sized matrix; of one layer of an 8B, planned for a card."""
    tokens, rank = 2048, 16
    config = tiny_config(
        model={"name": str(llama_8b), "device": "cuda"},
        data={"max_length": tokens},
        adapter={"rank": rank, "dropout": dropout},
        training={"activation_checkpointing": level, "micro_batch_tokens": tokens},
    )

    def live() -> int:
        plan = plan_memory(ModelDirectory.open(llama_8b), config, 1)
        return plan.total - plan.components["allocator slack"]

    together = live()
    with monkeypatch.context() as context:
        context.setattr(patches, "join_layers", lambda modules: 0)
        context.setattr(patches, "may_join", lambda layer: False)
        alone = live()
    assert together <= alone + tokens * rank * 2
