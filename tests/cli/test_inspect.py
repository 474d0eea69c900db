"""What `qlora inspect` shows: every token of a row once, trained ones marked with colors or without."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.cli import show_rows as inspection
from qlora_trainer.cli.show_rows import bars, describe_row, show_row
from qlora_trainer.common.errors import DataError
from qlora_trainer.config.data_schema import DataConfig
from qlora_trainer.data.preparation.overview import Lengths
from qlora_trainer.data.preparation.prepare import Prepared, prepare


def prepared(tmp_path: Path, *tokenizer_kind: str, text: str = "two  words") -> tuple[Any, Prepared]:
    rows = tmp_path / "rows.jsonl"
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": "an answer"}]
    rows.write_text(json.dumps({"messages": said}) + "\n", encoding="utf-8")
    tokenizer = tiny_tokenizer(*tokenizer_kind or ("smollm2",))
    config = DataConfig(train=str(rows), eval=0.0)
    return tokenizer, prepare(config, tokenizer, max_positions=None, seed=0, cache_dir=tmp_path / "cache")


def terminal(monkeypatch: pytest.MonkeyPatch, **options: Any) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(inspection, "answers", Console(file=out, highlight=False, width=60, **options))
    return out


@pytest.mark.parametrize("kind", [("smollm2",), ("llama3",), ("mistral", "metaspace"), ("phi3", "metaspace")])
def test_spans_join_to_the_whole_text_and_mark_what_is_trained(tmp_path: Path, kind: tuple[str, ...]) -> None:
    tokenizer, data = prepared(tmp_path, *kind)
    row = describe_row(tokenizer, data.train, 0, "training")
    example = data.train[0]
    assert "".join(span["text"] for span in row["spans"]) == tokenizer.decode(example.input_ids)
    assert row["input_ids"] == example.input_ids
    assert row["trained"] == [label != -100 for label in example.labels]
    assert (row["tokens"], row["trained_tokens"]) == (len(example.input_ids), example.trained_tokens)
    trained = "".join(span["text"] for span in row["spans"] if span["trained"])
    assert "an answer" in trained
    assert "words" not in trained


def test_a_space_that_a_decoder_drops_at_the_start_of_a_text_is_shown() -> None:
    class Stripping:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join([" one", " two", " three"][token] for token in ids).removeprefix(" ")

    spans = inspection._spans(Stripping(), [0, 1, 2], [False, True, False])
    assert [span["text"] for span in spans] == ["one", " two", " three"]


def test_a_rows_spans_are_decoded_a_few_times_each_however_long_the_row() -> None:
    decoded = 0

    class Counting:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            nonlocal decoded
            decoded += len(ids)
            return "".join(map(chr, ids))

    ids = [ord("a") + index % 26 for index in range(3000)]
    spans = inspection._spans(Counting(), ids, [index % 3 == 0 for index in range(3000)])
    assert "".join(span["text"] for span in spans) == "".join(map(chr, ids))
    assert decoded <= 4 * len(ids)


def test_without_colors_trained_tokens_are_in_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = terminal(monkeypatch, force_terminal=False)
    tokenizer, data = prepared(tmp_path)
    show_row(tokenizer, data.train, 0)
    assert "⟦an answer<|im_end|>⟧" in out.getvalue() or "[[an answer<|im_end|>]]" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_no_color_on_a_terminal_brings_brackets_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = terminal(monkeypatch, force_terminal=True)
    tokenizer, data = prepared(tmp_path)
    show_row(tokenizer, data.train, 0)
    assert "an answer<|im_end|>⟧" in out.getvalue() or "an answer<|im_end|>]]" in out.getvalue()


def test_on_a_terminal_trained_tokens_are_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = terminal(monkeypatch, force_terminal=True, color_system="standard")
    tokenizer, data = prepared(tmp_path)
    show_row(tokenizer, data.train, 0)
    assert "\x1b[1;32man answer<|im_end|>\x1b[0m" in out.getvalue()
    assert "\x1b[2mtwo  words" in out.getvalue() or "\x1b[2m<|im_start|>user" in out.getvalue()
    assert "⟦" not in out.getvalue()


def test_what_a_row_holds_is_shown_and_never_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = terminal(monkeypatch, force_terminal=False)
    tokenizer, data = prepared(tmp_path, text="[red]mark\u001b[31m \u202eup")
    show_row(tokenizer, data.train, 0)
    assert r"[red]mark\x1b[31m \u202eup" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_a_row_that_is_not_there_is_said(tmp_path: Path) -> None:
    tokenizer, data = prepared(tmp_path)
    with pytest.raises(DataError, match="no training row 7; rows go from 0 to 0"):
        show_row(tokenizer, data.train, 7)
    with pytest.raises(DataError, match="no eval row 0; there are none"):
        show_row(tokenizer, data.eval, 0, "eval")


def test_bars_are_in_proportion_and_no_row_is_without_one() -> None:
    lengths = Lengths([0, 10, 20, 30, 40], [800, 400, 1, 0], [0, 0, 0, 0])
    full, half, one, none = bars(lengths)
    assert full == "  0-9 │" + "█" * 40 + " 800"
    assert half == "10-19 │" + "█" * 20 + " 400"
    assert one == "20-29 │▏ 1"
    assert none == "30-39 │ 0"
    assert bars(lengths, is_unicode=False)[1:3] == ["10-19 |" + "#" * 20 + " 400", "20-29 |# 1"]


def test_text_that_spells_a_control_token_is_shown_otherwise_than_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, data = prepared(tmp_path, text="What is <|im_end|>?")
    spans = describe_row(tokenizer, data.train, 0, "training")["spans"]
    assert [span["text"] for span in spans if span["spelled"]] == ["<|im_end|>"]
    assert "".join(span["text"] for span in spans) == tokenizer.decode(data.train[0].input_ids)
    out = terminal(monkeypatch, force_terminal=False)
    show_row(tokenizer, data.train, 0)
    inspection.answers.print(inspection.legend())
    assert re.search(r"What is (⟨<\|im_end\|>⟩|{{<\|im_end\|>}})\?<\|im_end\|>", out.getvalue())
    assert "text that spells a control token" in out.getvalue()
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = terminal(monkeypatch, force_terminal=True, color_system="standard")
    show_row(tokenizer, data.train, 0)
    inspection.answers.print(inspection.legend())
    assert "\x1b[4;33m<|im_end|>\x1b[0m" in out.getvalue()
    assert "\x1b[4;33mtext that spells a control token" in out.getvalue()
