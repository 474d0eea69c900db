"""A tokenizer from a GGUF file splits text by the rule that the file names, or the file is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import regex  # type: ignore[import-untyped]
from gguf import GGUFWriter
from gguf_files import add_key, byte_alphabet, tiny_weights, write_gguf
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.progress import silent
from qlora_trainer.weights.gguf.importer import import_gguf, import_warnings
from qlora_trainer.weights.gguf.pre_tokenizer import restore_split
from qlora_trainer.weights.gguf.split_rules import SPLITS

TEXTS = (
    "1234567 and 12 345,678.90 a1b22c333 12345678901",
    "\ta\tb\n\n\nc  d   e \n x\r\n\r\n  y",
    "I'll WE'VE don't DON'T it's 'S 'sold l'été",
    "日本語のテキスト、中文 123 한국어 ไทย عربى हिन्दी में नमस्ते ١٢٣",
    "Привет мир! Ελληνικά ὕδωρ café CAFÉ cafe\u0301 Straße",
    "def f(x):\r\n    return x+1  # $5 <= ^~|`\n",
    "HTTP2Server snakeCase MyURL fooBar/baz//\n#tag .dot",
    "🙂👩\u200d👩\u200d👧 ½ Ⅷ ²³",
    '...!!! ???\n\n"quoted" (paren) [x] 《书》。\uff01 you。them',
    "  ",
    " \n ",
    " a  ",
)

# The expressions by hand, as llama.cpp or the tokenizer.json of the model has them; each splits the pieces before it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
LLAMA3 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SHORT"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SHORT"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = CASED.replace("SHORT", f"{SHORT}?").replace("DIGITS", r"\p{N}{1,3}")
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"  # noqa: RUF001
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES: dict[str, list[str]] = {
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    "llama-bpe": [LLAMA3],
    "smaug-bpe": [LLAMA3],
    "dbrx": [LLAMA3],
    "chatglm-bpe": [LLAMA3],
    "qwen2": [QWEN2],
    "megrez": [QWEN2],
    "stablelm2": [QWEN2],
    "hunyuan": [QWEN2],
    "qwen35": [
        SHORT + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥\u3040-ゟ\u30a0-ヿ]+", DEEPSEEK_V3],
    "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "gpt-2": [GPT2],
    "mpt": [GPT2],
    "olmo": [GPT2],
    "jais": [GPT2],
    "trillion": [GPT2],
    "exaone4": [GPT2],
    "starcoder": [r"\p{N}", GPT2],
    "refact": [r"\p{N}", GPT2],
    "command-r": [r"\p{N}", GPT2],
    "smollm": [r"\p{N}", GPT2],
    "codeshell": [r"\p{N}", GPT2],
    "exaone": [r"\p{N}", GPT2],
    "minerva-7b": [r"\p{N}", GPT2],
    "bloom": [BLOOM],
    "poro-chat": [BLOOM],
    "viking": [BLOOM, r"\p{N}"],
    "tekken": [CASED.replace("SHORT", "").replace("DIGITS", r"\p{N}")],
    "gpt-4o": [GPT4O],
    "llama4": [GPT4O],
    "kimi-k2": [
        r"\p{Han}+|"
        + GPT4O.replace(r"\p{M}]*", r"\p{M}&&[^\p{Han}]]*").replace(r"\p{M}]+", r"\p{M}&&[^\p{Han}]]+").replace("/", "")
    ],
    "chameleon": [r"([\t\n]|    |  )", r"\p{N}", r"[\p{P}!-/:-@\[-`{-~]", GPT2],
    "superbpe": [r"\p{N}+", r"(?=(?:\d{3})+(?!\d))"],
    "bailingmoe": [
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
    "seed-coder": [SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"],
}


def split(text: str, expressions: list[str]) -> list[str]:
    """Split by one expression after the other; what matches is a piece, and what lies between is one too."""
    pieces = [text]
    for expression in expressions:
        # Set differences, in Kimi's expression, are of the library's second version.
        pattern = regex.compile(expression.replace("&&", "--").replace("--[^", "&&[^"), regex.V1)
        parts = []
        for piece in pieces:
            place = 0
            for match in pattern.finditer(piece):
                parts += [piece[place : match.start()], match.group()]
                place = match.end()
            parts.append(piece[place:])
        pieces = [part for part in parts if part]
    return pieces


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: place for place, token in enumerate(["<s>", *byte_alphabet()])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])), bos_token="<s>", eos_token="<s>"
    )


def pieces_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    rule = tokenizer.backend_tokenizer.pre_tokenizer
    assert rule is not None
    return [text[first:last] for _, (first, last) in rule.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", RULES)
def test_a_named_rule_splits_as_its_expressions_do(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    assert restore_split(tokenizer, {"ggml.model": "gpt2", "ggml.pre": name}, Path("x.gguf")) == []
    for text in TEXTS:
        assert pieces_of(tokenizer, text) == split(text, RULES[name])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a1234", ["a", "1234"]),
        (" two\n\nlines", [" two", "\n", "\n", "lines"]),
        ("\ta", ["\ta"]),
        ("Привет, мир", ["Привет", ",", " мир"]),
        ("Հայ", ["Հ", "այ"]),  # small Armenian characters are not among its alphabets
        ("ὕδωρ", ["ὕ", "δωρ"]),  # also within the span of its Chinese characters
        ("中文字。好", ["中文字", "。", "好"]),
        ("end  ", ["end", "  "]),
    ],
)
def test_rule_of_deepseek_llm(tokenizer: PreTrainedTokenizerFast, text: str, pieces: list[str]) -> None:
    restore_split(tokenizer, {"ggml.model": "gpt2", "ggml.pre": "deepseek-llm"}, Path("x.gguf"))
    assert pieces_of(tokenizer, text) == pieces


def test_every_rule_can_be_used(tokenizer: PreTrainedTokenizerFast) -> None:
    for name in SPLITS:
        restore_split(tokenizer, {"ggml.model": "gpt2", "ggml.pre": name}, Path("x.gguf"))
        for text in TEXTS:
            assert "".join(pieces_of(tokenizer, text)) == text


TOKENS = ["<|end|>", "<|start|>", "<|eot|>", *byte_alphabet(), "12", "123", "ĉa", "ĉĉ"]  # no merge makes the last one


def write(path: Path, rule: str | None, **keys: object) -> Path:
    def add(writer: GGUFWriter) -> None:
        for name, value in {"pre": rule, **keys}.items():
            if value is not None:
                add_key(writer, f"tokenizer.ggml.{name}", value)

    return write_gguf(
        path,
        tiny_weights(untied=True, vocabulary=len(TOKENS)),
        tokens=TOKENS,
        merges=["1 2", "12 3", "ĉ a"],
        add_keys=add,
    )


# By hand from llama.cpp's expressions.
@pytest.mark.parametrize(
    ("rule", "digits", "tab"),
    [
        ("qwen2", ["1", "2", "3", "4"], ["\ta"]),
        ("stablelm2", ["1", "2", "3", "4"], ["\ta"]),
        ("deepseek-coder", ["1", "2", "3", "4"], ["\ta"]),
        ("deepseek-llm", ["123", "4"], ["\ta"]),
        ("smollm", ["1", "2", "3", "4"], ["\t", "a"]),
        ("gpt-2", ["123", "4"], ["\t", "a"]),
        ("falcon", ["123", "4"], ["\t", "a"]),
    ],
)
def test_ids_of_an_imported_file_are_those_of_its_rule(
    tmp_path: Path, rule: str, digits: list[str], tab: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(write(tmp_path / "x.gguf", rule), tmp_path / "c", silent))
    found = [[tokenizer.decode([token]) for token in tokenizer(text).input_ids] for text in ("1234", "\ta")]
    assert found == [digits, tab]


@pytest.mark.parametrize(
    ("rule", "keys", "tokens"),
    [
        ("llama-bpe", {}, ["<|start|>", "123", "4"]),
        ("llama-bpe", {"add_bos_token": False}, ["123", "4"]),
        ("tekken", {}, ["<|start|>", "1", "2", "3", "4"]),
        ("qwen2", {"add_bos_token": True}, ["<|start|>", "1", "2", "3", "4"]),
    ],
)
def test_the_token_that_begins_a_text_is_added_where_the_rule_or_the_file_say_so(
    tmp_path: Path, rule: str, keys: dict[str, object], tokens: list[str]
) -> None:
    path = write(tmp_path / "x.gguf", rule, **keys)
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(path, tmp_path / "c", silent))
    assert [tokenizer.decode([token]) for token in tokenizer("1234").input_ids] == tokens


@pytest.mark.parametrize(("rule", "tokens"), [("llama-bpe", ["ĉĉ"]), ("dbrx", ["ĉ", "ĉ"])])
def test_a_piece_that_is_a_token_is_taken_whole_where_the_rule_says_so(
    tmp_path: Path, rule: str, tokens: list[str]
) -> None:
    path = write(tmp_path / "x.gguf", rule)
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(path, tmp_path / "c", silent))
    assert tokenizer.tokenize("\t\t") == tokens


@pytest.mark.parametrize("rule", ["afmoe", "Qwen2", "my-model"])
def test_a_rule_that_is_not_known_is_refused_by_name(tmp_path: Path, rule: str) -> None:
    with pytest.raises(ModelError, match=rf"x\.gguf names the split rule '{rule}' .*Known rules: .*qwen2"):
        import_gguf(write(tmp_path / "x.gguf", rule), tmp_path / "c", silent)


def test_a_file_without_a_rule_has_the_default_one_and_the_advice_gives_it_another(tmp_path: Path) -> None:
    directory = import_gguf(write(tmp_path / "my model.gguf", None), tmp_path / "c", silent)
    text = "x=1234"
    assert pieces_of(AutoTokenizer.from_pretrained(directory), text) == ["x", "=", "123", "4"]
    (warning,) = import_warnings(directory)
    assert "does not name the split rule of its tokenizer" in warning
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = warning.partition("names it: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path, capture_output=True, env=environment)
    again = import_gguf(tmp_path / "named.gguf", tmp_path / "c", silent)
    assert import_warnings(again) == []
    assert pieces_of(AutoTokenizer.from_pretrained(again), text) == ["x", "=", "1", "2", "3", "4"]


@pytest.mark.parametrize(("begins", "tokens"), [(None, ["▁a", "▁a"]), (True, ["▁a", "▁a"]), (False, ["a", "▁a"])])
def test_a_space_is_put_before_a_sentencepiece_text_unless_the_file_says_no(
    begins: bool | None, tokens: list[str]
) -> None:
    vocabulary = {token: place for place, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a"])}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")])
    keys = {"ggml.model": "llama", "ggml.pre": "default"} | (
        {} if begins is None else {"ggml.add_space_prefix": begins}
    )
    assert restore_split(tokenizer, keys, Path("x.gguf")) == []
    assert tokenizer.tokenize("a a") == tokens
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(tokens)) == "a a"
