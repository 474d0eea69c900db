"""The smallest config, one written to a file, and the problems of one."""

from pathlib import Path

import pytest
import yaml

from qlora_trainer.common.errors import ConfigError
from qlora_trainer.config.load import make_config

MINIMAL = {"model": {"name": "owner/model"}, "data": {"train": "rows.jsonl"}}


def write(path: Path, content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def problems_of(raw: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_config(raw)
    return str(caught.value)
