"""Promises of a tokenizer with new tokens: whoever loads its files gets the ids of training, and all else stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qlora_trainer.adapters.tokens.new_tokens import (
    changed_tokenizer_files,
    own_ids_with,
    run_tokenizer,
    tokenizer_files_with,
)
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.weights.model_directory import ModelDirectory

NEW = ["<gene>", "<cell>"]
TEXT = "the <gene>fox jumps<cell> over  <gene> <|im_start|>a lazy dog"


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def list_added(base: Path, name: str, listed: bool, older: bool) -> None:
    """Let the other files list the added tokens too, as many have, or not."""
    added = read(base / "tokenizer.json")["added_tokens"]
    settings = read(base / "tokenizer_config.json") | {"tokenizer_class": name}
    if listed:
        rules = {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added}
        settings["added_tokens_decoder"] = rules
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    if older:
        (base / "added_tokens.json").write_text(json.dumps({token["content"]: token["id"] for token in added}))


@pytest.mark.parametrize(
    ("name", "listed", "older"),
    [
        ("Qwen2Tokenizer", True, False),  # made of its vocabulary: what its list lacks would be lost
        ("Qwen2Tokenizer", False, False),
        ("GPT2Tokenizer", True, True),
        ("PreTrainedTokenizerFast", True, False),
    ],
)
def test_whoever_loads_the_files_gets_the_ids_of_training(
    base: Path, tmp_path: Path, name: str, listed: bool, older: bool
) -> None:
    list_added(base, name, listed, older)
    directory = ModelDirectory.open(base)
    tokenizer = run_tokenizer(directory, AdapterConfig(new_tokens=NEW))
    ids = tokenizer.convert_tokens_to_ids(NEW)
    expected = tokenizer(TEXT)["input_ids"]
    assert [expected.count(token) for token in ids] == [2, 1]
    (tmp_path / "adapter").mkdir()
    for file, text in tokenizer_files_with(directory, NEW).items():
        (tmp_path / "adapter" / file).write_text(text, encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter")(TEXT)["input_ids"] == expected
    own = own_ids_with(directory, NEW)
    assert own is not None
    assert own([TEXT]) == [expected]
    for file, text in changed_tokenizer_files(directory, NEW).items():
        (base / file).write_text(text, encoding="utf-8")
    assert load_tokenizer(ModelDirectory.open(base))(TEXT)["input_ids"] == expected
    assert AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"] == expected


def test_only_the_lists_of_added_tokens_change(base: Path) -> None:
    list_added(base, "Qwen2Tokenizer", listed=True, older=True)
    files = changed_tokenizer_files(ModelDirectory.open(base), NEW)
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json", "added_tokens.json"}
    for (file, text), key in zip(files.items(), ("added_tokens", "added_tokens_decoder", None), strict=True):
        before, after = read(base / file), json.loads(text)
        if key is None:
            assert after.items() - before.items() == {(NEW[0], 399), (NEW[1], 400)}
            continue
        old, new = before.pop(key), after.pop(key)
        assert before == after
        assert len(new) == len(old) + 2
    assert (
        changed_tokenizer_files(ModelDirectory.open(base), [])
        == tokenizer_files_with(ModelDirectory.open(base), [])
        == {}
    )


def test_a_base_without_the_file_that_would_hold_them_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_trainer.adapters.tokens.new_tokens.own_tokenizer", lambda directory: None)
    with pytest.raises(AdapterError, match=r"has no tokenizer\.json, which adapter\.new_tokens would be written to"):
        run_tokenizer(ModelDirectory.open(base), AdapterConfig(new_tokens=NEW))
