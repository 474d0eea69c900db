"""Share what every part of the first-GPU script needs: where it reads and writes, and how it reports.

first_gpu.sh sets the environment variables. A line that begins with VERDICT is what the script shows and keeps; all
numbers go to results.jsonl.
"""

import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
DRY_TOKENS = {2048: 64, 16384: 128, 65536: 160}  # rows of a dry run, where the card's have so many


@dataclass(frozen=True)
class Kit:
    """Hold where the script reads and writes, and whether it is dry: on a CPU, with a tiny model."""

    is_dry: bool
    out: Path  # for verdicts, results, profiles
    work: Path  # for rows, runs, caches, and marks of what was tried
    model: Path  # directory of the checkpoint
    plans: Path  # what plans.py wrote
    deadline: float  # time.time() at which no further step begins
    may_page: bool  # managed memory works here

    @classmethod
    def from_environment(cls) -> Self:
        variables = os.environ
        work = Path(variables.get("KIT_WORK", "/tmp/kit"))
        kit = cls(
            is_dry=variables.get("KIT_DRY") == "1",
            out=Path(variables.get("OUT", "/tmp/kit-out")),
            work=work,
            model=Path(variables.get("KIT_MODEL", work / "model")),
            plans=Path(variables.get("KIT_PLANS", work / "plans.json")),
            deadline=float(variables.get("KIT_DEADLINE", "inf")),
            may_page=variables.get("KIT_NO_PAGED") != "1",
        )
        kit.out.mkdir(parents=True, exist_ok=True)
        kit.work.mkdir(parents=True, exist_ok=True)
        return kit

    @property
    def rows(self) -> Path:
        """Return long text, cut into rows of full length."""
        return self.work / "text.jsonl"

    @property
    def runs(self) -> Path:
        return self.work / "runs"

    @property
    def adapter(self) -> Path:
        """Return the adapter of a finished run, for the merge and the peer."""
        return self.runs / "merged-from" / "adapter"

    def tokens(self, tokens: int) -> int:
        """Return the tokens of a row, fewer where this is a dry run."""
        return DRY_TOKENS[tokens] if self.is_dry else tokens

    def verdict(self, text: str) -> None:
        print(f"VERDICT {text}", flush=True)

    def result(self, name: str, **facts: Any) -> None:
        line = json.dumps({"name": name, "time": round(time.time()), **facts}, default=str)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(line + "\n")

    def failed(self, name: str, error: Exception, seconds: float) -> None:
        """Report an error that ended a part, whose except block this is called in."""
        traceback.print_exc()
        kind = type(error).__name__
        self.verdict(f"{name}: FAILED after {seconds:.0f} s: {kind}: {' '.join(str(error).split())[:400]}")
        self.result(f"failed-{name}", error=f"{kind}: {error}", trace=traceback.format_exc()[-4000:])
