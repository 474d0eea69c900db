"""Promises of finding what a decoder layer adds to its hidden states, whatever its parts are called."""

from collections import Counter

import pytest
import torch
import transformers
from tiny_models import FAMILIES, MORE_FAMILIES, SHAPE
from torch import nn

from qlora_trainer.adapters.sublayers import find_sublayers
from qlora_trainer.common.errors import AdapterError


def without_weights(config_class: str, **shape: int) -> nn.Module:
    """A model of transformers on the meta device."""
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**shape))


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_each_family_adds_one_attention_and_one_mlp_a_layer(family: str) -> None:
    config_class, changes = (FAMILIES | MORE_FAMILIES)[family]
    found = find_sublayers(without_weights(config_class.__name__, **{**SHAPE, **changes}))  # type: ignore[arg-type]
    assert Counter(found.values()) == {"attention": 2, "mlp": 2}
    assert all(("att" in path) == (part == "attention") for path, part in found.items())


def test_an_mlp_that_is_no_module_ends_in_its_second_matrix() -> None:
    model = without_weights("OPTConfig", hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4)
    of_layer = {"self_attn": "attention", "fc2": "mlp"}
    assert find_sublayers(model) == {
        f"model.decoder.layers.{layer}.{name}": part for layer in range(2) for name, part in of_layer.items()
    }


def test_attention_and_state_space_layers_each_have_their_own_parts() -> None:
    """A layer's class is named after attention; its MLP is none for that."""
    shape = {"attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2, "expert_layer_period": 2}
    model = without_weights("JambaConfig", **{**SHAPE, **shape})
    paths = {".".join(path.split(".")[2:]): part for path, part in find_sublayers(model).items()}
    expected = {"0.mamba": "mlp", "0.feed_forward": "mlp", "1.self_attn": "attention", "1.feed_forward": "mlp"}
    assert paths == expected


def test_a_layer_whose_parts_add_the_hidden_states_themselves_is_refused_by_name() -> None:
    model = without_weights("BloomConfig", hidden_size=64, n_layer=2, n_head=4)
    with pytest.raises(AdapterError, match=r"BloomBlock leaves it to mlp to add .* Set adapter\.kind=lora"):
        find_sublayers(model)


def test_a_model_without_decoder_layers_or_with_others_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"Sequential has no list of decoder layers"):
        find_sublayers(nn.Sequential(nn.Linear(4, 4)))
    model = without_weights("MambaConfig", hidden_size=64, num_hidden_layers=2, state_size=4)
    with pytest.raises(AdapterError, match=r"MambaBlock .*adapter\.kind=lora"):
        find_sublayers(model)


def test_finding_draws_no_random_number_and_changes_nothing() -> None:
    config_class, changes = MORE_FAMILIES["falcon"]
    model = without_weights(config_class.__name__, **{**SHAPE, **changes, "hidden_dropout": 0.5})  # type: ignore[arg-type]
    model.train()
    before, modules = torch.get_rng_state(), list(model.modules())
    find_sublayers(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(model.modules()) == modules
    assert all(module.training for module in modules)
