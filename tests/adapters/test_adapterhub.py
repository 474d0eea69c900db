"""AdapterHub's `adapters` gives our logits from our files; it needs an older transformers, and so a Python of its own.

QLORA_TEST_ADAPTERS names that Python; docs/decisions/0051 says how it is made.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_model_directory
from transformers import AutoModelForCausalLM

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters
from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.peft_format import write_adapter
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.config.schema import AdapterConfig

THEIR_PYTHON = os.environ.get("QLORA_TEST_ADAPTERS")

_THEIRS = """
import json, sys
import adapters, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, saved, output = sys.argv[1:]
settings = json.load(open(f"{saved}/adapter_config.json"))
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
adapters.init(model)
placed = settings["placement"].split("+")
model.add_adapter("ours", adapters.BnConfig(
    mh_adapter="attention" in placed, output_adapter="mlp" in placed,
    reduction_factor=settings["hidden_size"] / settings["bottleneck_size"],
    non_linearity={"silu": "swish"}.get(settings["activation"], settings["activation"]),
))
model.set_active_adapters("ours")
parameters = {name: p for name, p in model.named_parameters() if ".ours." in name}
places = {"self_attn": "attention_adapters", "mlp": "output_adapters"}
parts = {"down": "adapter_down.0", "up": "adapter_up"}
for name, tensor in load_file(f"{saved}/adapter_model.safetensors").items():
    *_, place, part, kind = name.split(".")
    layer = name.removeprefix("base_model.model.").removesuffix(f".{place}.{part}.{kind}")
    part = part.removeprefix("bottleneck_")
    parameter = parameters.pop(f"{layer}.{places[place]}.adapters.ours.{parts[part]}.{kind}")
    assert parameter.shape == tensor.shape
    parameter.data.copy_(tensor)
assert not parameters, list(parameters)
with torch.no_grad():
    save_file({"logits": model(torch.arange(2, 34)[None]).logits}, output)
"""


@pytest.mark.skipif(THEIR_PYTHON is None, reason="QLORA_TEST_ADAPTERS names no Python with the package adapters")
@pytest.mark.parametrize("placement", ["attention+mlp", "mlp", "attention"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_adapterhub_gives_our_logits_from_our_files(tmp_path: Path, placement: str, activation: str) -> None:
    base = make_model_directory(tmp_path / "base", "llama", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokens = torch.arange(2, 34)[None]
    with torch.no_grad():
        plain = model(tokens).logits
    settings = AdapterConfig(kind="bottleneck", bottleneck_size=16, activation=activation, placement=placement)
    paths = add_adapters(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.1)
        ours = model(tokens).logits
    tensors = adapter_state_dict(model)
    (tmp_path / "adapter").mkdir()
    write_adapter(
        tmp_path / "adapter", tensors, adapter_kind(settings).file_config(settings, model, tensors, paths, {})
    )
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["placement"] == placement
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    given = [base, tmp_path / "adapter", tmp_path / "theirs"]
    subprocess.run([str(THEIR_PYTHON), "-c", _THEIRS, *map(str, given)], check=True, env=environment, cwd=tmp_path)
    theirs = load_file(tmp_path / "theirs")["logits"]
    assert float((theirs - ours).norm() / ours.norm()) < 1e-5
    assert float((plain - ours).norm() / ours.norm()) > 1e-2, "the adapter must matter"
