"""Find out whether optimizer state can be paged, before bitsandbytes needs it: CUDA's managed memory, tried once.

bitsandbytes' native code ends the process when CUDA refuses it managed memory, as virtual GPUs and some virtual
machines do. So a child process asks for it first, in bitsandbytes' own way (paged_trial.py). Where the host may not
touch such memory while the card works (concurrentManagedAccess is 0: Windows, WSL), nothing is paged either: any access
at the wrong moment would be a segmentation fault.
"""

import functools
import platform
import subprocess
import sys
from pathlib import Path

import torch

from qlora_trainer.common.machine import is_wsl
from qlora_trainer.model.device import current_card
from qlora_trainer.training.memory.paged_trial import SUCCESS

TRIAL_SECONDS = 180  # the child imports torch and bitsandbytes, which a slow disk can make a minute


@functools.cache
def paging_refusal(device: torch.device) -> str:
    """Say why optimizer state is not paged on this CUDA device, "" where it can be; tried once a process.

    Call it before the process uses the device, where that is possible: a card in exclusive mode takes one process at a
    time.

    Args:
        device: of type cuda.

    Returns:
        The reason.
    """
    if platform.system() == "Windows" or is_wsl():
        return (
            f"{'WSL' if is_wsl() else 'Windows'} does not let host and card use managed memory at the same time "
            "(concurrentManagedAccess is 0)"
        )
    index = current_card().index if device.index is None else device.index
    program = str(Path(__file__).with_name("paged_trial.py"))
    try:
        done = subprocess.run(
            [sys.executable, "-P", program, str(index)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TRIAL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a process that tried managed memory on cuda:{index} had no answer after {TRIAL_SECONDS} seconds"
    except OSError as error:
        return f"a process that tries managed memory could not be started ({error})"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and SUCCESS in lines:  # what libraries say when they end comes after it
        return ""
    code, last_line = done.returncode, lines[-1] if lines else "it printed nothing"
    ending = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"a process that tried managed memory on cuda:{index} {ending}: {last_line}"


def paging_refusal_here() -> str:
    """Call `paging_refusal` for the card that a run takes.

    Returns:
        The reason; "" where there is no card, as then nothing pages and nothing is refused.
    """
    if not torch.cuda.is_available():
        return ""
    return paging_refusal(current_card())
