"""Rows of a scaled model mean the same, whatever rows came before them."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_model_directory
from transformers import AutoModelForCausalLM

from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.model.forward import examine_forward
from qlora_trainer.model.load import load_base_model, load_dense_model
from qlora_trainer.weights.model_directory import ModelDirectory


@pytest.fixture
def dynamic(tmp_path: Path) -> ModelDirectory:
    """A model of 16 positions, by dynamic scaling of 64."""
    base = make_model_directory(tmp_path / "base", dtype=torch.float32, max_position_embeddings=16)
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    (base / "config.json").write_text(json.dumps(config))
    return ModelDirectory.open(base)


def test_dynamic_positions_forget_the_rows_before(dynamic: ModelDirectory) -> None:
    """transformers keeps the frequencies of the longest row so far, with which no resumed run would begin."""
    row, longer = torch.arange(3, 33)[None], torch.arange(3, 63)[None]
    plain = AutoModelForCausalLM.from_pretrained(dynamic.path).eval()
    dense = load_dense_model(dynamic, torch.device("cpu"))
    base = load_base_model(dynamic, ModelConfig(name="x"), user_cache()).model
    with torch.no_grad():
        alone = plain(row, use_cache=False).logits
        plain(longer, use_cache=False)
        assert not torch.equal(plain(row, use_cache=False).logits, alone)
        assert torch.equal(dense(row).logits, alone)
        for model in (dense, base):
            before = model(row).logits
            model(longer)
            assert torch.equal(model(row).logits, before)


def test_rows_whose_positions_hang_on_their_neighbors_are_reported(dynamic: ModelDirectory) -> None:
    assert dynamic.facts.positions == 64
    model = load_dense_model(dynamic, torch.device("cpu"))
    assert examine_forward(model, max_length=16).warnings == ()
    (warning,) = examine_forward(model, max_length=17).warnings
    assert "data.max_length=16" in warning
