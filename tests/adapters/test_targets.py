"""Which layers are adapted: found by what they are, and refused with what exists."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import FAMILIES
from torch import nn

from qlora_trainer.adapters.inject import (
    add_adapters,
)
from qlora_trainer.adapters.targets import find_targets
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.load import make_config
from qlora_trainer.config.schema import AdapterConfig, ModelConfig
from qlora_trainer.model.load import load_base_model
from qlora_trainer.weights.model_directory import ModelDirectory

Models = Callable[[str], Path]


def base_model(directory: Path) -> Any:
    return load_base_model(ModelDirectory.open(directory), ModelConfig(name=str(directory)), user_cache()).model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_linear_reaches_every_linear_layer_whatever_its_name(family: str, tiny_models: Models) -> None:
    model = base_model(tiny_models(family))
    paths = add_adapters(model, AdapterConfig(rank=4), seed=0)
    ends = {path.rsplit(".", 1)[-1] for path in paths}
    separate = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    conv = {"c_attn", "c_fc", "c_proj"}
    assert ends == {"phi3": fused, "gpt2": conv}.get(family, separate)
    assert len(paths) == 2 * (4 if family == "gpt2" else len(ends))  # GPT-2 has two layers called c_proj in a block
    assert not any("lm_head" in path or "embed" in path for path in paths)


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "phi3",
            ["q_proj", "down_proj"],
            r"names q_proj, but .* There are: down_proj, gate_up_proj, o_proj, qkv_proj",
        ),
        ("llama", ["q_proj", "lm_head"], "names lm_head.*LM head are not adapted"),
        ("llama", ["embed_tokens"], "names embed_tokens.*Embeddings"),
        ("llama", ["proj"], "names proj, but"),
        ("llama", ["input_layernorm"], "names input_layernorm.*no linear layer"),
        ("llama", r".*\.q_proj|lm_head", "has the alternative lm_head.*LM head are not adapted.* Leave it out"),
        ("llama", r"lm_head", "matches no linear layer.*LM head are not adapted"),
        ("llama", r".*\.(q_proj|(v_proj|embed_tokens))", "has the alternative embed_tokens.*Embeddings"),
        ("llama", r".*\.(q_proj|lm_head)", "has the alternative lm_head.*LM head are not adapted"),
        ("llama", r".*(?:_proj|_head)", "has the alternative _head.*LM head"),
        ("llama", r".*(?P<kind>_proj|norm)", "has the alternative norm.*layernorm is no linear layer"),
        ("llama", r".*\.(q_proj|k_porj)", "has the alternative k_porj, which matches no linear layer"),
        ("llama", r".*[|]?(up_proj|[)|(]x)", r"has the alternative \[\)\|\(\]x, which"),
        ("mixtral", r".*\.(q_proj|gate_up_proj)", "has the alternative gate_up_proj"),
        ("mixtral", r".*self_attn\..*|.*\.experts\..*", "has the alternative .*experts.*Experts are not adapted"),
        ("llama", "q_proj", r"matches no linear layer.* give a list: 'adapter\.target_modules=\[q_proj\]'"),
    ],
)
def test_a_target_that_matches_nothing_is_reported_with_what_exists(
    family: str, targets: str | list[str], message: str, tiny_models: Models
) -> None:
    with pytest.raises(AdapterError, match=message):
        find_targets(base_model(tiny_models(family)), targets)


def test_targets_match_whole_names_only(tiny_models: Models) -> None:
    model = base_model(tiny_models("llama"))
    assert find_targets(model, ["self_attn.q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert find_targets(model, ["layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_and_mlp_share_out_every_linear_layer(family: str, tiny_models: Models) -> None:
    model = base_model(tiny_models(family))
    attention, mlp = find_targets(model, "attention"), find_targets(model, "mlp")
    assert sorted(attention + mlp) == sorted(find_targets(model, "all-linear"))
    assert all("attn" in path for path in attention)
    assert all("mlp" in path for path in mlp)


def test_a_regular_expression_matches_whole_paths(tiny_models: Models) -> None:
    model = base_model(tiny_models("llama"))
    found = find_targets(model, r"model\.layers\.1\..*(q|v)_proj")
    assert found == [f"model.layers.1.self_attn.{name}_proj" for name in ("q", "v")]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        (r".*", 14),
        (r"model\.layers\..*", 14),
        (r"(?!.*(lm_head|down_proj)).*", 12),
        (r".*\.(self_attn|mlp)\.(q_proj|up_proj)", 4),  # not each of one with each of the other
        (r".*[.|](q|k)_proj", 4),
        (r".*layers\.(?P<n>0|1)\.(?:mlp|self_attn)\.(?i:UP|Q)_proj", 4),
    ],
)
def test_a_pattern_may_match_more_than_is_adapted(pattern: str, layers: int, tiny_models: Models) -> None:
    assert len(find_targets(base_model(tiny_models("llama")), pattern)) == layers


def test_the_advice_to_give_a_list_can_be_followed(tiny_models: Models) -> None:
    model = base_model(tiny_models("llama"))
    with pytest.raises(AdapterError) as caught:
        find_targets(model, "q_proj")
    advice = shlex.split(str(caught.value).partition("give a list: ")[2].removesuffix("."))
    raw: dict[str, Any] = {"model": {"name": "x"}, "data": {"train": "x"}}
    key, _, value = advice[0].partition("=")
    raw["adapter"] = {key.removeprefix("adapter."): yaml.safe_load(value)}
    assert len(find_targets(model, make_config(raw).adapter.target_modules)) == 2


def test_a_lone_linear_says_where_to_put_it() -> None:
    with pytest.raises(AdapterError, match=r"nn\.Sequential"):
        add_adapters(nn.Linear(8, 8), AdapterConfig())
