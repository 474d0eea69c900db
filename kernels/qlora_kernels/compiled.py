"""Compile the C++ of this package at its first use, for the very processor, and keep the library.

The compiler is run directly and the library is opened with ctypes: such a file needs no header of torch, so it is
compiled in two seconds and fits every version. (torch's own extension builder was measured first; see
docs/decisions/0016.) A library is written under a temporary name and renamed, so processes may compile at the same time
and a kill leaves nothing behind that anyone waits for. It shares torch's pool of threads by linking to the OpenMP
runtime that torch has loaded; two pools would compete for the processors. Left out: Windows.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch.utils import cpp_extension

from qlora_kernels.processor import processor_fact
from qlora_kernels.registry import UnavailableError

FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fPIC", "-shared", "-fvisibility=default")
MOST_SECONDS = 120
NO_COMPILER = "there is no C++ compiler here: install g++ (Debian: apt install g++)"


@functools.cache
def load_library(source: Path, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Open the compiled library of a C++ file with C functions, compiling it where that was not done yet.

    Args:
        source: the C++ file.
        extra_flags: of the compiler, after FLAGS.

    Returns:
        The library.

    Raises:
        UnavailableError: there is no compiler, it fails, or the library cannot be kept or opened.
    """
    compiler = shutil.which(cpp_extension.get_cxx_compiler())
    if compiler is None:
        raise UnavailableError(NO_COMPILER)
    command = [compiler, *FLAGS, *_threads(), *extra_flags]
    key = hashlib.sha256(b"\0".join([source.read_bytes(), *(part.encode() for part in command), _processor()]))
    try:
        folder = Path(cpp_extension.get_default_build_root()) / "qlora_kernels"
        library = folder / f"{source.stem}-{key.hexdigest()[:16]}.so"
        if not library.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(command, source, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UnavailableError(
            f"the compiled {source.name} cannot be kept or opened: {error}; set XDG_CACHE_HOME to a writable folder "
            "that programs may run from"
        ) from error


def _compile(command: list[str], source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        try:
            found = subprocess.run(
                [*command, str(source), "-o", str(made)], capture_output=True, text=True, timeout=MOST_SECONDS
            )
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"{command[0]} took more than {MOST_SECONDS} seconds") from error
        if found.returncode != 0:
            reason = next((line for line in found.stderr.splitlines() if "error" in line), found.stderr.strip())
            raise UnavailableError(f"{command[0]} cannot compile {source.name}: {reason}")
        made.replace(library)


def _threads() -> list[str]:
    """Return the flags that make the code share torch's threads; none, and one thread, where torch's are not found."""
    runtime = _openmp_of_torch()
    # The compiler's own -lgomp would bring another runtime, so the name that -fopenmp adds is left unused.
    return [] if runtime is None else ["-fopenmp", runtime, "-Wl,--as-needed"]


def _openmp_of_torch() -> str | None:
    """Find the file of the OpenMP runtime that torch is linked to; other packages may have loaded one of their own."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text(encoding="utf-8", errors="replace").splitlines() if maps.is_file() else []
    files = [line.split(maxsplit=5) for line in loaded if ".so" in line]
    torch_library = next((path for *_, path in files if Path(path).name == "libtorch_cpu.so"), None)
    if torch_library is None:
        return None
    try:
        function = ctypes.CDLL(torch_library).omp_get_max_threads
    except (OSError, AttributeError):
        return None  # torch has no OpenMP
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    for bounds, *_, path in files:
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < end:
            return path
    return None


def _processor() -> bytes:
    """Describe what -march=native depends on: several machines may share a folder."""
    facts = [processor_fact(key) or "" for key in ("model name", "flags", "Features", "CPU part")]
    return os.linesep.join([platform.machine(), platform.processor(), *facts]).encode()
