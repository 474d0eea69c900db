"""Small trained runs to merge, and their bases."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from qlora_trainer.adapters.inject import BiasMode, adapter_state_dict, add_adapters, trainable_parameters
from qlora_trainer.adapters.peft_config import AdapterFileConfig
from qlora_trainer.adapters.peft_format import StoredAdapter
from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.schema import AdapterConfig, ModelConfig
from qlora_trainer.merging.fold import MergeReport, merge
from qlora_trainer.merging.merge_plan import MergeInputs, plan_merge
from qlora_trainer.model.load import load_base_model
from qlora_trainer.weights.model_directory import ModelDirectory

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}

LLAMA = {**SHAPE, "intermediate_size": 640, "num_key_value_heads": 2}


@dataclasses.dataclass
class Run:
    """A base on disk, and a model trained on it."""

    inputs: MergeInputs
    model: Any

    def logits(self, input_ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=input_ids).logits


def make_base(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, shard: str = "5GB"
) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():  # a tiny random model answers almost evenly; larger weights give it opinions
        for name, parameter in model.named_parameters():
            parameter.mul_(4.0) if "norm" not in name and "ln_" not in name else None
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def train(directory: Path, bias: BiasMode = "none") -> Run:
    """Base + adapter with random factors, which is what training ends with, sooner than by training."""
    base = load_base_model(ModelDirectory.open(directory), ModelConfig(name=str(directory), device="cpu"), user_cache())
    add_adapters(base.model, AdapterConfig(rank=8, alpha=16.0, bias=bias), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(base.model):
            if "lora_B" in name or name.endswith("bias"):
                parameter.normal_(0.0, 0.2, generator=generator)
    stored_transposed = any(getattr(module, "fan_in_fan_out", False) for module in base.model.modules())
    config = AdapterFileConfig(
        r=8, lora_alpha=16.0, target_modules="all-linear", bias=bias, fan_in_fan_out=stored_transposed
    )
    adapter = StoredAdapter(config, adapter_state_dict(base.model))
    return Run(MergeInputs.from_adapter(base.directory, base.fingerprint, adapter), base.model)


def merge_to(inputs: MergeInputs, output: Path, dtype: torch.dtype = torch.float16, **options: Any) -> MergeReport:
    """Plan a merge into a directory, and make it."""
    return merge(plan_merge(inputs, output, dtype), **options)


def on_base(inputs: MergeInputs, directory: Path) -> MergeInputs:
    """The same adapter on another checkpoint."""
    return dataclasses.replace(inputs, base=ModelDirectory.open(directory))


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: info.read() for name, info in ModelDirectory.open(directory).tensors.items()}
