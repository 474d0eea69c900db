"""Promises of starting a run: what it writes down at once, what it refuses first, and what it says of its card."""

import datetime
import errno
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from marks import slow_but
from spying import noting
from tiny_runs import no_load
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError, DiskError
from qlora_trainer.common.progress import silent
from qlora_trainer.config.load import dump_config, make_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs import checkpoint
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.directory import run_renderer
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


def test_skipped_rows_are_listed_in_the_run_directory(tiny_config: Config, rows: Path) -> None:
    rows.write_text('{"messages": []}\n' + rows.read_text())
    run = start_run(tiny_config(data={"on_bad_row": "skip"}))
    (line,) = (run.directory / "skipped_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "rows.jsonl, line 1"
    assert [warning for warning in run.warnings if "1 bad row was skipped" in warning]


def test_a_run_that_cannot_write_its_first_checkpoint_leaves_no_directory(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = tiny_config()
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(DiskError, match="step 0"):
        start_run(config)
    directory = Path(config.training.output_dir)
    assert [path for path in directory.parent.iterdir() if directory.name in path.name] == []


def test_a_run_on_a_cpu_has_one_arena_before_it_prepares_data_and_is_trimmed_when_the_base_is_there(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("use_one_arena", "prepare_data", "load_base", "trim_freed_memory", "build_state"):
        monkeypatch.setattr(runs, name, noting(getattr(runs, name), lambda *_, name=name, **__: calls.append(name)))
    expected = ["use_one_arena", "prepare_data", "load_base", "trim_freed_memory", "build_state"]
    run = start_run(tiny_config(model={"device": "cpu"}))
    assert calls == expected
    calls.clear()
    resume_run(run.directory)
    assert calls == expected


def test_a_run_on_a_card_leaves_the_allocator_of_the_host_as_it_is(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        pass

    def stop(*_: object) -> None:
        raise ReachedError

    monkeypatch.setattr(runs, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(runs, "resolve_model", stop)
    monkeypatch.setattr(runs, "use_one_arena", lambda: pytest.fail("asked for"))
    with pytest.raises(ReachedError):
        start_run(tiny_config())


@pytest.mark.slow
def test_a_hub_name_is_recorded_with_the_commit_it_was(
    tiny_config: Config, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--model" / "snapshots" / commit
    shutil.copytree(tiny_llama, snapshot)
    asked = []

    def resolve(name: str, revision: str | None, *rest: object) -> ModelDirectory:
        asked.append((name, revision))
        return ModelDirectory.open(snapshot)

    monkeypatch.setattr(runs, "resolve_model", resolve)
    run = start_run(tiny_config(model={"name": "owner/model"}))
    assert yaml.safe_load((run.directory / "config.yaml").read_text())["model"]["revision"] == commit
    resume_run(run.directory)
    assert asked == [("owner/model", None), ("owner/model", commit)]
    local = start_run(tiny_config("local", model={"name": str(snapshot)}))
    assert local.config.model.revision is None


def test_a_tokenizer_with_tokens_beyond_the_embedding_is_refused_before_the_base_is_loaded(
    tiny_config: Config, own_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own_base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 64}))
    monkeypatch.setattr(runs, "load_base", no_load)
    with pytest.raises(DataError, match="has only 64"):
        start_run(tiny_config(model={"name": str(own_base)}))


@pytest.fixture
def run_as_on_a_card(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The warnings of a run whose config finds a card, by torch's device functions; its base lies in host memory."""
    original = runs.load_base

    def on_the_host(model: ModelDirectory, settings: Any, *rest: Any) -> Any:
        with pytest.MonkeyPatch.context() as no_card:
            no_card.setattr(torch.cuda, "is_available", lambda: False)
            return original(model, settings, *rest)

    def warnings(name: str, device: str = "auto") -> list[str]:
        config = tiny_config(f"{name}-{device}", model={"device": device}, optimizer={"name": name})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(runs, "load_base", on_the_host)
        monkeypatch.setattr(runs, "check_fits_here", lambda *arguments: None)  # would plan for the card's memory
        monkeypatch.setattr(runs, "pace_here", lambda *arguments: None)  # would ask for the card's properties
        model = ModelDirectory.open(Path(config.model.name))
        renderer = run_renderer(config, runs.run_tokenizer(model, config.adapter), model)
        return runs._assemble(config, model.path, model, renderer, runs._run_device(config), silent).warnings

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_86"])
    return warnings


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("name", slow_but(["paged_adamw_32bit", "paged_adamw_8bit", "adamw"], "paged_adamw_32bit"))
def test_a_run_on_a_card_that_refuses_to_page_says_so_with_what_it_said(
    run_as_on_a_card: Callable[..., list[str]],
    bitsandbytes_of_the_child: Callable[..., Path],
    name: str,
    works: bool,
) -> None:
    end = "print('Error operation not supported at line 5', flush=True); ctypes.CDLL(None).exit(1)"
    asked = bitsandbytes_of_the_child("return torch.empty(shape, dtype=dtype)" if works else end)
    reported = [warning for warning in run_as_on_a_card(name) if "not paged" in warning]
    assert asked.exists() == (name != "adamw")
    if works or name == "adamw":
        assert reported == []
        return
    (warning,) = reported
    assert "Error operation not supported at line 5" in warning
    assert "a lower adapter.rank" in warning
    assert ("optimizer.name=paged_adamw_8bit" in warning) == (name == "paged_adamw_32bit")
    assert not any("not paged" in warning for warning in run_as_on_a_card(name, device="cpu"))


def test_a_run_under_wsl_says_that_nothing_is_paged(
    run_as_on_a_card: Callable[..., list[str]],
    bitsandbytes_of_the_child: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = bitsandbytes_of_the_child("return torch.empty(shape, dtype=dtype)")
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    (warning,) = [warning for warning in run_as_on_a_card("paged_adamw_32bit") if "not paged" in warning]
    assert "WSL does not let host and card use managed memory at the same time" in warning
    assert not asked.exists(), "no child is needed for that"


def test_the_day_a_run_starts_is_recorded_where_the_template_writes_it(tiny_config: Config) -> None:
    config = tiny_config()
    model = ModelDirectory.open(Path(config.model.name))
    assert runs._with_date(config, run_renderer(config, tiny_tokenizer("llama3"), model)) == config
    dated = runs._with_date(config, run_renderer(config, tiny_tokenizer("llama3_2"), model))
    assert dated.data.template_date == datetime.date.today()
    named = tiny_config(data={"template_date": "2024-02-29"})
    assert runs._with_date(named, run_renderer(named, tiny_tokenizer("llama3_2"), model)) == named
    assert make_config(yaml.safe_load(dump_config(dated))) == dated
