"""Take the fenced blocks out of README.md and docs/, and run those of a page on a tiny model, from top to bottom.

A block of `sh` runs as typed, but for the names of large models, which become a tiny one's, and the YAML files that a
page has under a title, which are written with a run of two steps. A comment on the line before a block says otherwise:
`<!-- not run: reason -->`.
"""

import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LARGE_MODELS = ("Qwen/Qwen3-8B", "HuggingFaceTB/SmolLM2-135M-Instruct")
SHORT = {
    "data": {"max_length": 128},
    "training": {"max_steps": 2, "global_batch_size": 2},
    "evaluation": {"samples": 1, "max_new_tokens": 2},
}
NOT_RUN = "<!-- not run: "
_FENCE = re.compile(r"^(?:(<!-- [^\n]*) -->\n)?```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Hold a fenced block: its language, what follows the language, its text, and the comment before it."""

    language: str
    info: str
    text: str
    comment: str

    @property
    def title(self) -> str:
        found = re.search(r'title="([^"]+)"', self.info)
        return found[1] if found else ""


def blocks(page: Path) -> list[Block]:
    return [
        Block(language, info.strip(), text, comment)
        for comment, language, info, text in _FENCE.findall(page.read_text("utf-8"))
    ]


def has_commands(page: Path) -> bool:
    return any(block.language == "sh" and not block.comment.startswith(NOT_RUN) for block in blocks(page))


def run_page(page: Path, qlora: Callable[..., tuple[int, str, str]], model: Path, patch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in the present directory."""
    for block in blocks(page):
        text = block.text
        for name in LARGE_MODELS:
            text = text.replace(name, str(model))
        if block.title and block.language == "yaml":
            Path(block.title).write_text(yaml.safe_dump(_shortened(yaml.safe_load(text))))
        elif block.title and block.language == "python":
            Path(block.title).write_text(text)
            runpy.run_path(block.title)
        elif block.language == "sh" and not block.comment.startswith(NOT_RUN):
            for line in text.replace("\\\n", " ").splitlines():
                _run_line(line, qlora, patch, page)


def _shortened(config: dict[str, Any]) -> dict[str, Any]:
    return config | {section: config.get(section, {}) | values for section, values in SHORT.items()}


def _run_line(line: str, qlora: Callable[..., tuple[int, str, str]], patch: pytest.MonkeyPatch, page: Path) -> None:
    words = shlex.split(line, comments=True)
    with patch.context() as for_this_line:
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            for_this_line.setenv(*words.pop(0).split("=", 1))
        if words:
            assert words[0] == "qlora", (
                f"{page.name}: {line!r} is no command of ours; mark its block {NOT_RUN}reason -->"
            )
            code, _, reported = qlora(*words[1:], *_short_run(words))
            assert code == 0, f"{page.name}: {line}\n{reported}"


def _short_run(words: list[str]) -> list[str]:
    """Return the settings of a run of two steps, for a command that names no file with them."""
    if words[1] != "train" or not {"--model", "--output"} & set(words):
        return []
    return [f"{section}.{key}={value}" for section, values in SHORT.items() for key, value in values.items()]
