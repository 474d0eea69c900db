"""Whether a base's attention keeps rows apart is tried once for each config."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.planning import empty_run
from qlora_trainer.planning.attention_trial import known_to_keep_apart
from qlora_trainer.weights.model_directory import ModelDirectory


@pytest.mark.parametrize("found", [True, False, None])
def test_a_config_is_tried_once_if_it_can_be_tried(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool | None
) -> None:
    tried: list[str] = []

    def trial(directory: ModelDirectory) -> bool | None:
        tried.append(directory.path.name)
        return found

    monkeypatch.setattr(empty_run, "keeps_apart", trial)
    for family in ("llama", "llama", "gpt2"):
        assert known_to_keep_apart(ModelDirectory.open(tiny_models(family)), tmp_path) is found
    assert tried == (["llama", "llama", "gpt2"] if found is None else ["llama", "gpt2"])
