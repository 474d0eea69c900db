"""Real chat templates keep the promises of the trainer; the command that tries them sees what breaks one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.chat_templates import SHAPES, tokenizer_for
from benchmarks.chat_templates import broken_promises as problems_of
from qlora_trainer.data.formats.parse import RecordReader
from qlora_trainer.data.rendering.renderer import Rendered, Renderer
from qlora_trainer.data.types import Conversation

ROOT = Path(__file__).parents[2]


def run(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.chat_templates", *map(str, paths)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_templates_in_the_tests_keep_them() -> None:
    done = run(ROOT / "tests" / "chat_templates")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    counts = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert counts["rendered"] > 500


@pytest.mark.campaign
def test_the_templates_of_trl_and_axolotl_keep_them(tmp_path: Path) -> None:
    """Axolotl's are taken from its wheel, without what it needs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "axolotl"]
    subprocess.run(command, check=True)
    import trl

    done = run(Path(trl.__file__).parent, *tmp_path.glob("*.whl"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert json.loads(done.stdout[: done.stdout.rindex("}") + 1])["templates"] >= 100


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        ({"labels": lambda example: example.input_ids}, "trains ['u"),
        ({"input_ids": lambda example: [*example.input_ids[:4], *example.input_ids[5:]]}, "does not begin with its"),
        ({"input_ids": lambda example: example.input_ids[:-12]}, "drops ['aone']"),
    ],
    ids=["trains others", "another prompt", "drops words"],
)
def test_the_command_sees_a_broken_promise(change: dict, promise: str) -> None:
    source = (ROOT / "tests" / "chat_templates" / "smollm2.jinja").read_text()
    tokenizer = tokenizer_for(source, "qwen")
    messages = SHAPES["single"]
    row = RecordReader("auto", {}, {}).read({"messages": messages}, "row")
    assert isinstance(row, Conversation)
    (found,) = Renderer(tokenizer).render_batch([("row", row)])
    assert isinstance(found, Rendered)
    assert list(problems_of(tokenizer, row, messages, "assistant", found)) == []
    (example,) = found.examples
    for name, value in change.items():
        object.__setattr__(example, name, value(example))
    assert any(promise in problem for problem in problems_of(tokenizer, row, messages, "assistant", found))
