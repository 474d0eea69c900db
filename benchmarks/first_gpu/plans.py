"""Plan the runs of cases.py, so that what they take on the card is reported with its plan.

    python -m benchmarks.first_gpu.plans /tmp/kit/plans.json [COMMIT]

Needs no GPU; some minutes of one core. The commit is only recorded: it says which code a plan is of.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from qlora_trainer.cli.app import prefer_expandable_segments  # noqa: E402

prefer_expandable_segments()
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as first_gpu.sh has it: a plan counts it

import torch  # noqa: E402

from benchmarks.first_gpu.cases import CASES, HOST_BYTES, Case, raw_config  # noqa: E402
from qlora_trainer.config.load import make_config  # noqa: E402
from qlora_trainer.planning.memory_plan import MemoryPlan, plan_memory  # noqa: E402
from qlora_trainer.weights.model_directory import ModelDirectory  # noqa: E402


def plan(case: Case, model: Path, work: Path) -> tuple[MemoryPlan, bool]:
    """Plan under the first policy that fits, or the last; returns the plan and whether it fits."""
    for policy in case.policies:
        training = {"activation_checkpointing": policy}
        raw = raw_config(
            str(model), "rows.jsonl", str(work / "run"), case.tokens, training, case.steps, case.is_memory_efficient
        )
        raw["model"]["device"] = "cuda"
        found = plan_memory(ModelDirectory.open(model), make_config(raw))
        fits = case.card is None or (found.total <= case.card * 10**9 and found.host <= HOST_BYTES)
        if fits:
            break
    return found, fits


def main() -> None:
    output, commit = Path(sys.argv[1]), " ".join(sys.argv[2:])
    torch.set_num_threads(1)
    plans: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        model.mkdir()
        config = ROOT / "benchmarks/models/llama-3.1-8b/config.json"
        (model / "config.json").write_text(config.read_text())
        for case in CASES:
            started = time.monotonic()
            found, fits = plan(case, model, Path(work))
            plans[case.name] = {
                "policy": found.policy.as_settings(),
                "reserved": found.reserved,
                "allocated": found.allocated,
                "total": found.total,
                "host": found.host,
                "operation": found.operation,
                "components": found.components,
                "fits": fits,
            }
            print(
                f"{case.name}: {found.policy}, {found.reserved / 2**30:.2f} GiB reserved, {found.total / 1e9:.2f} GB in"
                f" all, fits: {fits} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"commit": commit, "torch": torch.__version__, "plans": plans}, indent=1))


if __name__ == "__main__":
    main()
