"""One is said in the singular: no message counts "1 rows", and none leaves the choice to the reader ("row(s)")."""

import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
ONE_OF_MANY = re.compile(r"(?<![\d.,])1 (?!less\b|loss\b|has\b|is\b|was\b)[a-z]+s\b")


def test_a_run_of_one_row_one_step_and_one_layer_counts_in_the_singular(
    qlora: Callable, config_file: Path, tmp_path: Path
) -> None:
    said = [{"role": "user", "content": "the quick brown fox"}, {"role": "assistant", "content": "a lazy dog"}]
    rows = tmp_path / "one.jsonl"
    rows.write_text(json.dumps({"messages": said, "extra": 1}) + "\n")
    settings = [f"data.train={rows}", f"data.eval={rows}", "training.max_steps=1", "training.global_batch_size=1"]
    printed = []
    for command in (
        ["inspect", config_file, *settings],
        ["train", config_file, *settings, "adapter.target_modules=[layers.0.self_attn.q_proj]"],
        ["inspect", config_file, f"data.train={rows}", "data.eval=0", "data.on_bad_row=skip", "data.max_length=5"],
    ):
        _, out, reported = qlora(*command)
        printed += [out, reported]
    printed.append((tmp_path / "run" / "report.html").read_text().partition("<h2>Config")[0])
    assert "1 row" in " ".join(printed)
    assert [match[0] for text in printed for match in ONE_OF_MANY.finditer(re.sub("<[^>]*>", " ", text))] == []


def test_no_message_leaves_the_plural_to_the_reader() -> None:
    sources = [path for folder in ("qlora_trainer", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path) for path in sources if re.search(r"[a-z]\(s\)", path.read_text(encoding="utf-8"))] == []
