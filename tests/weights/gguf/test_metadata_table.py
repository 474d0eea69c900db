"""The tables of metadata know every architecture that can be read, and name what transformers' configs have."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoConfig

from qlora_trainer.weights.gguf.layout import readable_architectures
from qlora_trainer.weights.gguf.metadata import Metadata, read_changes
from qlora_trainer.weights.gguf.metadata_table import REFUSED, TABLES

TEXT_MODELS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "qwen35": "qwen3_5_text"}


def test_every_architecture_that_transformers_reads_has_a_table_or_is_refused() -> None:
    spelled_otherwise = {"qwen2_moe", "qwen3_moe", "gpt_oss", "minimax_m2", "mistral", "umt5"}
    assert {*readable_architectures()} - {*TABLES} - {*REFUSED} <= spelled_otherwise


@pytest.mark.parametrize("architecture", TABLES)
def test_each_name_is_one_of_the_config(architecture: str) -> None:
    values = AutoConfig.for_model(TEXT_MODELS.get(architecture, architecture)).to_dict()
    assert {rule for rule in TABLES[architecture].values() if isinstance(rule, str)} <= {*values}


@pytest.mark.parametrize(
    ("architecture", "layers", "hidden", "size", "scalar"),
    [
        ("gemma3", 62, 5376, 128, 168),
        ("gemma2", 46, 4608, 128, 144),
        ("gemma3", 34, 2560, 256, 256),
        ("gemma2", 42, 3584, 256, 256),
    ],
)
def test_scale_of_attention_is_by_the_size_of_a_head_but_for_the_largest_gemmas(
    architecture: str, layers: int, hidden: int, size: int, scalar: int
) -> None:
    heads = {5376: 32, 4608: 32, 2560: 8, 3584: 16}[hidden]
    keys: dict[str, object] = {"context_length": 8192, "block_count": layers, "embedding_length": hidden}
    keys |= {"attention.head_count": heads, "attention.key_length": size, "attention.layer_norm_rms_epsilon": 1e-6}
    metadata = Metadata(architecture, keys, {}, [])
    changes = read_changes(metadata, SimpleNamespace(tensors=[]), Path("x.gguf"))
    assert changes.values["query_pre_attn_scalar"] == scalar
