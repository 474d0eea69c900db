"""The config's promises: every problem is reported at once, with the near miss, and nothing unknown is swallowed."""

import shlex
from pathlib import Path

import pytest
from minimal_config import MINIMAL, problems_of, write

from qlora_trainer.common.errors import ConfigError, FileMissingError
from qlora_trainer.config.data_schema import Source, SourceFile
from qlora_trainer.config.load import load_config, make_config, save_config


def test_a_misspelled_key_is_refused_with_the_near_miss() -> None:
    message = problems_of({**MINIMAL, "adapter": {"rnak": 8}})
    assert "unknown key adapter.rnak; did you mean adapter.rank?" in message


def test_a_key_in_the_wrong_section_is_reported_where_it_belongs() -> None:
    message = problems_of({**MINIMAL, "training": {"learning_rate": 1e-4}})
    assert "did you mean optimizer.learning_rate?" in message


def test_a_misspelled_section_is_refused_with_the_near_miss() -> None:
    assert "unknown key optimzer; did you mean optimizer?" in problems_of({**MINIMAL, "optimzer": {}})


def test_all_problems_are_reported_at_once() -> None:
    message = problems_of({"model": {}, "data": {"train": "x", "max_length": "long"}, "training": {"batchsize": 1}})
    assert "model.name is missing" in message
    assert "data.max_length" in message
    assert "'long'" in message
    assert "did you mean training.global_batch_size?" in message
    assert "3 problems" in message


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


def test_every_shipped_config_is_valid() -> None:
    shipped = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert shipped
    for path in shipped:
        load_config(path)


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
        ("data.header=[id, no, yes]", 'data.header=[id, "no", "yes"]', ["id", "no", "yes"]),
        ("data.columns={prompt: yes, completion: 2026-01-02}", None, {"prompt": "yes", "completion": "2026-01-02"}),
        ("data.roles={7: user, 0x1f: assistant, on: tool}", None, {"7": "user", "0x1f": "assistant", "on": "tool"}),
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
    assert "'data.header=[a, \"on\"]'" in str(caught.value)
