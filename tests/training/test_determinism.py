"""training.deterministic: a run asks torch for an order of sums, repeats bit for bit, and leaves torch as it was."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from tiny_runs import final_adapter, quiet

from qlora_trainer.common.errors import ConfigError, TrainingError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.directory import run_renderer
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.determinism import deterministic_algorithms, set_up_cublas
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
SETTING = "CUBLAS_WORKSPACE_CONFIG"


def settings_of_torch() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch._C._get_deterministic_fill_uninitialized_memory(),
    )


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    before = settings_of_torch()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch._C._set_deterministic_fill_uninitialized_memory(before[2])


def assert_same(found: Run, wanted: Run) -> None:
    tensors = final_adapter(found.directory)
    for name, tensor in final_adapter(wanted.directory).items():
        assert torch.isfinite(tensor).all()
        assert torch.equal(tensors[name], tensor), name


def config_of(tiny_config: Config, output: str, level: str = "full", *, deterministic: bool = True) -> RunConfig:
    training = {"activation_checkpointing": level, "max_steps": 4, "deterministic": deterministic}
    return tiny_config(output, adapter={"dropout": 0.1}, training=training)


@pytest.mark.slow
def test_a_deterministic_run_resumes_to_the_same_bits_and_leaves_torch_as_it_was(tiny_config: Config) -> None:
    before, seen = settings_of_torch(), set()
    whole = start_run(config_of(tiny_config, "whole"))
    assert whole.train(lambda record: seen.add(settings_of_torch()))
    assert seen == {(True, False, False)}, "an error where an operation cannot be, and no time for filling memory"
    assert settings_of_torch() == before
    first = start_run(config_of(tiny_config, "parts"))
    first.train(quiet, stop_after=2)
    assert settings_of_torch() == before
    second = resume_run(first.directory)
    assert second.state.step == 2
    assert second.config.training.deterministic
    second.train(quiet)
    assert_same(second, whole)


@pytest.mark.parametrize("level", slow_but(["none", "full", "offload", "tiled"], "tiled"))
def test_no_operation_reads_memory_that_nothing_has_written(tiny_config: Config, level: str) -> None:
    """With all memory that a tensor begins with filled by NaN, a run has the same bits: filling is not needed."""
    plain = start_run(config_of(tiny_config, "plain", level, deterministic=False))
    plain.train(quiet)
    torch.use_deterministic_algorithms(True)
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    assert torch.empty(3).isnan().all()
    filled = start_run(config_of(tiny_config, "filled", level, deterministic=False))
    filled.train(quiet)
    assert settings_of_torch() == (True, False, True), "what a caller has asked for stays, where the run asks nothing"
    assert_same(filled, plain)


def test_an_error_leaves_torch_as_it_was_too() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = settings_of_torch()
    with pytest.raises(KeyError), deterministic_algorithms(True):
        raise KeyError
    assert settings_of_torch() == before


def test_an_operation_that_cannot_be_deterministic_is_named_with_the_way_out() -> None:
    """put_ is such a one on every device."""
    with (
        pytest.raises(TrainingError, match=r"put_ does not have a deterministic .*training\.deterministic=false"),
        deterministic_algorithms(True),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))


def test_cublas_is_set_up_before_cuda_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv(SETTING, "to be put back")  # so that the test leaves the environment as it was
    monkeypatch.delenv(SETTING)
    set_up_cublas("cpu")
    assert SETTING not in os.environ
    set_up_cublas("auto")
    assert os.environ[SETTING] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    set_up_cublas("cuda")  # another run of the process
    monkeypatch.setenv(SETTING, ":16:8")
    set_up_cublas("cuda")
    assert os.environ[SETTING] == ":16:8", "the user's own, as good"


@pytest.mark.parametrize(("setting", "found"), [(None, "this process has used it"), (":4096:2", "is ':4096:2'")])
def test_a_run_that_cublas_would_not_repeat_is_refused_with_what_to_do(
    setting: str | None, found: str, monkeypatch: pytest.MonkeyPatch, tiny_config: Config
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv(SETTING, raising=False)
    if setting:
        monkeypatch.setenv(SETTING, setting)
    config = tiny_config(model={"device": "auto"}, training={"deterministic": True})
    with pytest.raises(ConfigError, match=rf"{found}.*:4096:8"):
        start_run(config)
    assert not Path(config.training.output_dir).exists()


@pytest.mark.parametrize("deterministic", [False, True])
def test_only_a_run_on_cuda_that_may_differ_says_so(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    original = runs.load_base

    def on_cuda(*arguments: Any) -> Any:
        base = original(*arguments)
        base.device = torch.device("cuda")
        return base

    monkeypatch.setattr(runs, "load_base", on_cuda)
    monkeypatch.setattr(runs, "environment", lambda *arguments: {})
    config = config_of(tiny_config, "run", deterministic=deterministic)
    warnings = runs._assemble(config, *_assembled_from(config), progress=lambda *said: None).warnings
    assert any("set training.deterministic=true" in warning for warning in warnings) is not deterministic


def _assembled_from(config: RunConfig) -> tuple[Path, ModelDirectory, Renderer, torch.device]:
    model = ModelDirectory.open(Path(config.model.name))
    renderer = run_renderer(config, runs.run_tokenizer(model, config.adapter), model)
    return Path(config.training.output_dir), model, renderer, runs._run_device(config)


def test_turning_it_on_or_off_in_a_run_is_allowed_and_reported(tiny_config: Config) -> None:
    run = start_run(config_of(tiny_config, "run", deterministic=False))
    run.train(quiet, stop_after=2)
    resumed = resume_run(run.directory, ["training.deterministic=true"])
    assert any("training.deterministic was False and is True" in warning for warning in resumed.warnings)
