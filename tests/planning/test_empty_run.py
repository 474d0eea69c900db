"""Promises of an empty run: packed as the real one, with rows and micro-batches as long as they can be."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import FalconConfig

from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.empty_run import keeps_apart, longest_pack, longest_row
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.training.state import with_micro_batch
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", True), ("qwen2", True), ("mistral", True), ("falcon", False)]
)
def test_whether_rows_can_be_packed_is_found_without_weights(
    tiny_models: Callable[[str], Path], tmp_path: Path, family: str, expected: bool
) -> None:
    """Falcon's layers do their own attention."""
    if family == "falcon":
        FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4).save_pretrained(
            tmp_path
        )
    assert keeps_apart(ModelDirectory.open(tmp_path if family == "falcon" else tiny_models(family))) is expected


def test_a_base_that_cannot_be_built_is_not_said_to_be_packed_or_padded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    assert keeps_apart(ModelDirectory.open(tmp_path)) is None


@pytest.mark.parametrize(("limit", "rows"), [("auto", [127, 1]), (300, [128, 128, 44]), (10_000, [128, 128, 128])])
def test_the_largest_micro_batch_fills_its_limit(
    tiny_config: Config, tiny_llama: Path, limit: int | str, rows: list[int]
) -> None:
    config = tiny_config(training={"micro_batch_tokens": limit, "global_batch_size": 3})
    pack = longest_pack(ModelDirectory.open(tiny_llama), config, packing=True)
    assert pack.cu_seqlens is not None
    assert pack.cu_seqlens.diff().tolist() == rows
    whole = max(sum(row for row in rows if row == 128), 128)
    assert longest_pack(ModelDirectory.open(tiny_llama), config, packing=False).tokens == whole


@pytest.mark.parametrize(("max_length", "lowered", "planned"), [(64, 48, 64), (64, 96, 96), (10**6, 1.5, 1.5)])
def test_a_limit_lowered_below_a_row_is_planned_as_that_row(
    tiny_config: Config, tiny_llama: Path, max_length: int, lowered: float, planned: float
) -> None:
    """Counted in the model's positions where data.max_length is beyond them; rows stay as long as they can be."""
    config = tiny_config(model={"device": "cpu"}, data={"max_length": max_length}, training={"global_batch_size": 4})
    directory = ModelDirectory.open(tiny_llama)
    longest = longest_row(directory, config)
    unit = longest if isinstance(lowered, float) else 1
    plan = plan_memory(directory, with_micro_batch(config, int(lowered * unit), longest))
    assert plan.max_length == longest
    assert plan.micro_batch_tokens == int(planned * unit)
