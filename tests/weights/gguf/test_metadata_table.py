"""The tables of metadata know every architecture that can be read, and name what transformers' configs have."""

import pytest
from transformers import AutoConfig

from qlora_trainer.weights.gguf.layout import readable_architectures
from qlora_trainer.weights.gguf.metadata_table import REFUSED, TABLES

TEXT_MODELS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "qwen35": "qwen3_5_text"}


def test_every_architecture_that_transformers_reads_has_a_table_or_is_refused() -> None:
    spelled_otherwise = {"qwen2_moe", "qwen3_moe", "gpt_oss", "minimax_m2", "mistral", "umt5"}
    assert {*readable_architectures()} - {*TABLES} - {*REFUSED} <= spelled_otherwise


@pytest.mark.parametrize("architecture", TABLES)
def test_each_name_is_one_of_the_config(architecture: str) -> None:
    values = AutoConfig.for_model(TEXT_MODELS.get(architecture, architecture)).to_dict()
    assert {rule for rule in TABLES[architecture].values() if isinstance(rule, str)} <= {*values}
