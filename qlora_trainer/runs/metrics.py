"""Log a run's metrics at each step: metrics.jsonl, one object per line, and TensorBoard's events if it is installed.

A line is flushed as soon as its step is done, so that a killed run keeps what it measured; a line that was cut short is
dropped when the file is opened again. A resumed run drops the lines after its checkpoint: those steps are taken again.
Numbers that JSON lacks (NaN, infinities) are written as null. Left out: the page made from them (runs/report/page.py).
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
    """Append records to a metrics.jsonl.

    Args:
        path: of the file, which may not exist yet; its directory does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            _write_lines(path, read_metrics(path))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line and flush it.

        Args:
            record: values that JSON can hold, NaN and infinities aside, which become null.

        Raises:
            DiskError: the disk is full or the file cannot be written.
        """
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(_to_line(record))
            self._file.flush()
        except OSError as error:
            raise DiskError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, all at once or not at all.

        Args:
            step: the last step to keep.
        """
        self.close()
        if self.path.exists():
            _write_lines(self.path, [record for record in read_metrics(self.path) if record["step"] <= step])

    def close(self) -> None:
        """Close the file; a later `append` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoardLog:
    """Write each number of a record as a scalar of its name; do nothing if TensorBoard is not installed.

    Args:
        directory: of the events.
        after_step: events of later steps, left by the run that is resumed, are hidden; 0 for a new run.
    """

    def __init__(self, directory: Path, after_step: int = 0) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(directory), purge_step=after_step + 1 if after_step else None)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write the finite numbers of a record.

        Args:
            record: has the key step.
        """
        if self._writer is None:
            return
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file of events."""
        if self._writer is not None:
            self._writer.close()


class RunLog:
    """Write both logs of a run directory.

    Args:
        run_dir: the run directory.
        after_step: the step of the checkpoint that is resumed; 0 for a new run.
    """

    def __init__(self, run_dir: Path, after_step: int = 0) -> None:
        self.metrics = MetricsLog(run_dir / METRICS_NAME)
        self.metrics.truncate_after(after_step)
        self.tensorboard = TensorBoardLog(run_dir / TENSORBOARD_NAME, after_step)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write a record to both logs.

        Args:
            record: has the key step; its values are numbers, strings or None.
        """
        self.metrics.append(record)
        self.tensorboard.append(record)

    def close(self) -> None:
        """Close both logs."""
        self.metrics.close()
        self.tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, without a last line that was cut short.

    Args:
        path: of the file.

    Returns:
        The records in their order; empty if there is no file.

    Raises:
        CheckpointError: a line in between is not a JSON object with a step.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # after the last newline is nothing, or a line that was cut short
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
