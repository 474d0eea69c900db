"""The config's promises: every problem is reported at once, with the near miss, and nothing unknown is swallowed."""

import datetime
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from qlora_trainer.common.errors import ConfigError, FileMissingError
from qlora_trainer.config.data_schema import Source, SourceFile
from qlora_trainer.config.load import load_config, make_config, save_config
from qlora_trainer.config.schema import RunConfig

MINIMAL = {"model": {"name": "owner/model"}, "data": {"train": "rows.jsonl"}}


def write(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def problems_of(raw: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(raw)
    return str(caught.value)


def test_a_minimal_config_takes_every_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.yaml", MINIMAL))
    assert config.adapter.rank == 16
    assert config.optimizer.name == "paged_adamw_32bit"
    assert config.model.name == "owner/model"


def test_adams_moments_in_bfloat16_are_refused() -> None:
    message = problems_of({**MINIMAL, "adapter": {"dtype": "bfloat16"}, "optimizer": {"name": "adamw"}})
    assert "Set optimizer.name to paged_adamw_32bit" in message


def test_a_misspelt_key_is_refused_with_the_near_miss() -> None:
    message = problems_of({**MINIMAL, "adapter": {"rnak": 8}})
    assert "unknown key adapter.rnak; did you mean adapter.rank?" in message


def test_a_key_in_the_wrong_section_is_reported_where_it_belongs() -> None:
    message = problems_of({**MINIMAL, "training": {"learning_rate": 1e-4}})
    assert "did you mean optimizer.learning_rate?" in message


def test_a_misspelt_section_is_refused_with_the_near_miss() -> None:
    assert "unknown key optimzer; did you mean optimizer?" in problems_of({**MINIMAL, "optimzer": {}})


def test_all_problems_are_reported_at_once() -> None:
    message = problems_of({"model": {}, "data": {"train": "x", "max_length": "long"}, "training": {"batchsize": 1}})
    assert "model.name is missing" in message
    assert "data.max_length" in message
    assert "'long'" in message
    assert "did you mean training.global_batch_size?" in message
    assert "3 problems" in message


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


def test_overrides_reach_every_field_and_keep_their_types(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    config = load_config(
        path,
        ["adapter.rank=8", "optimizer.learning_rate=3e-4", "adapter.target_modules=[q_proj]", "data.packing=false"],
    )
    assert config.adapter.rank == 8
    assert config.optimizer.learning_rate == 3e-4
    assert config.adapter.target_modules == ["q_proj"]
    assert config.data.packing is False


@pytest.mark.parametrize("override", ["adapter.rank", "=3", "model.name.deeper=3", "adapter.rnak=3"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path / "c.yaml", MINIMAL), [override])


@pytest.mark.parametrize(
    ("eval_set", "expected"), [("1e-1", 0.1), ("0.25", 0.25), ("0", 0.0), ("rows.jsonl", "rows.jsonl")]
)
def test_a_number_is_a_share_however_it_is_written(tmp_path: Path, eval_set: str, expected: object) -> None:
    """YAML 1.1 reads 1e-1 as text."""
    assert load_config(write(tmp_path / "c.yaml", MINIMAL), [f"data.eval={eval_set}"]).data.eval == expected


def test_a_bare_section_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model:\n  # name: owner/model\ndata: {train: rows.jsonl}\nadapter:\n")
    config = load_config(path, ["model.name=owner/model"])
    assert (config.model.name, config.adapter.rank) == ("owner/model", 16)
    with pytest.raises(ConfigError, match=r"model\.name is missing"):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "model: {name: a/b}\ndata: {train: x}\nadapter: {rank: 8}\nadapter: {alpha: 8}\n",
        "model: {name: a/b}\ndata: {train: x}\nadapter: {rank: 8, alpha: 8, rank: 4}\n",
    ],
    ids=["section", "key"],
)
def test_a_key_that_is_twice_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"the key (adapter|rank) occurs twice[^$]*c\.yaml\", line [34]"):
        load_config(path)


def test_merged_yaml_mappings_may_still_be_overruled(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {name: a/b}\ndata:\n  train:\n    - &first {path: a, format: chat, split: train}\n"
        "    - {<<: *first, path: b}\n"
    )
    sources = load_config(path).data.train
    assert [(s.path, s.format) for s in sources if not isinstance(s, str)] == [("a", "chat"), ("b", "chat")]


def test_a_key_of_several_types_has_one_problem() -> None:
    message = problems_of({**MINIMAL, "training": {"micro_batch_tokens": "foo"}})
    assert "1 problem:" in message
    assert message.count("training.micro_batch_tokens") == 1
    assert "valid integer" in message
    assert "'auto'" in message


def test_a_problem_inside_a_source_is_reported_of_that_source_alone() -> None:
    message = problems_of({**MINIMAL, "data": {"train": [{"path": "a", "fromat": "chat"}, {"path": "b", "rank": 3}]}})
    assert message.splitlines()[1:] == [
        "  - unknown key data.train.0.fromat; did you mean data.train.0.format?",
        f"  - unknown key data.train.1.rank; a source has {', '.join(Source.model_fields)}",
    ]


def test_an_encoding_that_python_does_not_know_is_a_problem_of_the_config() -> None:
    for wrong in ("utf-99", "hex", "a\0b", "idna", "punycode"):
        message = problems_of({**MINIMAL, "data": {"train": [{"path": "a", "encoding": wrong}], "encoding": wrong}})
        assert message.count("is no text encoding that Python knows") == 2
    assert make_config({**MINIMAL, "data": {"train": "a", "encoding": "UTF-16"}}).data.encoding == "UTF-16"


def test_a_problem_inside_the_eval_source_is_reported_of_it() -> None:
    message = problems_of({**MINIMAL, "data": {"train": "x", "eval": {"path": "a", "wieght": 1}}})
    assert message.splitlines()[1:] == [
        f"  - unknown key data.eval.wieght; a source has {', '.join(SourceFile.model_fields)}",
    ]
    assert "data.eval.path is missing" in problems_of({**MINIMAL, "data": {"train": "x", "eval": {}}})


def test_sources_are_all_weighted_or_none() -> None:
    sources = [{"path": "a", "weight": 0.5}, {"path": "b"}, {"path": "c", "count": 5}]
    message = problems_of({**MINIMAL, "data": {"train": sources}})
    assert "data.train: some sources have a weight, but not b, c; give one to all, or to none" in message
    both = problems_of({**MINIMAL, "data": {"train": [{"path": "a", "weight": 1, "count": 5}]}})
    assert "a weight and a count" in both
    assert make_config({**MINIMAL, "data": {"train": [{"path": "a", "count": 5}, {"path": "b"}]}})
    for wrong in ({"weight": 0}, {"weight": -1}, {"weight": float("inf")}, {"count": 0}, {"count": 1.5}):
        assert "data.train.0" in problems_of({**MINIMAL, "data": {"train": [{"path": "a", **wrong}]}})


def test_the_path_of_a_eval_source_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    config = make_config({**MINIMAL, "data": {"train": "x", "eval": {"path": "rows.jsonl", "format": "text"}}})
    assert config.data.eval == SourceFile(path=str(tmp_path / "rows.jsonl"), format="text")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_saved_config_loads_to_the_same_config(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "c.yaml", MINIMAL), ["adapter.rank=4", "training.max_steps=7"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_local_paths_become_absolute_and_hub_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    config = load_config(write(tmp_path / "c.yaml", MINIMAL), ["training.output_dir=runs/a"])
    assert config.data.train == str(tmp_path / "rows.jsonl")
    assert config.model.name == "owner/model"
    assert config.training.output_dir == str(tmp_path / "runs" / "a")


def test_a_missing_or_broken_file_ends_with_an_error_message(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="no config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("model: [unclosed")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="should hold sections"):
        load_config(tmp_path / "list.yaml")


def test_every_field_says_what_it_is() -> None:
    for section in RunConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name


def test_every_shipped_config_is_valid() -> None:
    shipped = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        load_config(path)


def test_the_configs_readme_explains_every_key_as_it_is() -> None:
    """One table row a field, with its description word for word."""
    text = (Path(__file__).parents[2] / "configs" / "README.md").read_text()
    for section, info in RunConfig.model_fields.items():
        for name, field in info.annotation.model_fields.items():  # type: ignore[union-attr]
            (row,) = [line for line in text.splitlines() if line.startswith(f"| `{section}.{name}` |")]
            assert row.endswith(f"| {field.description} |")


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


@pytest.mark.parametrize(
    ("section", "old", "value", "refusal"),
    [
        ("model", "output_head", "4bit", "model.output_head was renamed to model.lm_head"),
        ("model", "minimum_4bit_share", 0.5, "model.minimum_4bit_share was renamed to model.min_quantized_fraction"),
        ("model", "keep_quantized", True, "model.keep_quantized was renamed to model.cache_quantized"),
        ("model", "embeddings", "host", "model.embeddings: its value host was renamed to cpu"),
        ("adapter", "targets", ["q_proj"], "adapter.targets was renamed to adapter.target_modules"),
        ("data", "heldout", 0.1, "data.heldout was renamed to data.eval"),
        ("data", "learn", "all", "data.learn was renamed to data.train_on"),
        ("data", "workers", 2, "data.workers was removed: rows are prepared by one process"),
        ("training", "batch_size", 8, "training.batch_size was renamed to training.global_batch_size"),
        ("training", "kept_layers", 2, "training.kept_layers was renamed to training.uncheckpointed_layers"),
        ("training", "offload_every", 2, "training.offload_every was renamed to training.offload_every_n_layers"),
        (
            "training",
            "activations",
            "recompute",
            "training.activations was renamed to training.activation_checkpointing, and its value recompute was "
            "renamed to full",
        ),
        (
            "training",
            "activation_checkpointing",
            "tile",
            "training.activation_checkpointing: its value tile was renamed to tiled",
        ),
    ],
)
def test_an_old_key_is_refused_with_its_new_name(section: str, old: str, value: object, refusal: str) -> None:
    raw = {**MINIMAL, section: {**MINIMAL.get(section, {}), old: value}}
    message = problems_of(raw)
    assert refusal in message
    assert message.count("renamed") == refusal.count("renamed")
    assert "unknown key" not in message


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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank=010", "010 is the number 8 in YAML. Write the number you mean in plain digits"),
        ("adapter.rank=-0777", "-0777 is the number -511"),
        ("adapter.rank=08", "adapter.rank: should be a number in plain digits, such as 8 (found '08')"),
        ("training.seed=1:30", "1:30 is the number 90"),
        ("adapter.alpha=1:30.5", "1:30.5 is the number 90.5"),
        ("optimizer.learning_rate=[1, 010]", "010 is the number 8"),
        ("adapter.rank=true", "adapter.rank: should be a number"),
        (
            "training.epochs=yes",
            "training.epochs: should be a number; YAML reads yes, no, on and off as true and false",
        ),
        ("optimizer.weight_decay=off", "optimizer.weight_decay: should be a number"),
        ("data.eval=on", "data.eval: should be a number"),
        ("training.micro_batch_tokens=on", "training.micro_batch_tokens: should be a number"),
        ("training.max_steps=no", "training.max_steps: should be a number"),
        ("adapter.rank=1e2", "adapter.rank: input should be a valid integer"),
        ("adapter.rank=2,048", "adapter.rank: input should be a valid integer"),
    ],
)
def test_a_number_that_could_mean_another_is_refused(override: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert said in " ".join(str(caught.value).split())


def test_numbers_of_one_meaning_are_taken_as_they_are_written(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    taken = {
        **{"adapter.rank=0x10": 16, "adapter.rank=16.0": 16, 'adapter.rank="12"': 12, "training.seed=0": 0},
        **{"training.max_steps=1_000": 1000, "optimizer.learning_rate=1e-5": 1e-5, "adapter.alpha=16": 16.0},
        **{"training.deterministic=yes": True, "training.max_steps=null": None, "adapter.dropout=.05": 0.05},
    }
    for override, value in taken.items():
        section, _, name = override.partition("=")[0].partition(".")
        assert getattr(getattr(load_config(path, [override]), section), name) == value


@pytest.mark.parametrize(
    ("override", "advice", "value"),
    [
        ("model.revision=1234567", 'model.revision="1234567"', "1234567"),
        ("model.revision=2026-01-02", 'model.revision="2026-01-02"', "2026-01-02"),
        ("model.revision=12e45", None, "12e45"),
        ("model.revision=1.50", 'model.revision="1.50"', "1.50"),
        ("data.columns={prompt: 0, completion: Antwort}", None, {"prompt": "0", "completion": "Antwort"}),
        ("data.header=[id, no, yes]", 'data.header=["id", "no", "yes"]', ["id", "no", "yes"]),
        ("data.columns={prompt: it's, completion: 3}", None, {"prompt": "it's", "completion": "3"}),
        ("adapter.target_modules=[q_proj, on]", None, ["q_proj", "on"]),
    ],
)
def test_text_that_yaml_takes_for_something_else_is_refused_with_the_quotes_to_write(
    override: str, advice: str | None, value: object, tmp_path: Path
) -> None:
    path = write(tmp_path / "c.yaml", MINIMAL)
    section, _, name = override.partition("=")[0].partition(".")
    if override == "model.revision=12e45":  # text already
        assert load_config(path, [override]).model.revision == value
        return
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    (pasted,) = shlex.split(str(caught.value).partition("put it in quotes: ")[2].splitlines()[0])
    assert advice in (None, pasted)
    assert getattr(getattr(load_config(path, [pasted]), section), name) == value


def test_text_in_a_file_is_quoted_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "shared: &shared {train: x}\nmodel: {name: a/b, revision: 0x1f}\ndata: {<<: *shared, header: [a, on]}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "'model.revision=\"0x1f\"'" in str(caught.value)
    assert '\'data.header=["a", "on"]\'' in str(caught.value)
