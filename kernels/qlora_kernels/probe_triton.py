"""Ask Triton once a process whether it can compile and launch here, before an operation counts on it.

Importing Triton proves little: at the first launch it compiles its driver module with a C compiler against Python's
headers and libcuda, then the kernel with ptxas, and keeps all of it in a folder of the home. Triton 3.6 also compiles
a launcher for each signature. What is in the cache hides what is missing, until a kernel comes that is not in it: in
the middle of training, or on another node that shares the home. So a kernel that does nothing is compiled anew in a
folder of its own inside that cache, and launched.

Left out: kernels that fail one by one, for want of shared memory or registers. They are compiled ahead of time for
every architecture by the tests.
"""

import contextlib
import functools
import io
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import triton
from triton import knobs


@triton.jit
def _nothing(number):  # type: ignore[no-untyped-def]
    pass


@functools.cache
def why_unavailable() -> str:
    """Try to compile and launch a kernel that does nothing.

    Returns:
        "" where Triton compiles and launches on the current card, else what is missing and what brings it.
    """
    try:
        cache = Path(knobs.cache.dir)
        cache.mkdir(parents=True, exist_ok=True)
        own_folder = tempfile.TemporaryDirectory(dir=cache, prefix="probe-", ignore_cleanup_errors=True)
    except OSError as error:
        return (
            f"Triton's cache {knobs.cache.dir} cannot be written ({error.strerror or error}): set TRITON_CACHE_DIR to "
            "a writable folder"
        )
    try:
        # What ptxas refuses, Triton prints with a whole program.
        with own_folder as folder, contextlib.redirect_stdout(io.StringIO()):
            driver = triton.runtime.driver.active
            driver.utils  # noqa: B018 - the driver module: read from the cache, or compiled into it
            with knobs.cache.scope():
                knobs.cache.dir = folder
                _nothing[(1,)](0, enable_fp_fusion=False)  # the default warns
    except Exception as error:  # Triton and what it calls raise some ten kinds, assertions among them
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    package = f"python{sysconfig.get_python_version()}-dev"
    install = f"install gcc (Debian, Ubuntu: apt install gcc {package})"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if isinstance(error, AssertionError) or "ldconfig" in str(error):
        return (
            "Triton does not find libcuda.so.1: install the NVIDIA driver and run ldconfig as root, or set "
            "TRITON_LIBCUDA_PATH to the folder that has it"
        )
    if isinstance(error, subprocess.CalledProcessError):
        headers = _headers()
        if not (headers / "Python.h").is_file():
            return (
                f"Triton needs Python's headers, and {headers} has no Python.h: install them (Debian, Ubuntu: apt "
                f"install {package})"
            )
        return f"Triton's C compiler {compiler} fails, and says why above: unset CC, and {install}"
    if compiler is None:
        return f"Triton needs a C compiler, and there is none: {install}"
    if isinstance(error, OSError) and shutil.which(compiler) is None:
        return f"Triton needs a C compiler, and CC names {compiler}, which cannot be run: unset CC, and {install}"
    if isinstance(error, OSError | ImportError):
        return (
            f"Triton cannot keep or open what it compiles ({type(error).__name__}: {first_line}): set TRITON_CACHE_DIR "
            "and TMPDIR to folders on a disk with space, where programs may run"
        )
    return (
        f"Triton cannot compile for this card or not launch there ({type(error).__name__}: {first_line}): install the "
        "torch and triton that fit the card and its driver (pytorch.org, 'Get started')"
    )


def _headers() -> Path:
    """Return the folder that Triton gives the compiler for Python.h."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))
