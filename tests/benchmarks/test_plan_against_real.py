"""What a step really allocates, as torch's profiler saw it, is what the plan said."""

from pathlib import Path

import pytest

from benchmarks.plan_against_real import LIMIT, Changes, compare, make_model

SETTINGS: list[tuple[str, Changes]] = [
    ("qwen2", {"training": {"activation_checkpointing": "tiled"}, "data": {"max_length": 256}}),
    ("llama", {"data": {"max_length": 64}, "adapter": {"rank": 64}}),  # fullest inside the optimizer's update
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), SETTINGS, ids=str)
def test_the_plan_agrees_with_the_allocators_events(tmp_path: Path, family: str, changes: Changes) -> None:
    found = compare(make_model(tmp_path / family, family), family, changes)
    assert found.planned == found.tracked
    assert abs(found.error) < LIMIT / 2
    assert found.holds
