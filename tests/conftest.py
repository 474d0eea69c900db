"""Fixtures: tiny model directories and rows, a cache of its own for every test, and the shared real data."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model_directory

from qlora_trainer.caching_allocator import prefer_expandable_segments
from qlora_trainer.config import make_config
from qlora_trainer.settings import RunConfig

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

if torch.cuda.is_available():  # for deterministic runs, before CUDA is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
prefer_expandable_segments()  # as the command line does; torch reads it when CUDA is first used
torch.set_num_threads(1)  # tests run side by side, and threads that wait for each other are slower than none


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data files beside the repository, or where QLORA_TEST_DATA says."""
    directory = Path(os.environ.get("QLORA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not directory.is_dir():
        pytest.skip(f"no test data at {directory}; set QLORA_TEST_DATA to where it is")
    return directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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
        raw: dict[str, dict[str, Any]] = {
            "model": {"name": str(tiny_llama)},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"train": str(rows), "heldout": 0.2, "max_length": 128},
            "optimizer": {"learning_rate": 5e-3},
            "training": {
                "output_dir": str(tmp_path / output),
                "batch_size": 3,
                "max_steps": 8,
                "evaluate_every": 4,
                "save_every": 4,
            },
            "evaluation": {"samples": 2, "max_new_tokens": 4},
        }
        for section, fields in changes.items():
            raw[section] = {**raw.get(section, {}), **fields}
        return make_config(raw)

    return config
