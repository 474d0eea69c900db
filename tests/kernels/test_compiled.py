"""C++ compiled at its first use: kept, shared, and given up where it cannot be made."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from marks import needs_compiler

from qlora_kernels import compiled
from qlora_kernels.compiled import load_library
from qlora_kernels.registry import UnavailableError


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    load_library.cache_clear()
    return tmp_path / "kept" / "torch_extensions" / "qlora_kernels"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


@needs_compiler()
def test_a_file_is_compiled_once_and_kept(source: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_library(source).answer() == 42
    (kept,) = own_folder.iterdir()
    load_library.cache_clear()
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    assert load_library(source).answer() == 42
    assert list(own_folder.iterdir()) == [kept]


@needs_compiler()
def test_changed_code_is_compiled_anew(source: Path) -> None:
    assert load_library(source).answer() == 42
    source.write_text('extern "C" int answer() { return 43; }\n')
    load_library.cache_clear()
    assert load_library(source).answer() == 43


@needs_compiler()
def test_another_processor_gets_its_own_library(
    source: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_library(source)
    load_library.cache_clear()
    monkeypatch.setattr(compiled, "_processor", lambda: b"another")
    load_library(source)
    assert len(list(own_folder.iterdir())) == 2


COUNT_THREADS = """
import pathlib, sys
if sys.argv[2]:
    __import__(sys.argv[2])
import torch
from qlora_kernels.compiled import load_library
library = load_library(pathlib.Path(sys.argv[1]))
for count in (1, 3):
    torch.set_num_threads(count)
    print(library.threads())
maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
print(len({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}))
"""


@needs_compiler()
@pytest.mark.parametrize(("package", "runtimes"), [("", "1"), ("sentencepiece", "2")])
def test_what_is_compiled_takes_part_in_torchs_threads(package: str, runtimes: str, source: Path) -> None:
    """In a process of its own, also where a package that was imported before torch brings an OpenMP of its own."""
    source.write_text(
        "#ifdef _OPENMP\n#include <omp.h>\n"
        'extern "C" int threads() { int n = 0;\n#pragma omp parallel\n#pragma omp single\n'
        "n = omp_get_num_threads(); return n; }\n"
        '#else\nextern "C" int threads() { return 0; }\n#endif\n'
    )
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", COUNT_THREADS, str(source), package]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "3", runtimes]


@needs_compiler()
def test_code_that_does_not_compile_says_why(source: Path, own_folder: Path) -> None:
    source.write_text("int answer( {\n")
    with pytest.raises(UnavailableError, match=r"cannot compile answer\.cpp: .*error"):
        load_library(source)
    assert list(own_folder.iterdir()) == []


def test_without_a_compiler_the_reason_is_reported(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match=r"no C\+\+ compiler here: install"):
        load_library(source)


@needs_compiler()
def test_a_folder_that_cannot_be_written_is_reported(source: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file in its place")
    with pytest.raises(UnavailableError, match=r"cannot be kept or opened"):
        load_library(source)


@needs_compiler()
def test_a_damaged_library_is_reported(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_compile", lambda command, source, library: library.write_bytes(b"no library"))
    with pytest.raises(UnavailableError, match=r"cannot be kept or opened"):
        load_library(source)


@pytest.mark.slow
@needs_compiler()
def test_a_killed_compilation_is_waited_for_by_nobody(source: Path, own_folder: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 3600\n")
    slow.chmod(0o755)
    program = "import sys, pathlib, qlora_kernels.compiled as c; c.load_library(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"CXX": str(slow)}
    process = subprocess.Popen([sys.executable, "-c", program, source], env=environment, start_new_session=True)
    while not own_folder.is_dir() or not list(own_folder.iterdir()):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert isinstance(load_library(source), ctypes.CDLL)
