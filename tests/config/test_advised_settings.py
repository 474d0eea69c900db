"""Read the settings that the messages and docs name, as a user who types them would have them read."""

import ast
import re
from pathlib import Path

import pytest

from qlora_trainer.config.load import load_config
from qlora_trainer.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
SECTIONS = "|".join(RunConfig.model_fields)
SETTING = re.compile(rf"(?<![\w./'])(?:{SECTIONS})(?:\.\w+)+=[^\s,;:)`'\"{{\[]*[^\s,;:.)`'\"{{\[]")
FILES = [*(ROOT / "qlora_trainer").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]


def settings_of(path: Path) -> set[str]:
    """List the whole settings that a file's texts name; of an f-string, those that no value follows directly."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return set(SETTING.findall(text))
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{" for part in node.values]
            found |= set(SETTING.findall("".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(SETTING.findall(node.value))
    return found


NAMED = {setting: path for path in FILES for setting in settings_of(path)}


@pytest.mark.parametrize("setting", sorted(NAMED))
def test_a_setting_that_a_message_or_the_docs_name_is_read(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {name: m}\ndata: {train: rows.jsonl}\n")
    key, _, value = setting.partition("=")
    section, name = key.split(".")[:2]
    found = getattr(getattr(load_config(path, [setting]), section), name)
    assert str(found).lower() == value.lower() or str(found) == str(Path(value).absolute()), NAMED[setting]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("'Set adapter.rank=8, or model.device=cpu.'", {"adapter.rank=8", "model.device=cpu"}),
        ("f'Set adapter.rank={rank}. Or adapter.rank=8.'", {"adapter.rank=8"}),
        ("'(data.rows=data.*.qas): see'", {"data.rows=data.*.qas"}),
        ("config.adapter.rank == 8", set()),
    ],
)
def test_settings_are_found_in_texts_and_not_in_code(tmp_path: Path, source: str, found: set[str]) -> None:
    path = tmp_path / "source.py"
    path.write_text(source)
    assert settings_of(path) == found
