"""A tiny base as bitsandbytes stores it in 4 bits."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def prequantized(source: Path, target: Path, **settings: object) -> Path:
    options = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
        **settings,
    }
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    model.save_pretrained(target)
    for file in source.glob("tokenizer*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target
