"""A line of what `qlora doctor` reports, and what broken software raises where it is looked at."""

import subprocess
from dataclasses import dataclass
from typing import Literal

from qlora_trainer.common.errors import QLoRATrainerError

# What a missing or broken package, driver or compiler raises when it is imported or used, native libraries included.
FAILURES = (
    AssertionError,
    AttributeError,
    ImportError,
    OSError,
    QLoRATrainerError,
    RuntimeError,
    ValueError,
    subprocess.SubprocessError,
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. note: works, but worth knowing; problem: training will fail or be wrong."""

    name: str
    status: Literal["ok", "note", "problem"]
    detail: str
    advice: str = ""
