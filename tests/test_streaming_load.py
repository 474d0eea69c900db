"""Promises of loading a tensor at a time: every tensor as transformers and bitsandbytes would have it, and no more."""

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from tiny_models import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.load_plan import widest_dtype
from qlora_trainer.model import Base, load_base_model
from qlora_trainer.settings import ModelConfig
from qlora_trainer.tensor_io import checkpoint_tensors

CPU = torch.device("cpu")


def load(directory: Path, **settings: object) -> Base:
    return load_base_model(directory, ModelConfig(name=str(directory), **settings))


def load_by_transformers(directory: Path) -> nn.Module:
    """In the checkpoint's widest dtype, with NF4 and double quantisation."""
    dtype = widest_dtype(checkpoint_tensors(directory))
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=nf4, device_map={"": "cpu"})


def everything_in(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor by name, ties under each of their names; floats that stay dense in fp32, as ours are cast."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors |= {f"{path}.packed": module.weight.data.reshape(-1), f"{path}.absmax": state.absmax}
            tensors |= {f"{path}.nested_absmax": state.state2.absmax, f"{path}.nested_code": state.state2.code}
            tensors |= {f"{path}.offset": state.offset.reshape(())}
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            if not isinstance(parameter, bnb.nn.Params4bit):
                tensors[name] = parameter.data.float()
        tensors |= dict(module.named_buffers(path, recurse=False, remove_duplicate=False))
    return tensors


def assert_same_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    found, expected = everything_in(ours), everything_in(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_is_as_transformers_loads_it(family: str, tiny_models: Callable[[str], Path]) -> None:
    """Parameters, stored buffers and computed ones, packed codes and their statistics, to the last bit."""
    assert_same_tensors(load(tiny_models(family)).model, load_by_transformers(tiny_models(family)))
