"""Promises of the config's keys: each says what it is, and its values are checked where they are declared."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from minimal_config import MINIMAL, problems_of, write
from pydantic import ValidationError

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.load import load_config, make_config
from qlora_trainer.config.schema import RunConfig


def test_a_minimal_config_takes_every_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.yaml", MINIMAL))
    assert config.adapter.rank == 16
    assert config.optimizer.name == "auto"
    assert config.memory_options()["optimizer.name"] == "paged_adamw_32bit"
    assert config.model.name == "owner/model"


def test_adams_moments_in_bfloat16_are_refused() -> None:
    message = problems_of({**MINIMAL, "adapter": {"dtype": "bfloat16"}, "optimizer": {"name": "adamw"}})
    assert "Set optimizer.name to paged_adamw_32bit" in message


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("adapter", "rank", 0),
        ("adapter", "rank", 2000),
        ("adapter", "dropout", 1.0),
        ("adapter", "target_modules", []),
        ("data", "eval", 1.5),
        ("optimizer", "name", "sgd"),
        ("data", "eval", "1.5"),
        ("data", "eval", float("nan")),
        ("optimizer", "learning_rate", -1.0),
        ("optimizer", "learning_rate", float("inf")),
        ("optimizer", "weight_decay", float("nan")),
        ("training", "seed", 2**63),
        ("training", "micro_batch_tokens", "some"),
        ("training", "max_steps", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(section: str, key: str, value: object) -> None:
    raw = {**MINIMAL, section: {**MINIMAL.get(section, {}), key: value}}
    assert f"{section}.{key}" in problems_of(raw)


def test_a_micro_batch_that_holds_no_full_row_is_refused() -> None:
    message = problems_of({**MINIMAL, "training": {"micro_batch_tokens": 100}})
    assert "would fit no micro-batch" in message


def test_sources_are_all_weighted_or_none() -> None:
    sources = [{"path": "a", "weight": 0.5}, {"path": "b"}, {"path": "c", "count": 5}]
    message = problems_of({**MINIMAL, "data": {"train": sources}})
    assert "data.train: some sources have a weight, but not b, c; give one to all, or to none" in message
    both = problems_of({**MINIMAL, "data": {"train": [{"path": "a", "weight": 1, "count": 5}]}})
    assert "a weight and a count" in both
    assert make_config({**MINIMAL, "data": {"train": [{"path": "a", "count": 5}, {"path": "b"}]}})
    for wrong in ({"weight": 0}, {"weight": -1}, {"weight": float("inf")}, {"count": 0}, {"count": 1.5}):
        assert "data.train.0" in problems_of({**MINIMAL, "data": {"train": [{"path": "a", **wrong}]}})


def test_every_field_says_what_it_is() -> None:
    for section in RunConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name


def test_roles_to_learn_and_a_date_are_checked_where_they_are_given() -> None:
    raw = {
        "model": {"name": "m"},
        "data": {"train": "x", "train_on": ["assistant", "tool"], "template_date": "2026-01-31"},
    }
    config = make_config(raw)
    assert config.data.train_on == ["assistant", "tool"]
    assert config.data.template_date == datetime.date(2026, 1, 31)
    mistakes: list[dict[str, Any]] = [{"train_on": []}, {"train_on": ["robot"]}, {"template_date": "today"}]
    for wrong in mistakes:
        with pytest.raises(ConfigError, match=f"data.{next(iter(wrong))}"):
            make_config({**raw, "data": {"train": "x", **wrong}})


def test_replaced_values_are_checked_as_those_of_a_file() -> None:
    sources = [{"path": "a.jsonl", "weight": 1.0}, {"path": "b.jsonl", "weight": 2.0}]
    config = make_config({**MINIMAL, "data": {"train": sources}})
    replaced = config.replace({"training.max_steps": 3, "adapter.rank": 8, "data.template_date": "2026-01-31"})
    assert (replaced.training.max_steps, replaced.adapter.rank) == (3, 8)
    assert replaced.data.template_date == datetime.date(2026, 1, 31)
    assert replaced.data.train == config.data.train
    assert (config.training.max_steps, config.adapter.rank) == (None, 16), "a config itself does not change"
    assert replaced.replace({"training.max_steps": None, "adapter.rank": 16, "data.template_date": None}) == config
    for values in (
        {"adapter.rank": 0},
        {"adapter.rnk": 8},
        {"adapters.rank": 8},
        {"training.micro_batch_tokens": config.data.max_length - 1},
        {"training.uncheckpointed_layers": 2, "training.activation_checkpointing": "none"},
    ):
        with pytest.raises(ValidationError):
            config.replace(values)
