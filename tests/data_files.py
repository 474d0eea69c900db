"""Write a file of rows for a test."""

from pathlib import Path
from typing import Any

from qlora_trainer.data.reading.data_file import DataFile


def write_file(directory: Path, name: str, content: bytes | str) -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write(directory: Path, name: str, content: bytes | str, **how: Any) -> DataFile:
    """Write a file, and describe it with how it is to be read."""
    return DataFile(write_file(directory, name, content), **how)
