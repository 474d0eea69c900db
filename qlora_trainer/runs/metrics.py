"""What a run writes down as it goes: metrics.jsonl, one object a line, and TensorBoard's events where installed.

A line is flushed as soon as its step is done, so that a killed run keeps what it measured; the line it was killed in
is dropped when the file is opened again. A resumed run drops the lines after its checkpoint: those steps are taken
again. Numbers that JSON lacks (NaN, infinities) are written as null. The page made from them is runs/report/page.py's.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from qlora_trainer.common.atomic import write_text
from qlora_trainer.common.errors import CheckpointError, DiskError

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"


class MetricsLog:
    """Appends records to a metrics.jsonl; the directory must exist.

    Raises:
        DiskError: the disk is full or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            _write_lines(path, read_metrics(path))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line and flush it."""
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(_to_line(record))
            self._file.flush()
        except OSError as error:
            raise DiskError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, all at once or not at all."""
        self.close()
        if self.path.exists():
            _write_lines(self.path, [record for record in read_metrics(self.path) if record["step"] <= step])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardLog:
    """Writes each number of a record as a scalar under its own name; does nothing where TensorBoard is missing."""

    def __init__(self, directory: Path, after_step: int = 0) -> None:
        """Events of steps after `after_step`, left by a run that is now resumed, are hidden."""
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(directory), purge_step=after_step + 1 if after_step else None)

    def append(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class RunLog:
    """Both logs of a run directory. `after_step` is the step of the checkpoint resumed from; 0 for a new run."""

    def __init__(self, run_dir: Path, after_step: int = 0) -> None:
        self.metrics = MetricsLog(run_dir / METRICS_NAME)
        self.metrics.truncate_after(after_step)
        self.tensorboard = TensorBoardLog(run_dir / TENSORBOARD_NAME, after_step)

    def append(self, record: Mapping[str, Any]) -> None:
        """`record` has the key step; its values are numbers, strings or None."""
        self.metrics.append(record)
        self.tensorboard.append(record)

    def close(self) -> None:
        self.metrics.close()
        self.tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record of a metrics.jsonl, without a last line that a kill cut short; empty where there is no file.

    Raises:
        CheckpointError: a line in between is not a JSON object with a step.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # after the last newline comes nothing, or a line cut short
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number}, is not JSON: {error}. Remove the line by hand.") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise CheckpointError(f"{path}, line {number}, should be an object with a step. Remove the line by hand.")
        records.append(record)
    return records


def _to_line(record: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    write_text(path, "".join(_to_line(record) for record in records))
