"""List the runs of an 8B that are taken on the card: what plans.py plans and the steps of base_runs.py measure."""

from dataclasses import dataclass
from typing import Any

RANK = 16
HOST_BYTES = 64 * 2**30  # that a plan may offload to
MEMORY_EFFICIENT: dict[str, dict[str, Any]] = {
    "model": {"embeddings": "cpu", "lm_head": "4bit"},
    "adapter": {"dtype": "bfloat16"},
    "optimizer": {"name": "paged_adamw_8bit"},
}


@dataclass(frozen=True)
class Case:
    """Hold a run: rows of so many tokens, under the first of the policies that its plan says fits the card."""

    name: str
    card: int | None  # GB that torch may take less what the plan counts for CUDA itself, or None for all
    tokens: int
    policies: tuple[str, ...]
    steps: int
    is_memory_efficient: bool = False

    @property
    def policy(self) -> str:
        """Return the policy that needs least: taken where there is no plan."""
        return self.policies[-1]


CASES = [
    Case("2k-full", None, 2048, ("full",), 6),
    Case("2k-8gb", 8, 2048, ("full", "offload", "tiled"), 6),
    Case("2k-none", None, 2048, ("none",), 6),
    Case("16k-12gb", 12, 16384, ("full", "offload", "tiled"), 3),
    Case("16k-24gb", 24, 16384, ("full",), 3),
    Case("64k-16gb", 16, 65536, ("offload", "tiled"), 1),
    Case("2k-12gb", 12, 2048, ("full",), 6),
    Case("64k-24gb", 24, 65536, ("full", "offload", "tiled"), 1),
    Case("2k-6gb-memory-efficient", 6, 2048, ("tiled",), 6, is_memory_efficient=True),
    Case("16k-8gb-memory-efficient", 8, 16384, ("tiled",), 3, is_memory_efficient=True),
]


def raw_config(
    model: str, rows: str, output: str, tokens: int, training: dict[str, Any], steps: int, is_memory_efficient: bool
) -> dict[str, dict[str, Any]]:
    """Return the config of a run of full rows, one a step. `training` has the policy and more of that section."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"name": model, "compute_dtype": "bfloat16"},
        "adapter": {"rank": RANK, "alpha": 2 * RANK},
        "data": {"train": rows, "eval": 0.0, "max_length": tokens, "format": "text"},
        "training": {
            "output_dir": output,
            "global_batch_size": 1,
            "max_steps": steps,
            "evaluate_every": 10**6,
            "save_every": 10**6,
            **training,
        },
        "evaluation": {"samples": 0},
    }
    for section, fields in MEMORY_EFFICIENT.items() if is_memory_efficient else ():
        raw[section] = {**raw.get(section, {}), **fields}
    return raw
