"""The config of a model that is too large for a test, of which a plan needs nothing else."""

import json
from pathlib import Path
from typing import Any

LLAMA_8B: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "benchmarks" / "models" / "llama-3.1-8b" / "config.json").read_text()
)
