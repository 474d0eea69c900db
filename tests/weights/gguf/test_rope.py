"""The rope settings of a GGUF file are read with llama.cpp's meaning and defaults."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import HEAD_DIM, tiny_weights, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_trainer.common.progress import silent
from qlora_trainer.weights.gguf.importer import import_gguf
from qlora_trainer.weights.gguf.rope import LONG_FACTORS, SHORT_FACTORS, read_rope

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}


@pytest.mark.parametrize(
    ("keys", "parameters"),
    [
        ({}, PLAIN),
        ({"rope.dimension_count": 16, "rope.freq_base": 5e5}, PLAIN | {"rope_theta": 5e5}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, PLAIN),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, PLAIN),
        ({"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 64}, PLAIN),
        (YARN, PLAIN | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}),
        (
            YARN | {"rope.scaling.yarn_attn_factor": 0.5, "rope.scaling.attn_factor": 2.0},
            PLAIN | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
        ),
    ],
)
def test_settings_become_parameters(keys: dict[str, object], parameters: dict[str, object]) -> None:
    rope = read_rope(keys, 16, 256, {}, partial=False)
    assert (rope.parameters, rope.problems) == (parameters, [])


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (YARN | {"rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor = 0.5"),
        (YARN | {"rope.scaling.yarn_log_multiplier": 0.1}, "rope.scaling.yarn_log_multiplier = 0.1"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type = longrope (without the tensors of its factors)"),
        ({"rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor = 1.2"),
        ({"rope.dimension_count": 4}, "rope.dimension_count = 4 (the heads have 16)"),
    ],
)
def test_what_cannot_be_computed_is_a_problem(keys: dict[str, object], problem: str) -> None:
    assert read_rope(keys, 16, 256, {}, partial=False).problems == [problem]


def test_factors_of_each_frequency_have_no_attention_factor_but_the_files() -> None:
    factors = {name: torch.from_numpy(np.full(8, 2.0, np.float32)) for name in (LONG_FACTORS, SHORT_FACTORS)}
    rope = read_rope({"rope.scaling.original_context_length": 64}, 16, 256, factors, partial=False)
    assert rope.used == {LONG_FACTORS, SHORT_FACTORS}
    assert rope.parameters["attention_factor"] == 1.0
    assert (rope.parameters["factor"], rope.parameters["long_factor"]) == (4.0, [2.0] * 8)


def llama3_divisors(factor: float) -> np.ndarray:
    """What llama.cpp's converter writes for Llama 3.1's settings: low frequencies divided, the middle blended."""
    divisors = []
    for place in range(0, HEAD_DIM, 2):
        wavelength = 2 * math.pi * 50000.0 ** (place / HEAD_DIM)
        if wavelength < 8192 / 4.0:
            divisors.append(1.0)
        elif wavelength > 8192 / 1.0:
            divisors.append(factor)
        else:
            blend = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            divisors.append(1 / ((1 - blend) / factor + blend))
    return np.array(divisors, np.float32)


def test_rope_scaling_of_llama_3_is_restored(tmp_path: Path) -> None:
    divisors = llama3_divisors(32.0)
    assert len(set(divisors)) > 2  # the blended middle is there too
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights(), rope_divisors=divisors)
    directory = import_gguf(path, tmp_path / "cache", silent)
    rotary = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).model.rotary_emb
    plain = 50000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    assert rotary.inv_freq.numpy() == pytest.approx(plain / divisors, rel=1e-5)
    assert json.loads((directory / "import.json").read_text())["unused_tensors"] == []
