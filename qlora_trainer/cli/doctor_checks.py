"""Examine this machine for `qlora doctor`, which prints the findings.

Each check examines one thing and returns what it found in a line, with advice if something is wrong. A broken package
or driver is a finding, not a crash. The checks are in doctor_packages.py and doctor_machine.py. Left out: whether a
given model fits in memory, which `qlora plan` computes.
"""

from pathlib import Path

import torch

from qlora_trainer.cli import doctor_machine as machine
from qlora_trainer.cli import doctor_packages as packages
from qlora_trainer.cli.findings import Finding


def examine(cache_dir: Path | None = None) -> list[Finding]:
    """Run every check.

    Args:
        cache_dir: of prepared models and data, whose disk is examined too; None to leave that out.

    Returns:
        The findings in the order in which they are printed.
    """
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    paging = machine.paged_optimizer()  # first: a card in exclusive mode takes one process at a time
    findings = [machine.system(), *packages.versions(), *machine.cards(), packages.compute_dtype()]
    findings.append(packages.bitsandbytes_library())
    for kind in kinds:
        findings += [packages.kernels(kind), packages.attention(kind), packages.nf4(kind)]
    findings += [paging, packages.triton(), packages.tensorboard(), machine.processors(), machine.memory()]
    findings.append(machine.disk("Disk here", Path.cwd(), "Start in a writable folder, or set training.output_dir."))
    if cache_dir is not None:
        findings.append(machine.disk("Disk of the cache", cache_dir, "Set XDG_CACHE_HOME to a writable folder."))
    findings.append(packages.hub())
    return findings
