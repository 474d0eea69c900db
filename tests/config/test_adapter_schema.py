"""Promises of the adapter's settings: each belongs to some kinds, and has an effect or is refused."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from minimal_config import MINIMAL

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.adapter_schema import SETTINGS_OF_KIND, AdapterConfig, settings_of_others
from qlora_trainer.config.commented import commented_yaml
from qlora_trainer.config.load import dump_config, load_config, make_config
from qlora_trainer.config.schema import RunConfig

OTHER_VALUES: dict[str, Any] = {
    "rank": 8,
    "alpha": 3.0,
    "dropout": 0.1,
    "target_modules": "mlp",
    "fused_parts": {"c_attn": ["query"]},
    "use_rslora": True,
    "feedforward_modules": ["down_proj"],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2.0},
    "layers_to_transform": [0],
    "bias": "all",
    "bottleneck_size": 8,
    "activation": "gelu",
    "placement": "mlp",
    "new_tokens": {"<gene>": "a gene"},
    "trainable_tokens": ["the"],
    "virtual_tokens": 7,
    "prompt_init_text": "Answer.",
    "prefix_projection": True,
    "prefix_hidden_size": 8,
    "init": "gaussian",
}
FOREIGN = [(kind, name) for kind in SETTINGS_OF_KIND for name in sorted(settings_of_others(kind))]


def config_of(**adapter: Any) -> RunConfig:
    return make_config({**MINIMAL, "adapter": adapter})


def test_each_setting_belongs_to_all_kinds_or_is_in_the_table() -> None:
    of_kinds = {name for names in SETTINGS_OF_KIND.values() for name in names}
    assert AdapterConfig.model_fields.keys() - of_kinds == {"kind", "dtype", "init_from"}
    assert of_kinds == OTHER_VALUES.keys()
    assert SETTINGS_OF_KIND.keys() == {*get_args(AdapterConfig.model_fields["kind"].annotation)}


@pytest.mark.parametrize(("kind", "name"), FOREIGN)
def test_a_setting_of_another_kind_is_refused_unless_at_its_default(kind: str, name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(kind=kind, **{name: OTHER_VALUES[name]})
    line = str(refused.value).splitlines()[-1]
    assert line == f"  - adapter.{name} has no effect with adapter.kind={kind}; leave it out"
    config_of(kind=kind, **{name: AdapterConfig.model_fields[name].get_default()})


def test_several_settings_of_another_kind_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rank and adapter\.bias have no effect with .*; leave them out$"):
        config_of(kind="prompt", bias="all", rank=2)


def test_settings_that_go_with_the_kind_or_the_start_in_another_way_are_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.init=gaussian has no effect with adapter\.init_from"):
        config_of(init="gaussian", init_from="a")
    with pytest.raises(ConfigError, match=r"optimizer\.lora_plus_ratio has no effect with adapter\.kind=bottleneck"):
        make_config({**MINIMAL, "adapter": {"kind": "bottleneck"}, "optimizer": {"lora_plus_ratio": 4.0}})


@pytest.mark.parametrize("kind", SETTINGS_OF_KIND)
def test_what_is_written_has_the_settings_of_the_kind_alone_and_is_read_back(kind: str, tmp_path: Path) -> None:
    config = config_of(kind=kind, **{name: OTHER_VALUES[name] for name in SETTINGS_OF_KIND[kind]})
    for text in (dump_config(config), commented_yaml(config, [])):
        assert yaml.safe_load(text)["adapter"].keys().isdisjoint(settings_of_others(kind))
        (tmp_path / "config.yaml").write_text(text)
        assert load_config(tmp_path / "config.yaml").adapter == config.adapter


def test_virtual_tokens_leave_space_for_a_row() -> None:
    raw = {"model": {"name": "m"}, "data": {"train": "r", "max_length": 64}}
    make_config({**raw, "adapter": {"kind": "prompt", "virtual_tokens": 63}})
    with pytest.raises(ConfigError, match=r"virtual_tokens is 64 and data\.max_length, which counts them, 64"):
        make_config({**raw, "adapter": {"kind": "prompt", "virtual_tokens": 64}})


def test_a_text_to_begin_with_is_not_empty() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.prompt_init_text: is empty"):
        config_of(kind="prompt", prompt_init_text=" ")


def test_the_mlp_of_a_prefix_has_a_width_only_where_there_is_one_and_starts_from_no_file() -> None:
    with pytest.raises(
        ConfigError, match=r"prefix_hidden_size has no effect where adapter\.prefix_projection is false"
    ):
        config_of(kind="prefix", prefix_hidden_size=8)
    with pytest.raises(ConfigError, match=r"no MLP that made it.*set adapter\.prefix_projection=false"):
        config_of(kind="prefix", prefix_projection=True, init_from="adapter")
    assert config_of(kind="prefix", prefix_projection=True).adapter.as_stored == config_of(kind="prefix").adapter


def test_a_prefix_takes_positions_of_the_model_and_no_tokens_of_rows() -> None:
    prefix, prompt = (config_of(kind=kind, virtual_tokens=30).adapter for kind in ("prefix", "prompt"))
    assert (prefix.leading_tokens, prompt.leading_tokens) == (0, 30)
    assert (prefix.positions_of_rows(32), prompt.positions_of_rows(32)) == (2, 32)
    assert prefix.positions_of_rows(None) is None
    with pytest.raises(ConfigError, match=r"virtual_tokens is 30, and the model has 30 positions"):
        prefix.positions_of_rows(30)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"new_tokens": ["<a>", " "]}, r"adapter\.new_tokens: names an empty token"),
        ({"new_tokens": {"<a>": " "}}, r"adapter\.new_tokens: gives '<a>' an empty text"),
        ({"trainable_tokens": ["the", "a", "the"]}, r"adapter\.trainable_tokens: names 'the' twice"),
        ({"trainable_tokens": [5]}, r"adapter\.trainable_tokens"),
        ({"trainable_tokens": ["the"], "init": "pissa"}, r"adapter\.init=pissa starts from a file"),
    ],
)
def test_tokens_are_named_once_and_by_their_text(adapter: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(**adapter)


def test_new_tokens_are_a_list_or_have_texts_to_begin_as() -> None:
    assert config_of(new_tokens=["<a>", "<b>"]).adapter.new_token_texts == {"<a>": None, "<b>": None}
    assert config_of(new_tokens={"<a>": "an a"}).adapter.new_token_texts == {"<a>": "an a"}
    assert not config_of().adapter.trains_tokens
