"""Fixtures: tiny model directories and rows, a cache of its own for every test, and the shared real data."""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
import torch
from tiny_models import make_model_directory

from qlora_kernels import compiled, nf4  # noqa: F401 - nf4 defines its operations
from qlora_kernels.registry import other_versions
from qlora_trainer.cli import app as cli
from qlora_trainer.cli.app import prefer_expandable_segments
from qlora_trainer.common import machine
from qlora_trainer.config.adapter_schema import settings_of_others
from qlora_trainer.config.load import make_config, save_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.merging import plain_check, plain_verification
from qlora_trainer.training.memory.managed_memory import paging_refusal

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "good",
    "wizards",
    "mix",
    "black",
    "quartz",
    "and",
    "vinegar",
]

_FILLED = "buffer[:] = value"
_TORCH = """
from numpy import empty, float32, zeros
class device:
    def __init__(self, kind, index): pass
class cuda:
    set_device = synchronize = print
"""

if torch.cuda.is_available():  # for deterministic runs, before CUDA is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
prefer_expandable_segments()  # as the command line does; torch reads it when CUDA is first used
torch.set_num_threads(1)  # tests run side by side, and threads that wait for each other are slower than none

# A busy machine fails no test: no example has a deadline, nor has making it. CI tries the same examples each time.
hypothesis.settings.register_profile(
    "qlora",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    derandomize="CI" in os.environ,
)
hypothesis.settings.load_profile("qlora")


def pytest_collection_finish() -> None:
    """Leave the objects of all that was imported out of garbage collection, which each load of a base does once."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Find a file of real rows: in tests/data/rows, else next to the repository or where QLORA_TEST_DATA says."""
    elsewhere = Path(os.environ.get("QLORA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

    def find(name: str) -> Path:
        for folder in (Path(__file__).parent / "data" / "rows", elsewhere):
            if (folder / name).is_file():
                return folder / name
        pytest.skip(f"the data set {Path(name).parent} is not at {elsewhere}; set QLORA_TEST_DATA to where it is")

    return find


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def plain_transformers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge asks plain transformers in this process, without seconds of imports, but where a test is marked."""
    if not request.node.get_closest_marker("fresh_process"):
        monkeypatch.setattr(plain_verification, "run_job", plain_check.check)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random model by family, made once a session."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            made[family] = make_model_directory(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return directory


@pytest.fixture(scope="session")
def tiny_llama(tiny_models: Callable[[str], Path]) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="session")
def deep_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of five layers, where what is done for every second or third differs."""
    return make_model_directory(tmp_path_factory.mktemp("models") / "deep", "llama", num_hidden_layers=5)


@pytest.fixture
def own_base(tmp_path: Path) -> Path:
    """A model directory that a test may change."""
    return make_model_directory(tmp_path / "own-base")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty chat rows of uneven length."""
    path = tmp_path / "rows.jsonl"
    lines = []
    for index in range(20):
        said = [WORDS[(index * 7 + k * 3) % len(WORDS)] for k in range(3 + index % 10)]
        answer = [WORDS[(index * 5 + k) % len(WORDS)] for k in range(1 + (index * 3) % 7)]
        messages = [{"role": "user", "content": " ".join(said)}, {"role": "assistant", "content": " ".join(answer)}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tiny_config(tmp_path: Path, tiny_llama: Path, rows: Path) -> Callable[..., RunConfig]:
    """A config of a short run on a tiny model; keyword arguments are sections to change: adapter={"rank": 2}."""

    def config(output: str = "run", **changes: dict[str, Any]) -> RunConfig:
        # A torch built for CUDA without a card would add a warning to each run of `auto`.
        wants_card = torch.version.cuda is None or torch.cuda.is_available()
        raw: dict[str, dict[str, Any]] = {
            "model": {"name": str(tiny_llama), "device": "auto" if wants_card else "cpu"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": str(rows), "eval": 0.2, "max_length": 128},
            "optimizer": {"learning_rate": 5e-3},
            "training": {
                "output_dir": str(tmp_path / output),
                "global_batch_size": 3,
                "max_steps": 8,
                "evaluate_every": 4,
                "save_every": 4,
            },
            "evaluation": {"samples": 2, "max_new_tokens": 4},
        }
        others = settings_of_others(changes.get("adapter", {}).get("kind", "lora"))
        raw["adapter"] = {name: value for name, value in raw["adapter"].items() if name not in others}
        for section, fields in changes.items():
            raw[section] = {**raw.get(section, {}), **fields}
        return make_config(raw)

    return config


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No C++ compiler, and nothing made before."""
    monkeypatch.delenv("QLORA_KERNELS", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled.load_library.cache_clear()
    with other_versions("cpu", {"dequantize_nf4": None, "quantize_nf4": None}):
        yield
    compiled.load_library.cache_clear()


@pytest.fixture
def nothing_tried() -> Iterator[None]:
    """Whether the card pages is tried anew, and what a test was answered is forgotten."""
    paging_refusal.cache_clear()
    yield
    paging_refusal.cache_clear()


@pytest.fixture
def bitsandbytes_of_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_tried: None
) -> Callable[..., Path]:
    """Puts a package `bitsandbytes` of these two functions before the child's own; what it was asked goes to a file.

    And for speed a `torch` of the few names that a child needs, unless it shall be the real one.
    """
    package = tmp_path / "child" / "bitsandbytes"

    def write(get_paged: str, fill: str = _FILLED, real_torch: bool = False) -> Path:
        package.mkdir(parents=True)
        if not real_torch:
            (package.parent / "torch.py").write_text(_TORCH)
        asked = package / "asked"
        (package / "__init__.py").write_text("import torch\ntorch.cuda.synchronize = torch.cuda.set_device = print\n")
        (package / "functional.py").write_text(
            "import ctypes, os, signal, sys, time, torch\n"
            "def get_paged(*shape, dtype, device):\n"
            f"    open({str(asked)!r}, 'a').write(str(device) + '\\n')\n"
            f"    {get_paged}\n"
            "def fill(buffer, value):\n"
            f"    {fill}\n"
        )
        path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
        monkeypatch.setenv("PYTHONPATH", path)
        return asked

    return write


@pytest.fixture
def qlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlora", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, " ".join(printed.err.split())

    return run


@pytest.fixture
def config_file(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    save_config(tiny_config(), tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of /sys/fs/cgroup, on a machine with 64 GiB of which 40 are available."""
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "CGROUP_LIST", tmp_path / "list")
    memory = type(psutil.virtual_memory())(
        **{**psutil.virtual_memory()._asdict(), "total": 64 * 2**30, "available": 40 * 2**30}
    )
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return tmp_path / "cgroup"
