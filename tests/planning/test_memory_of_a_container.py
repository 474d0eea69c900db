"""Promises of a container: what may be used of it is planned for, and what does not fit is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from qlora_trainer.common import machine
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import InsufficientMemoryError
from qlora_trainer.config.schema import ModelConfig, RunConfig
from qlora_trainer.model.load import load_base_model, load_dense_model
from qlora_trainer.planning import fit as fitting
from qlora_trainer.training.memory.activations import Level, Policy, spare_host_memory
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


@pytest.fixture(params=["version 1", "version 2"])
def container(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives this process a limit by the files of control groups, on a machine with a TiB that is all available."""
    root = tmp_path / "cgroup"
    monkeypatch.setattr(machine, "CGROUP_ROOT", root)
    monkeypatch.setattr(machine, "CGROUP_LIST", tmp_path / "list")
    memory = SimpleNamespace(total=2**40, available=2**40)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    def limit(allowed: int, used: int) -> None:
        is_first = request.param == "version 1"
        (tmp_path / "list").write_text("7:memory:/docker/abc\n" if is_first else "0::/\n")
        directory = root / "memory" if is_first else root
        directory.mkdir(parents=True, exist_ok=True)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_first else ("memory.max", "memory.current")
        for name, value in zip(names, (allowed, used), strict=True):
            (directory / name).write_text(f"{value}\n")

    return limit


def test_what_is_offloaded_has_the_space_that_a_container_is_allowed(container: Callable[..., None]) -> None:
    before = spare_host_memory()
    container(12 * 2**30, used=4 * 2**30)
    assert (before, spare_host_memory()) == (3 * 2**38, 6 * 2**30), "three quarters of what is free"


@pytest.mark.slow
@pytest.mark.usefixtures("plans_once")
def test_a_run_is_planned_for_and_refused_by_the_memory_of_its_container(
    tiny_config: Config,
    tiny_llama: Path,
    fitting_in: list[tuple[int, Level]],
    monkeypatch: pytest.MonkeyPatch,
    container: Callable[..., None],
) -> None:
    monkeypatch.setattr(fitting, "SMALLEST_PLANNED", 0)
    config = tiny_config(model={"device": "cpu"}, data={"max_length": 512})
    for needed, level in fitting_in:
        free = math.ceil(needed / (1 - fitting.HOST_RESERVE)) + 1
        container(2**30 + free, used=2**30)
        plan = fitting.check_fits_here(ModelDirectory.open(tiny_llama), config, torch.device("cpu"))
        assert plan is not None
        assert plan.policy == Policy(level)
    assert fitting.memory_here(config) == 2**30 + free, "of the last"
    container(2**30, used=2**30 - 2**20)
    with pytest.raises(InsufficientMemoryError, match=r"and 0\.00 GiB are free"):
        fitting.check_fits_here(ModelDirectory.open(tiny_llama), config, torch.device("cpu"))


def test_a_base_is_refused_by_the_memory_of_its_container(tiny_llama: Path, container: Callable[..., None]) -> None:
    container(2**30, used=2**30 - 2**16)
    settings = ModelConfig(name=str(tiny_llama), device="cpu")
    with pytest.raises(InsufficientMemoryError, match=r"The base takes about .* and cpu has 0\.00 GiB free"):
        load_base_model(ModelDirectory.open(tiny_llama), settings, user_cache())
    with pytest.raises(InsufficientMemoryError, match="in fp32 takes"):
        load_dense_model(ModelDirectory.open(tiny_llama), torch.device("cpu"))
