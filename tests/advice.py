"""Follow the advice of a message: take its settings and commands as a shell does, and read the rows by them."""

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import QLoRATrainerError
from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import DataConfig
from qlora_trainer.data.preparation.prepare import Prepared, prepare
from qlora_trainer.data.preparation.row_reading import record_reader
from qlora_trainer.data.preparation.source_keys import source_files
from qlora_trainer.data.types import Conversation, Document, Row

WORD = r"'data\.\w+=(?:[^']|'\"'\"')*'"
WAY = re.compile(f"{WORD}(?: {WORD})*")


def ways(message: str) -> list[list[str]]:
    """Take the lines of a message, each as the words that a shell makes of it."""
    return [shlex.split(match[0]) for match in WAY.finditer(message)]


def settings_in(message: str) -> list[str]:
    """Return the settings of a message, such as data.rows=examples, without the shell's quotes."""
    found = re.findall(rf"{WORD}|data\.\w+=[^\s;'\"(){{}}<>]+", message)
    return [word for setting in found for word in shlex.split(setting.rstrip(".,"))]


def run_command_in(message: str) -> None:
    """Run the first command of a message in a shell."""
    found = re.search(r"(?:mv|cp|unzip|mkdir|iconv|python3 -c) .*", message)
    assert found, message
    subprocess.run(found.group(), shell=True, check=True, capture_output=True)


def config_of(tmp_path: Path, overrides: Sequence[str]) -> DataConfig:
    """Return the data's settings of a config under the overrides of a command line."""
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {{name: m}}\ndata: {{train: {tmp_path / 'rows.jsonl'}, eval: 0}}\n", encoding="utf-8")
    return load_config(path, overrides).data


def read(tmp_path: Path, rows: Sequence[Any], overrides: Sequence[str] = ()) -> list[str]:
    """Read rows, without rendering them, and return what they say: `role: text`, plain texts without a role."""
    (source,) = source_files(config_of(tmp_path, overrides))
    reader = record_reader(source, source.format)
    return [said(reader.read(row, f"rows.jsonl, line {number}")) for number, row in enumerate(rows, start=1)]


def refused(tmp_path: Path, rows: Sequence[Any], overrides: Sequence[str] = ()) -> str:
    """Return the message with which rows are refused when they are read; fail where they are not."""
    try:
        found = read(tmp_path, rows, overrides)
    except QLoRATrainerError as error:
        return str(error)
    raise AssertionError(f"the rows are read: {found}")


def prepared(tmp_path: Path, rows: Sequence[Any], overrides: Sequence[str] = (), family: str = "smollm2") -> Prepared:
    """Prepare rows of a file for a tokenizer."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = config_of(tmp_path, overrides)
    return prepare(config, tiny_tokenizer(family), max_positions=None, seed=0, cache_dir=tmp_path / "cache")


def refusal(tmp_path: Path, rows: Sequence[Any], overrides: Sequence[str] = (), family: str = "smollm2") -> str:
    """Return the message with which the preparation of rows ends; fail where it does not."""
    try:
        prepared(tmp_path, rows, overrides, family)
    except QLoRATrainerError as error:
        return str(error)
    raise AssertionError("the rows are prepared")


def texts(found: Prepared) -> list[str]:
    """Return what the training rows say."""
    return [said(found.train.row(index)) for index in range(len(found.train))]


def said(row: Row) -> str:
    """Return what a row says."""
    if isinstance(row, Conversation):
        return " | ".join(f"{message.role}: {message.content}" for message in row.messages)
    return row.text if isinstance(row, Document) else f"{row.prompt} -> {row.completion}"
