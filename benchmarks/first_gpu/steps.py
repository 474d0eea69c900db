"""Take steps on a base that is loaded once, one after another, in the order of their value.

Each is tried once, and marked before it begins: where one breaks CUDA for its process, or ends it as bitsandbytes does
on an error, first_gpu.sh starts another process, which takes the rest.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.first_gpu.base_runs import BaseRuns
from benchmarks.first_gpu.cases import CASES
from benchmarks.first_gpu.device import Device
from benchmarks.first_gpu.kit import Kit
from benchmarks.first_gpu.model_steps import generate, paging
from benchmarks.first_gpu.profiling import profile_steps
from benchmarks.first_gpu.run_steps import keep_adapter, merge, offload, own_cache, resume

CUDA_IS_BROKEN = 75  # exit code


@dataclass(frozen=True)
class Step:
    """Hold what a step does, the seconds that it may need, and the base that it wants to find loaded."""

    take: Callable[[BaseRuns], None]
    seconds: int
    base: Literal["plain", "memory-efficient"] | None = "plain"


def _case(name: str, seconds: int) -> Step:
    is_memory_efficient = next(case.is_memory_efficient for case in CASES if case.name == name)
    return Step(lambda runs: runs.take_case(name), seconds, "memory-efficient" if is_memory_efficient else "plain")


STEPS = {
    "2k-full": _case("2k-full", 15),
    "2k-8gb": _case("2k-8gb", 20),
    "profile": Step(profile_steps, 30),
    "2k-none": _case("2k-none", 15),
    "16k-12gb": _case("16k-12gb", 30),
    "resume": Step(resume, 45),
    "generate": Step(generate, 40),
    "paging": Step(paging, 12),
    "keep_adapter": Step(keep_adapter, 10),
    "16k-24gb": _case("16k-24gb", 25),
    "64k-16gb": _case("64k-16gb", 90),
    "hostcopy": Step(offload, 60),
    "2k-12gb": _case("2k-12gb", 15),
    "merge": Step(merge, 100, None),
    "64k-24gb": _case("64k-24gb", 110),
    "2k-6gb-memory-efficient": _case("2k-6gb-memory-efficient", 40),
    "16k-8gb-memory-efficient": _case("16k-8gb-memory-efficient", 40),
}


def take_steps(kit: Kit, device: Device, names: Sequence[str]) -> int:
    """Take the named steps; returns the exit code, 75 where another process should go on."""
    own_cache(kit.work)
    tried = kit.work / "done"
    tried.mkdir(parents=True, exist_ok=True)
    runs = BaseRuns(kit, device)
    for name in names:
        step = STEPS[name]
        left = kit.deadline - time.time()
        if left < (0 if kit.is_dry else step.seconds):
            kit.verdict(f"{name}: left out, {left:.0f} s are left and it needs {step.seconds}")
            continue
        (tried / f"big-{name}").touch()
        started = time.perf_counter()
        try:
            _break_on_purpose(kit, name)
            if step.base and (runs.base is None or runs.is_memory_efficient != (step.base == "memory-efficient")):
                runs.load(step.base == "memory-efficient")
            step.take(runs)
        except Exception as error:
            kit.failed(name, error, time.perf_counter() - started)
            is_broken = not device.works()
        else:
            is_broken = False
        # Here, not in the except block: there the error's traceback still holds every frame, and they their tensors.
        if is_broken:
            kit.verdict("CUDA is broken in this process; another one goes on")
            return CUDA_IS_BROKEN
        runs.strip()
        print(f"--- {name}: {time.perf_counter() - started:.1f} s", flush=True)
    return 0


def _break_on_purpose(kit: Kit, name: str) -> None:
    """End the process at a step, as bitsandbytes does where CUDA refuses it: in a dry run, by KIT_BREAK=STEP:CODE."""
    step, _, code = os.environ.get("KIT_BREAK", "").partition(":")
    if kit.is_dry and step == name:
        os._exit(int(code))
