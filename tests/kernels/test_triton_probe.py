"""What Triton needs besides its package is found missing before it is needed, and what brings it is reported.

Each case runs in a process of its own, with a libcuda.so.1 that does nothing: Triton compiles, assembles and launches
as it does with a card.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from fake_libcuda import make_libcuda
from marks import needs_compiler

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    needs_compiler("gcc"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on: TRITON_INTERPRET=1"),
]
PACKAGE = f"python{sysconfig.get_python_version()}-dev"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case: `taken` is "fast", or why a kernel in Triton cannot be had; what doctor says, and a run's warnings."""
    folder = tmp_path_factory.mktemp("probe")
    make_libcuda(folder / "lib")
    (folder / "bin").mkdir()
    (folder / "file").write_text("no folder")
    fails, too_old = folder / "fails", folder / "ptxas"
    fails.write_text("#!/bin/sh\necho 'cc1: fatal error: cannot execute' >&2\nexit 1\n")
    too_old.write_text(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo 'Cuda compilation tools, release 12.8, V12.8.93'; exit; fi\n"
        "echo \"ptxas fatal   : Value 'sm_86' is not defined for option 'gpu-name'\" >&2\nexit 1\n"
    )
    for program in (fails, too_old):
        program.chmod(0o755)

    def fresh(name: str, **environment: str | None) -> dict[str, str | None]:
        return {"TRITON_CACHE_DIR": str(folder / name), **environment}

    kept = str(folder / "kept")
    cases = {
        "all there": {"TRITON_CACHE_DIR": kept},
        "all there, and in the cache": {"TRITON_CACHE_DIR": kept},
        "no compiler, but a cache": {"TRITON_CACHE_DIR": kept, "CC": str(fails)},
        "no compiler": fresh("1", PATH=str(folder / "bin")),
        "CC names nothing": fresh("2", CC="/nowhere/gcc"),
        "failing compiler": fresh("3", CC=str(fails)),
        "no headers": fresh("4", HEADERS=str(folder)),
        "no libcuda": fresh("5", LD_LIBRARY_PATH=None),
        "cache below a file": fresh("file/cache"),
        "home below a file": {"TRITON_CACHE_DIR": None, "TRITON_HOME": str(folder / "file")},
        "no assembler for the card": fresh("6", TRITON_PTXAS_PATH=str(too_old)),
    }
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder / "lib")}
    for name in ("CC", "TRITON_LIBCUDA_PATH", "TRITON_HOME", "QLORA_KERNELS"):
        environment.pop(name, None)
    command = [sys.executable, str(Path(__file__).parents[1] / "fake_libcuda.py"), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list((folder / "kept").glob("probe-*"))
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.replace(str(folder), "FOLDER"))
    return found


@pytest.fixture(scope="module")
def taken(answers: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {case: answer["taken"] for case, answer in answers.items()}


def test_kernels_are_taken_where_all_is_there(taken: dict[str, str]) -> None:
    assert taken["all there"] == taken["all there, and in the cache"] == "fast"


def test_doctor_and_a_run_say_what_is_missing_in_every_case(answers: dict[str, dict[str, Any]]) -> None:
    for case, answer in answers.items():
        if answer["taken"] == "fast":
            assert (answer["doctor"], answer["warnings"]) == ("ok: ", []), case
            continue
        assert answer["doctor"] == f"note: {answer['taken']}", case
        (warning,) = answer["warnings"]
        assert warning.startswith("Plain torch takes the place of faster kernels for "), case
        assert "rotate" in warning.partition(":")[0], case
        assert warning.endswith(f": {answer['taken']}."), case


def test_a_missing_compiler_is_found_behind_a_full_cache(taken: dict[str, str]) -> None:
    """Triton 3.6 compiles a launcher for each kernel; where it needs no compiler any more, none is asked for."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        assert taken["no compiler, but a cache"].startswith("Triton's C compiler FOLDER/fails fails")
    else:
        assert taken["no compiler, but a cache"] == "fast"


# By case, what is said of it. No part of a test's name, as it names the Python here.
SAID = {
    "no compiler": f"a C compiler, and there is none: install gcc (Debian, Ubuntu: apt install gcc {PACKAGE})",
    "CC names nothing": "CC names /nowhere/gcc, which cannot be run: unset CC, and install gcc",
    "failing compiler": "Triton's C compiler FOLDER/fails fails, and says why above: unset CC, and install gcc",
    "no headers": f"has no Python.h: install them (Debian, Ubuntu: apt install {PACKAGE})",
    "no libcuda": "Triton does not find libcuda.so.1: install the NVIDIA driver and run ldconfig as root, or set ",
    "cache below a file": "Triton's cache FOLDER/file/cache cannot be written (Not a directory): set TRITON_CACHE_",
    "home below a file": "Triton's cache FOLDER/file/.triton/cache cannot be written (Not a directory): set ",
    "no assembler for the card": "Triton cannot compile for this card or not launch there (PTXASError: ",
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_missing_is_said_with_what_brings_it(case: str, taken: dict[str, str]) -> None:
    assert SAID[case] in taken[case]
