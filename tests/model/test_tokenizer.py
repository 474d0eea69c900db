"""Token ids are those of the directory's own file, whatever class a library makes of it."""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tiny_tokenizers import tiny_tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from qlora_trainer.common.errors import ModelError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.rendering.encoding import Encoder
from qlora_trainer.model import tokenizer as model_tokenizer
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.runs.start import start_run
from qlora_trainer.weights.model_directory import ModelDirectory

TEXTS = ["  two spaces\n\nand 1234\n\ttabs", "<s>hello [INST] x[/INST]\n y", "naïve café 12,5 🙂", "a  b</s> c"]
DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def with_digits(tokenizer: Tokenizer) -> None:
    """Numbers in threes, as Llama 3 splits them."""
    split = pre_tokenizers.Split(Regex(DIGITS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def with_prefix(tokenizer: Tokenizer) -> None:
    """A blank before each text between control tokens, as Llama 2 was published."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None


def in_lower_case(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def as_it_is(tokenizer: Tokenizer) -> None:
    """No rule of its own."""


def make_directory(
    path: Path, model_type: str, kind: str, rules: Callable[[Tokenizer], None], **settings: Any
) -> tuple[Path, Tokenizer]:
    """A directory with a tokenizer.json, and the tokenizer in it as the library `tokenizers` reads it."""
    path.mkdir()
    tiny_tokenizer("mistral", kind, adds_bos=True).save_pretrained(path)
    file = path / "tokenizer.json"
    own = Tokenizer.from_file(str(file))
    rules(own)
    own.save(str(file))
    written = json.loads((path / "tokenizer_config.json").read_text()) | settings
    (path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in written.items() if v is not None}))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path, Tokenizer.from_file(str(file))


def assert_own_ids(path: Path, own: Tokenizer, texts: Iterable[str] = TEXTS) -> None:
    tokenizer = load_tokenizer(ModelDirectory.open(path))
    for text in texts:
        for adds in (False, True):
            assert tokenizer(text, add_special_tokens=adds).input_ids == own.encode(text, add_special_tokens=adds).ids
    assert Encoder(tokenizer).bos_ids == own.encode("").ids == [own.token_to_id("<s>")]
    assert tokenizer.chat_template
    assert tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("model_type", "name", "kind", "rules"),
    [
        ("llama", "GPT2Tokenizer", "bytes", with_digits),
        ("llama", "Qwen2Tokenizer", "bytes", with_digits),
        ("qwen2", "PreTrainedTokenizerFast", "bytes", with_digits),
        ("qwen2", "PreTrainedTokenizerFast", "metaspace", with_prefix),
        ("llama", "LlamaTokenizer", "metaspace", with_prefix),
        ("llama", "PreTrainedTokenizerFast", "bytes", with_digits),
        ("gemma2", "CohereTokenizer", "bytes", in_lower_case),
        ("llama", "T5Tokenizer", "bytes", as_it_is),  # transformers cannot make it
        ("olmo2", None, "bytes", with_digits),
    ],
)
def test_ids_are_those_of_the_tokenizers_own_file(
    model_type: str, name: str | None, kind: str, rules: Callable[[Tokenizer], None], tmp_path: Path
) -> None:
    assert_own_ids(*make_directory(tmp_path / "m", model_type, kind, rules, tokenizer_class=name))


TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2", "gpt_neox", "starcoder2", "granite", "olmo2", "phi3"]
CLASSES = [
    *("PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer"),
    *("CohereTokenizer", "GemmaTokenizer", "LlamaTokenizer", "T5Tokenizer", "BertTokenizer", "LlamaTokenizerFast"),
    "FooTokenizer",
]


@pytest.mark.campaign
@pytest.mark.parametrize(("model_type", "name"), list(itertools.product(TYPES, CLASSES)))
def test_ids_are_the_files_for_every_model_type_and_class(model_type: str, name: str, tmp_path: Path) -> None:
    for kind, rules in (("bytes", with_digits), ("metaspace", with_prefix), ("bytes", in_lower_case)):
        path = tmp_path / f"{kind}-{rules.__name__}"
        assert_own_ids(*make_directory(path, model_type, kind, rules, tokenizer_class=name))


def with_added_tokens(path: Path, own: Tokenizer, **changes: bool) -> dict[str, Any]:
    """Settings that list the added tokens once more, with other rules, as transformers 4 wrote them."""
    settings = json.loads((path / "tokenizer_config.json").read_text())
    added = own.get_added_tokens_decoder()
    listed = {str(place): {"content": token.content, "special": True} | changes for place, token in added.items()}
    return settings | {"added_tokens_decoder": listed}


def test_the_files_rules_for_its_added_tokens_hold_over_those_of_the_settings(tmp_path: Path) -> None:
    path, own = make_directory(tmp_path / "m", "llama", "bytes", as_it_is)
    settings = with_added_tokens(path, own, rstrip=True, lstrip=True, normalized=True)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert_own_ids(path, own)


def test_special_tokens_that_only_the_class_knows_are_kept(tmp_path: Path) -> None:
    """As in GPT-2's own directory, whose settings are one number."""
    tiny_tokenizer("qwen2_5").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    tokenizer = load_tokenizer(ModelDirectory.open(tmp_path))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|endoftext|>", "<|endoftext|>")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert load_tokenizer(ModelDirectory.open(tmp_path)).bos_token is None
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')  # whose <bos> is not in the file
    size = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    assert len(load_tokenizer(ModelDirectory.open(tmp_path))) == size


def test_settings_that_change_ids_are_refused_by_name(tmp_path: Path) -> None:
    path, _ = make_directory(tmp_path / "m", "llama", "bytes", as_it_is, split_special_tokens=True)
    with pytest.raises(ModelError, match=r"other tokens than its own tokenizer\.json.*Take split_special_tokens out"):
        load_tokenizer(ModelDirectory.open(path))


def test_a_token_that_two_files_place_differently_is_refused(tmp_path: Path) -> None:
    path, own = make_directory(tmp_path / "m", "llama", "bytes", as_it_is)
    settings = with_added_tokens(path, own)
    settings["added_tokens_decoder"]["5"] = {"content": "<|call|>", "special": True}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"has the token '<\|call\|>' at 5, which tokenizer.json does not know"):
        load_tokenizer(ModelDirectory.open(path))
    settings["added_tokens_decoder"][str(own.get_vocab_size())] = settings["added_tokens_decoder"].pop("5")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(ModelDirectory.open(path))("<|call|>", add_special_tokens=False).input_ids == [
        own.get_vocab_size()
    ]


def test_rows_are_compared_with_the_tokenizers_own_file_before_they_are_kept(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference that the texts tried at the start do not show."""
    load = model_tokenizer.PreTrainedTokenizerFast.from_pretrained

    def changed(*arguments: Any, **options: Any) -> Any:
        tokenizer = load(*arguments, **options)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("jumps", "leaps")
        return tokenizer

    monkeypatch.setattr(model_tokenizer.PreTrainedTokenizerFast, "from_pretrained", changed)
    with pytest.raises(ModelError, match="other tokens than its own file does, for a row that begins"):
        start_run(tiny_config())


def sentencepiece_model(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model in a new directory."""
    path.mkdir()
    lines = ["hello world and good morning", "the world is good", "a good day to all the world", "hello hello hello"]
    (path / "text.txt").write_text("\n".join(lines * 50))
    defaults: dict[str, Any] = {
        **{"vocab_size": 340, "model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False},
        **{"normalization_rule_name": "identity", "minloglevel": 2, "hard_vocab_limit": False},
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "text.txt"), model_prefix=str(path / "tokenizer"), **(defaults | options)
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))


SETTINGS = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PLAIN = ["hello world", "hello  world\n\nhello", "  hello", "good day 🙂 ", "x", "  "]


@pytest.mark.parametrize(
    ("model_type", "settings", "options"),
    [
        ("llama", SETTINGS, {}),
        ("llama", SETTINGS | {"legacy": False}, {}),
        ("mistral", SETTINGS | {"legacy": False}, {}),
        ("llama", None, {}),
        ("mistral", None, {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}),
        ("gemma", {"tokenizer_class": "GemmaTokenizer"}, {"add_dummy_prefix": False}),
        ("llama", SETTINGS, {"model_type": "unigram", "vocab_size": 300}),
        ("llama", SETTINGS, {"model_type": "unigram", "byte_fallback": False, "vocab_size": 60}),
        ("llama", SETTINGS | {"legacy": False}, {"user_defined_symbols": "<sep>"}),
    ],
)
def test_without_a_tokenizer_json_ids_are_sentencepieces(
    model_type: str, settings: dict[str, Any] | None, options: dict[str, Any], tmp_path: Path
) -> None:
    judge = sentencepiece_model(tmp_path / "m", **options)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings is not None:
        (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(ModelDirectory.open(tmp_path / "m"))
    for text in PLAIN:
        assert tokenizer(text, add_special_tokens=False).input_ids == judge.encode(text), text
    assert Encoder(tokenizer).bos_ids == [judge.bos_id()]
    assert tokenizer.eos_token_id == judge.eos_id()
    assert tokenizer.decode(judge.encode("hello world")) == "hello world"
    begins_once = (settings or {}).get("legacy") is False
    after = (without_prefix(tmp_path / "m" / "tokenizer.model") if begins_once else judge).encode("hello")
    assert tokenizer("<s>hello", add_special_tokens=False).input_ids == [judge.bos_id(), *after]


def without_prefix(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The same sentencepiece model, but that it puts no blank before a text."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_begin_and_end_follow_the_settings_of_a_sentencepiece_model(tmp_path: Path) -> None:
    judge = sentencepiece_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    settings = SETTINGS | {"add_bos_token": False, "add_eos_token": True}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(ModelDirectory.open(tmp_path / "m"))("good").input_ids == [*judge.encode("good"), 2]


def test_a_sentencepiece_model_that_no_fast_tokenizer_follows_is_refused(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "m", treat_whitespace_as_suffix=True)
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"tokenizer\.model gives other tokens than sentencepiece does"):
        load_tokenizer(ModelDirectory.open(tmp_path / "m"))


def test_a_tokenizer_is_the_one_that_transformers_loads(tiny_models: Callable[[str], Path]) -> None:
    for family in ("llama", "gpt2", "gemma3"):
        ours = load_tokenizer(ModelDirectory.open(tiny_models(family)))
        theirs = AutoTokenizer.from_pretrained(tiny_models(family))
        assert type(ours) is type(theirs)
        text = "Hello, wörld!\n  x+1 🙂"
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.special_tokens_map == theirs.special_tokens_map
