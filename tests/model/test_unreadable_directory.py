"""Whatever a library raises while it reads a model directory is our error, with the file and the key at fault."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.common.boundary import library_boundary
from qlora_trainer.common.errors import ModelError, QLoRATrainerError
from qlora_trainer.data.rendering.renderer import Renderer
from qlora_trainer.data.types import Conversation, Message
from qlora_trainer.model.load import load_dense_model, plan_base
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.weights.model_directory import ModelDirectory

Change = dict[str, Any] | bytes | Callable[[str], str]
CONFIG, SETTINGS, TOKENIZER, TEMPLATE = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
TURN = "{% for m in messages %}{{m.content}}{% endfor %}"

# What makes a directory unreadable: the file, the change, and what the message says in addition to the file's name.
REFUSED: dict[str, tuple[str, Change, str]] = {
    "a begin token that is a number": (SETTINGS, {"bos_token": 5}, "bos_token: 5"),
    "added tokens in a list": (SETTINGS, {"added_tokens_decoder": []}, "added_tokens_decoder"),
    "added tokens without their text": (SETTINGS, {"added_tokens_decoder": {"5": 3}}, "added_tokens_decoder"),
    "a length in words": (SETTINGS, {"model_max_length": "big"}, "model_max_length"),
    "settings that are not JSON": (SETTINGS, b"{", "is not JSON"),
    "settings in a list": (SETTINGS, b"[]", "a JSON object"),
    "special tokens in a number": (SETTINGS, {"extra_special_tokens": 5}, "extra_special_tokens"),
    "a template that is a number": (SETTINGS, {"chat_template": 7}, "chat_template"),
    "a template that is none": (TEMPLATE, b"{% for x in %}", ""),
    "a template in Latin-1": (TEMPLATE, '{{ "é" }}'.encode("latin-1") + TURN.encode(), "UnicodeDecodeError"),
    "a template that calls itself": (
        TEMPLATE,
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}" + TURN).encode(),
        "RecursionError",
    ),
    "a template that divides by zero": (TEMPLATE, b"{{ 1/0 }}", "ZeroDivisionError"),
    "a template with a number too large": (TEMPLATE, b'{{ "%c" % -1 }}', "OverflowError"),
    "a template that adds a word to a number": (TEMPLATE, b"{{ 1 + 'a' }}", "TypeError"),
    "a tokenizer cut off": (TOKENIZER, lambda text: text[:500], "is not JSON"),
    "an empty tokenizer": (TOKENIZER, b"{}", ""),
    "a tokenizer of bytes": (TOKENIZER, b"\xff\xfe\x00", ""),
    "a tokenizer in a list": (TOKENIZER, b"[]", "a JSON object"),
    "rules of a later version": (
        TOKENIZER,
        lambda text: text.replace('"ByteLevel"', '"ByteLevel2"', 1),
        "pre_tokenizer",
    ),
    "a vocabulary of a later version": (TOKENIZER, lambda text: text.replace('"BPE"', '"BPE2"'), "ModelUntagged"),
    "a config in a list": (CONFIG, b"[]", "a JSON object"),
    "an empty config": (CONFIG, b"", "is not JSON"),
    "a config of nothing": (CONFIG, b"{}", "model type None"),
    "a number of layers in text": (CONFIG, {"num_hidden_layers": "2"}, "num_hidden_layers: '2'"),
    "fewer than no layers": (CONFIG, {"num_hidden_layers": -1}, "num_hidden_layers: -1"),
    "no layers": (CONFIG, {"num_hidden_layers": 0}, "num_hidden_layers: 0"),
    "a negative size": (CONFIG, {"intermediate_size": -128}, "intermediate_size: -128"),
    "a negative vocabulary": (CONFIG, {"vocab_size": -1}, "vocab_size: -1"),
    "positions before the first": (CONFIG, {"max_position_embeddings": -1}, "max_position_embeddings: -1"),
    "a size with a point": (CONFIG, {"hidden_size": 64.0}, "hidden_size: 64.0"),
    "no heads": (CONFIG, {"num_attention_heads": 0}, "num_attention_heads: 0"),
    "a scaling of no known kind": (CONFIG, {"rope_scaling": {"type": "foo", "factor": 2}}, "rope_scaling"),
    "a scaling that lacks its factor": (CONFIG, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters"),
    "a scaling in one word": (CONFIG, {"rope_scaling": "linear"}, "rope_scaling"),
    "no known activation": (CONFIG, {"hidden_act": "foo"}, "hidden_act: 'foo'"),
    "no size of the vocabulary": (CONFIG, {"vocab_size": None}, "vocab_size: None"),
    "no positions": (CONFIG, {"max_position_embeddings": None}, "max_position_embeddings: None"),
    "a head's size in text": (CONFIG, {"head_dim": "x"}, "head_dim: 'x'"),
    "kinds of fewer layers": (CONFIG, {"layer_types": ["full_attention"]}, "layer_types"),
    "quantization that is a number": (CONFIG, {"quantization_config": 1}, "quantization_config"),
    "tied in words": (CONFIG, {"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes'"),
    "an end token in text": (CONFIG, {"eos_token_id": "2"}, "eos_token_id: '2'"),
    "an epsilon in text": (CONFIG, {"rms_norm_eps": "1e-5"}, "rms_norm_eps: '1e-5'"),
    "a cache in words": (CONFIG, {"use_cache": "maybe"}, "use_cache: 'maybe'"),
    "a padding token beyond the embedding": (CONFIG, {"pad_token_id": 99999}, "pad_token_id: 99999"),
    "attention that is not installed": (CONFIG, {"attn_implementation": "flash_attention_2"}, "attn_implementation"),
    "no kind of model": (CONFIG, lambda text: text.replace('"model_type"', '"model_kind"'), "model type None"),
    "generation settings in a list": ("generation_config.json", b"[]", "a JSON object"),
    "generation settings in Latin-1": ("generation_config.json", '{"a": "é"}'.encode("latin-1"), "is not JSON"),
    "names of special tokens in a list": ("special_tokens_map.json", b"[]", "a JSON object"),
    "added tokens cut off": ("added_tokens.json", b'{"<a>": 1', "is not JSON"),
}
ELSEWHERE: dict[str, tuple[str, Change, str]] = {  # the message names what is wrong, not the file
    "heads that do not divide": (CONFIG, {"num_key_value_heads": 3}, "of another shape"),
    "another trainer's quantization": (CONFIG, {"quantization_config": {"quant_method": "foo"}}, "already quantized"),
}
READ: dict[str, tuple[str, Change]] = {
    "special tokens in a list": (SETTINGS, {"extra_special_tokens": ["<a>"]}),
    "special tokens by name": (SETTINGS, {"extra_special_tokens": {"x_token": "<a>"}}),
    "a template with a break": (
        TEMPLATE,
        b"{% for m in messages %}{{m.content}}{{eos_token}}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    ),
    "a class without its unknown token": (SETTINGS, {"tokenizer_class": "GemmaTokenizer"}),
    "a class of no known name": (SETTINGS, {"tokenizer_class": "FooTokenizer"}),
    "a class of another model": (SETTINGS, {"tokenizer_class": "T5Tokenizer"}),
    "a class of another vocabulary": (SETTINGS, {"tokenizer_class": "BertTokenizer"}),
    "a class in code of its own": (
        SETTINGS,
        {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}},
    ),
    "no scaling": (CONFIG, {"rope_parameters": None}),
    "no known dtype": (CONFIG, {"torch_dtype": "float5"}),
    "no architecture": (CONFIG, {"architectures": None}),
    "no padding token": (CONFIG, {"pad_token_id": -1}),
}


@pytest.fixture
def directory(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change(directory: Path, file: str, what: Change) -> None:
    path = directory / file
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif isinstance(what, dict):
        if "chat_template" in what:
            (directory / TEMPLATE).unlink()
        path.write_text(json.dumps(json.loads(path.read_text()) | what))
    else:
        changed = what(path.read_text())
        assert changed != path.read_text()
        path.write_text(changed)


def read(path: Path) -> None:
    """All that reads a directory before its weights, and the first row."""
    directory = ModelDirectory.open(path)
    tokenizer = load_tokenizer(directory)
    assert directory.facts.vocabulary
    plan_base(directory)
    Renderer(tokenizer).render(Conversation((Message("user", "a"), Message("assistant", "b"))))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named_with_its_file_and_key(name: str, directory: Path) -> None:
    file, what, words = REFUSED[name]
    change(directory, file, what)
    with pytest.raises(QLoRATrainerError) as caught:
        read(directory)
    text = str(caught.value)
    assert words in text
    assert file in text or (file == CONFIG and str(directory) in text)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_contradicts_the_weights_or_us_is_refused(name: str, directory: Path) -> None:
    file, what, words = ELSEWHERE[name]
    change(directory, file, what)
    with pytest.raises(QLoRATrainerError, match=words):
        read(directory)


@pytest.mark.parametrize("name", READ)
def test_what_a_library_stumbles_over_is_read_where_the_files_suffice(name: str, directory: Path) -> None:
    change(directory, *READ[name])
    read(directory)


def test_weights_that_a_library_cannot_open_are_named(directory: Path) -> None:
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (b"", content[:100], b"\xff" * 64, (2**40).to_bytes(8, "little") + content[8:]):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"model.safetensors is damaged or cut short"):
            plan_base(ModelDirectory.open(directory))


def test_pointers_of_git_lfs_are_named_with_the_command_that_fetches_the_file(directory: Path, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
    for file in ("model.safetensors", TOKENIZER, SETTINGS, CONFIG):
        broken = Path(shutil.copytree(directory, tmp_path / f"cloned {file}"))
        (broken / file).write_text(pointer)
        with pytest.raises(ModelError, match=f"{file} is a git-lfs pointer") as caught:
            read(broken)
        advice = str(caught.value).partition("Fetch it: ")[2]
        said = subprocess.run(advice, shell=True, capture_output=True, text=True, check=False).stderr
        assert "No such file or directory" not in said  # the folder's name has a blank
    shutil.rmtree(broken)


def test_a_directory_without_a_tokenizer_is_named_as_such(directory: Path) -> None:
    (directory / TOKENIZER).unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer.json or tokenizer.model"):
        load_tokenizer(ModelDirectory.open(directory))


def test_what_says_nothing_about_a_file_passes(directory: Path) -> None:
    for error in (MemoryError(), KeyboardInterrupt(), RuntimeError("CUDA out of memory"), ModelError("ours")):
        with pytest.raises(type(error)) as caught, library_boundary("a file cannot be read"):
            raise error
        assert caught.value is error
    panic = pytest.raises(ModelError, match="a file cannot be read: PanicException: index out of bounds")
    with panic, library_boundary("a file cannot be read"):
        raise type("PanicException", (BaseException,), {})("index out of bounds")


def test_a_library_that_fails_in_any_way_while_it_loads_weights_is_our_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NewError(Exception):
        """Of a version to come."""

    def fail(*arguments: object, **options: object) -> None:
        raise NewError("strict")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model: NewError: strict"):
        load_dense_model(ModelDirectory.open(directory), torch.device("cpu"))
