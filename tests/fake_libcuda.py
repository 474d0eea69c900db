"""A libcuda.so.1 that does nothing and says that all went well, for Triton's driver on a machine without a card.

Run as a program it asks whether a kernel in Triton can be had, and what doctor and a run's warnings say of that, with
torch's device functions replaced by a card's: `python fake_libcuda.py '{"case": {"VARIABLE": "value"}}'` prints the
answers as JSON. What is missing is the caller's to arrange, by the environment of each case; the library is found by
LD_LIBRARY_PATH, as libcuda.so.1 always is.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any


def make_libcuda(folder: Path) -> None:
    """Compile it into `folder`, with every function that Triton's driver module or launchers name."""
    from triton.backends.nvidia import driver

    source = Path(driver.__file__).read_text() + Path(driver.__file__).with_name("driver.c").read_text()
    names = set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", source)) | {"cuLaunchKernelEx"}
    ours = {"cuFuncGetAttribute", "cuDeviceGetAttribute"}  # both: int *value first; some limits must not be 0
    code = [f"int {name}() {{ return 0; }}" for name in sorted(names - ours)]
    code += [f"int {name}(int *value) {{ *value = 1024; return 0; }}" for name in sorted(ours)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "libcuda.c").write_text("\n".join(code) + "\n")
    library = str(folder / "libcuda.so.1")
    command = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(folder / "libcuda.c"), "-o", library]
    subprocess.run(command, check=True)


def pretend_to_have_a_card() -> None:
    """Replace torch's device functions, the lowest level that Triton asks, by those of a card with sm_86."""
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_arch_list = lambda: ["sm_80"]
    torch.cuda.get_device_capability = lambda device=None: (8, 6)
    torch.cuda.get_device_name = lambda device=None: "a card that is none"
    torch.cuda.mem_get_info = lambda device=None: (2**34, 2**34)
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def version_taken() -> dict[str, Any]:
    """Return what becomes of `rotate` in Triton ("fast", or why it cannot be had), and what doctor and a run say."""
    from qlora_kernels.registry import UnavailableError, from_triton
    from qlora_trainer.cli.doctor_packages import kernels
    from qlora_trainer.model.device import kernel_warnings

    try:
        from_triton("rotary_triton", "rotate_triton")()
        taken = "fast"
    except UnavailableError as reason:
        taken = str(reason)
    finding = kernels("cuda")
    return {"taken": taken, "doctor": f"{finding.status}: {finding.advice}", "warnings": kernel_warnings("cuda")}


def in_a_fork(environment: dict[str, str | None]) -> dict[str, Any]:
    """Ask in a process of its own, since Triton asks once for much; None takes a variable away."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if environment.get("HEADERS"):  # where Python says that its headers lie
            sysconfig.get_config_vars()["installed_base"] = environment["HEADERS"]
        try:
            answer = version_taken()
        except BaseException as error:
            answer = {"taken": f"raised {error!r}", "doctor": "", "warnings": []}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        return json.load(pipe)


if __name__ == "__main__":
    pretend_to_have_a_card()
    import triton  # noqa: F401 - once, for all forks

    print(json.dumps({name: in_a_fork(case) for name, case in json.loads(sys.argv[1]).items()}))
