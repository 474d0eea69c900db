"""Promises of reading adapter_config.json by its keys."""

from qlora_trainer.adapters.file_config import value_in_brief
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig


def test_keys_are_kept_ignored_or_reported_each_once() -> None:
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "peft_version": "0.1"}
    config, problems = LoraFileConfig.from_raw(raw)
    assert problems == []
    assert config is not None
    assert (config.r, config.kind) == (4, "lora")
    config, problems = LoraFileConfig.from_raw({**raw, "r": 0, "modules_to_save": ["lm_head"], "new_key": 3})
    assert config is None
    assert [problem.split(" ")[0].rstrip(":") for problem in problems] == ["modules_to_save", "new_key", "r"]


def test_a_long_value_is_cut_in_a_message() -> None:
    assert value_in_brief("x" * 78) == repr("x" * 78)
    assert value_in_brief("x" * 79) == repr("x" * 79)[:77] + "..."
