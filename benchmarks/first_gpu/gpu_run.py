"""Run a part of the first-GPU script in a process: gpu_run.py env|make|peer|kernels, or gpu_run.py big STEP ...

first_gpu.sh calls it; steps.py has the steps of `big`. KIT_DRY=1 walks through all of it on a CPU with a tiny model.
The parts are in benchmarks/first_gpu of the checkout, two folders above this file, wherever this file was copied to.
"""

import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from qlora_trainer.cli.app import prefer_expandable_segments  # noqa: E402

prefer_expandable_segments()

import torch  # noqa: E402

from benchmarks.first_gpu.device import Device  # noqa: E402
from benchmarks.first_gpu.kit import Kit  # noqa: E402


def run_part(kit: Kit, device: Device, part: str, names: list[str]) -> int:
    """Run a part; returns the exit code."""
    if part == "env":
        from benchmarks.first_gpu.environment import report_environment

        return report_environment(kit, device)
    if part == "make":
        from benchmarks.first_gpu.checkpoint import make_checkpoint

        make_checkpoint(kit, device.name)
    elif part == "big":
        from benchmarks.first_gpu.steps import take_steps

        return take_steps(kit, device, names)
    elif part == "peer":
        from benchmarks.first_gpu.peer import measure_peer

        measure_peer(kit, device)
    elif part == "kernels":
        from benchmarks.first_gpu.kernel_times import measure_kernels

        measure_kernels(kit, device)
    else:
        sys.exit(f"{part} is no part: {__doc__}")
    return 0


def main() -> int:
    part, names = sys.argv[1], sys.argv[2:]
    kit = Kit.from_environment()
    device = Device("cpu" if kit.is_dry else "cuda")
    if kit.is_dry:
        torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    started = time.perf_counter()
    try:
        return run_part(kit, device, part, names)
    except Exception as error:
        kit.failed(part, error, time.perf_counter() - started)
        return 1


if __name__ == "__main__":
    sys.exit(main())
