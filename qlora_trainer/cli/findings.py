"""Declare a finding of `qlora doctor`, and the errors that broken software raises when it is examined."""

import subprocess
from dataclasses import dataclass
from typing import Literal

from qlora_trainer.common.errors import QLoRATrainerError

# A missing or broken package, driver, compiler or native library raises one of these when it is imported or used.
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
    """Hold one line of the report. note: works, but is worth knowing; problem: training will fail or be wrong."""

    name: str
    status: Literal["ok", "note", "problem"]
    detail: str
    advice: str = ""
