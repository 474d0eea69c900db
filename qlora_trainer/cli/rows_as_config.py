"""Recognize rows that are typed where a config is meant, as `qlora train rows.jsonl.gz`.

By the endings that are read as rows; a .json file may be either, as JSON is YAML, so it is looked into. Left out: names
of hub data sets, which are not looked up, and whether the rows can be used.
"""

import json
from pathlib import Path

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.reading.data_file import DataFile, content_suffix, is_archive, kind_of
from qlora_trainer.data.reading.hub import is_saved
from qlora_trainer.data.reading.json_rows import read_json
from qlora_trainer.data.reading.locations import find_files, is_pattern

_LARGEST_CONFIG = 2**20  # bytes


def is_rows(word: str) -> bool:
    """Return True if a word of a command line means rows by its name, and no config.

    Args:
        word: maybe the path of a file, a folder or an archive, or a pattern.

    Returns:
        True for rows that are there.
    """
    path = Path(word).expanduser()
    if is_pattern(word) or path.is_dir():
        is_other = any((path / name).exists() for name in ("config.json", "config.yaml"))  # of a model or a run
        return not is_other and (is_saved(path) or _holds_rows(word))
    if not path.is_file():
        return False
    if content_suffix(path) == path.suffix.lower() == ".json":
        return not _is_config(path)
    return kind_of(path) is not None or is_archive(path)


def _holds_rows(word: str) -> bool:
    try:
        return bool(find_files(word).files)
    except (DataError, OSError):
        return False


def _is_config(path: Path) -> bool:
    """Return True for JSON that has a key of the config, and for what is no JSON, of which YAML says what is wrong."""
    if path.stat().st_size <= _LARGEST_CONFIG:
        try:
            value = json.loads(path.read_bytes())
        except ValueError:
            value = None
        if isinstance(value, dict) and any(map(_is_section, value, value.values())):
            return True
    try:
        return next(read_json(DataFile(path)), None) is None
    except DataError:
        return True


def _is_section(name: str, value: object) -> bool:
    section = RunConfig.model_fields.get(name)
    keys = getattr(section.annotation, "model_fields", {}) if section else {}
    return isinstance(value, dict) and bool(value.keys() & keys)
