"""Small trained runs to merge, their bases, and the merged model in the hands of plain transformers."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.peft_format import StoredAdapter
from qlora_trainer.adapters.trainable import BiasMode, trainable_parameters
from qlora_trainer.common.cache import user_cache
from qlora_trainer.config.schema import AdapterConfig, ModelConfig
from qlora_trainer.merging.fold import MergeReport, merge
from qlora_trainer.merging.logits import WholeLogits, compare_logits
from qlora_trainer.merging.merge_plan import MergeInputs, plan_merge
from qlora_trainer.merging.rounding import rounded_weights
from qlora_trainer.merging.verify import verify_merge
from qlora_trainer.model.forward import LossPath
from qlora_trainer.model.load import load_base_model
from qlora_trainer.weights.model_directory import ModelDirectory

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}

LLAMA = {**SHAPE, "intermediate_size": 640, "num_key_value_heads": 2}

ROWS = [list(range(5, 60)), [3, 1, 4, 1, 5, 9, 2, 6], list(range(100, 20, -1))]


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
    config = LoraFileConfig(
        r=8, lora_alpha=16.0, target_modules="all-linear", bias=bias, fan_in_fan_out=stored_transposed
    )
    adapter = StoredAdapter(config, adapter_state_dict(base.model))
    return Run(MergeInputs(base.directory, base.fingerprint, adapter), base.model)


def merge_to(inputs: MergeInputs, output: Path, dtype: torch.dtype = torch.float16, **options: Any) -> MergeReport:
    """Plan a merge into a directory, and make it."""
    return merge(plan_merge(inputs, output, dtype), **options)


def on_base(inputs: MergeInputs, directory: Path) -> MergeInputs:
    """The same adapter on another checkpoint."""
    return dataclasses.replace(inputs, base=ModelDirectory.open(directory))


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: info.read() for name, info in ModelDirectory.open(directory).tensors.items()}


def load_plain(directory: Path) -> Any:
    """What any user of transformers gets, in fp32."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def by_hand(run: Run, name: str, source: Tensor) -> Tensor:
    """A merged tensor in fp32, by bitsandbytes and three lines of arithmetic on whole tensors."""
    weight = source
    if name.removesuffix(".weight") in run.inputs.fingerprint.tensors:
        packed, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
        state.dtype = torch.float32
        weight = dequantize_4bit(packed, state)
    key = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{key}.lora_A.weight" in run.inputs.adapter.tensors:
        lora_A, lora_B = (run.inputs.adapter.tensors[f"{key}.lora_{factor}.weight"] for factor in "AB")
        weight = weight + 2.0 * (lora_B @ lora_A)
    return weight.float()


def reference(run: Run) -> WholeLogits:
    return WholeLogits.of_rows([run.logits(torch.tensor([row])) for row in ROWS])


def verifier(run: Run) -> Any:
    """What verifies a merge of the run into float16."""
    with rounded_weights(run.model, torch.float16):
        rounded = reference(run)
    return functools.partial(
        verify_merge,
        sample_rows=ROWS,
        reference=reference(run),
        rounded=rounded,
        load_merged=lambda merged: load_plain(merged.path),
        loss_path=LossPath(),
    )


def check_logits(run: Run, directory: Path, kl: float) -> None:
    model = load_plain(directory)
    with torch.no_grad():
        merged = WholeLogits.of_rows([model(input_ids=torch.tensor([row])).logits for row in ROWS])
    difference = compare_logits(reference(run), merged)
    assert difference.kl < kl
    assert difference.top1_agreement == 1.0


def altered(inputs: MergeInputs, changes: Mapping[str, Tensor | None]) -> MergeInputs:
    """The same merge of an adapter in which some tensors are others, or missing."""
    both = {**inputs.adapter.tensors, **changes}
    tensors = {name: tensor for name, tensor in both.items() if tensor is not None}
    return dataclasses.replace(inputs, adapter=dataclasses.replace(inputs.adapter, tensors=tensors))
