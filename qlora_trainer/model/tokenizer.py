"""Load the tokenizer of a model directory: the one in its own tokenizer.json, or in its sentencepiece model.

transformers rebuilds some tokenizers from their vocabulary, by a class that tokenizer_config.json or the model type
names, and drops the rules that tokenizer.json has. So the file's own tokenizer is taken, in a wrapper that has the
directory's special tokens, chat template and settings, and its ids are compared with those of the file: on a text of
digits, blanks, line ends and control tokens here, and on a sample of the rows where rows are prepared. Left out: making
a tokenizer of a sentencepiece model (sentencepiece_model.py).
"""

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_trainer.common.boundary import is_from_library, key_at_fault, library_boundary
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.quiet import quiet_transformers
from qlora_trainer.common.transformers_internals import tokenizer_class
from qlora_trainer.model.sentencepiece_model import find_sentencepiece, sentencepiece_tokenizer
from qlora_trainer.weights.listing import file_inside, read_json_object
from qlora_trainer.weights.model_directory import GENERATION_CONFIG, ModelDirectory
from qlora_trainer.weights.tensors import refuse_pointer
from qlora_trainer.weights.turn_files import CHAT_TEMPLATE, MORE_TEMPLATES, TOKENIZER_CONFIG

TOKENIZER_NAME = "tokenizer.json"
_SPECIAL_TOKENS_NAME = "special_tokens_map.json"  # of older versions of transformers
_OLDER = (_SPECIAL_TOKENS_NAME, "added_tokens.json")
_SMALL_FILES = (*_OLDER, GENERATION_CONFIG, "chat_template.json")
_OTHER_VOCABULARIES = ("vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_MOST_CONTROL_TOKENS = 256

PROBE_TEXTS = (
    "  two spaces\n\nand 1234567 8,90.5\n\ttabs   and\r\nline ends \n \n  ",
    "I'll say WE'VE HTTP2Server snake_case x+=1; don't",
    " café CAFÉ cafe\u0301 \ufb01ne Ⅷ ½ \uff21\uff22\uff11 Straße",
    "日本語のテキスト、中文 123 한국어 ไทย عربى हिन्दी",
    "🙂👩‍👩‍👧 \u00a0\u2009\u3000 zero\u200bwidth",
    "   leading and trailing   ",
    "a\nb\n\n\nc\t\t\td",
)


def load_tokenizer(directory: ModelDirectory) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory.

    Args:
        directory: of the model.

    Returns:
        The tokenizer, which gives the ids of the directory's own file.

    Raises:
        ModelError: a file cannot be read, there is no tokenizer, or transformers' ids are not those of the file.
    """
    config = directory.config()
    path = directory.path
    settings = _read_small_files(path)
    own = own_tokenizer(directory)
    if own is not None:
        return _wrapped(path, own, settings, config)
    if (model := find_sentencepiece(path)) is not None:
        with library_boundary(f"The tokenizer in {model.path} cannot be read"), quiet_transformers():
            return sentencepiece_tokenizer(model, settings, PROBE_TEXTS)
    if not any((path / name).is_file() for name in _OTHER_VOCABULARIES):
        raise ModelError(
            f"{path} has no {TOKENIZER_NAME} or tokenizer.model, so it has no tokenizer. Copy the tokenizer's files of "
            "the model there."
        )
    with library_boundary(f"The tokenizer in {path} cannot be read"), quiet_transformers():
        return transformers.AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)


def plain_tokenizer(directory: ModelDirectory) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model directory as whoever loads it with transformers does.

    Args:
        directory: of the model.

    Returns:
        The tokenizer, whose ids may be others than those of the directory's file; None where transformers has none.
    """
    try:
        with library_boundary(f"The tokenizer in {directory} cannot be read"), quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(directory.path, trust_remote_code=False)
    except ModelError:
        return None


def own_tokenizer(directory: ModelDirectory) -> tokenizers.Tokenizer | None:
    """Read the tokenizer.json of a model directory, as the library `tokenizers` does.

    Args:
        directory: of the model.

    Returns:
        The tokenizer, without truncation and padding; None where there is no such file.

    Raises:
        ModelError: it cannot be read.
    """
    path = directory.path / TOKENIZER_NAME
    if not path.exists():
        return None
    file_inside(directory.path, TOKENIZER_NAME)
    refuse_pointer(path)
    with library_boundary(f"{path} cannot be read"):
        try:
            own = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:
            if is_from_library(error):
                _refuse_part_at_fault(path)
            raise
        own.no_truncation()
        own.no_padding()
        return own


def _read_small_files(path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json, and check that the other small files next to it can be read."""
    for name in _SMALL_FILES:
        if (path / name).is_file():
            content = read_json_object(path / name)
            if name == GENERATION_CONFIG:
                with library_boundary(f"{path / name} cannot be read", content, GenerationConfig.from_dict):
                    GenerationConfig.from_dict(dict(content))
    templates = [path / CHAT_TEMPLATE, *sorted((path / MORE_TEMPLATES).glob("*.jinja"))]
    for template in templates:
        if template.is_file():
            refuse_pointer(template)
            with library_boundary(f"{template} cannot be read"):
                template.read_text(encoding="utf-8")
    return read_json_object(path / TOKENIZER_CONFIG) if (path / TOKENIZER_CONFIG).is_file() else {}


def _refuse_part_at_fault(path: Path) -> None:
    """Raise a ModelError that names the part of a tokenizer.json for which it cannot be read, if it is one part."""
    values = read_json_object(path)
    parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "added_tokens")

    def make(kept: dict[str, Any]) -> None:
        empty: dict[str, Any] = {part: [] if part == "added_tokens" else None for part in parts}
        tokenizers.Tokenizer.from_str(json.dumps({**empty, **kept}))

    with library_boundary(f"{path} cannot be read by tokenizers {tokenizers.__version__}", values, make):
        make(values)


def _wrapped(
    path: Path, own: tokenizers.Tokenizer, settings: Mapping[str, Any], config: Any
) -> PreTrainedTokenizerFast:
    """Wrap tokenizer.json with the special tokens, the chat template and the settings of its directory."""

    def load(folder: Path, settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
        options = _default_special_tokens(path, own, settings, config) | _added_tokens(own, settings)
        if "added_tokens_decoder" not in options and not any((folder / name).is_file() for name in _OLDER):
            # As the file has them: transformers would parse all of it in Python to find them.
            options["added_tokens_decoder"] = own.get_added_tokens_decoder()
        with quiet_transformers():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                folder, tokenizer_file=str(path / TOKENIZER_NAME), **options
            )
        tokenizer("a", truncation=False)  # some settings fail at the first use
        return tokenizer

    def load_changed(settings: dict[str, Any]) -> PreTrainedTokenizerFast:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / TOKENIZER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
            return load(Path(folder), settings)

    with library_boundary(f"{path / TOKENIZER_CONFIG} cannot be read", settings, load_changed):
        tokenizer = load(path, settings)
    try:
        _refuse_other_ids(tokenizer, own, path)
        _refuse_other_places(tokenizer, own, settings, path)
    except ModelError as error:
        key = key_at_fault(settings, lambda changed: _refuse_other_ids(load_changed(changed), own, path), error)
        if key is None:
            raise
        raise ModelError(
            f"{error} Take {key} out of {TOKENIZER_CONFIG}, or mend it: it is {settings[key]!r:.80}."
        ) from None
    return tokenizer


def _default_special_tokens(
    path: Path, own: tokenizers.Tokenizer, settings: Mapping[str, Any], config: Any
) -> dict[str, str]:
    """Return the special tokens that no file names, which the tokenizer's class has by default, as GPT-2's has."""
    named = set(settings)
    if (path / _SPECIAL_TOKENS_NAME).is_file() and "added_tokens_decoder" not in settings:
        named |= set(read_json_object(path / _SPECIAL_TOKENS_NAME))
    wanted = [name for name in _SPECIAL if name not in named]
    kind = tokenizer_class(settings.get("tokenizer_class"), config.model_type) if wanted else None
    if kind is None:
        return {}
    parameters = inspect.signature(kind).parameters
    defaults = {name: parameters[name].default for name in wanted if name in parameters}
    return {name: str(token) for name, token in defaults.items() if token and own.token_to_id(str(token)) is not None}


def _added_tokens(own: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the added tokens of the settings that tokenizer.json lacks; of the others, its own rules hold."""
    if "added_tokens_decoder" not in settings:
        return {}
    added = {int(place): tokenizers.AddedToken(**token) for place, token in settings["added_tokens_decoder"].items()}
    return {
        "added_tokens_decoder": {
            place: token for place, token in added.items() if own.token_to_id(token.content) is None
        }
    }


def _refuse_other_ids(tokenizer: PreTrainedTokenizerBase, own: tokenizers.Tokenizer, path: Path) -> None:
    """Refuse a tokenizer that gives other ids than its file, with what the file puts before and after a text, too."""
    control = [token.content for token in own.get_added_tokens_decoder().values()][:_MOST_CONTROL_TOKENS]
    texts = [*PROBE_TEXTS, *(f"a {token} b{token}\n{token}{token}c  {token}  1" for token in control)]
    for adds in (False, True):
        ours = tokenizer(texts, add_special_tokens=adds, padding=False, truncation=False)["input_ids"]
        for text, ids, encoded in zip(texts, ours, own.encode_batch(texts, add_special_tokens=adds), strict=True):
            if ids != encoded.ids:
                raise ModelError(
                    f"The tokenizer that transformers makes of {path} gives other tokens than its own {TOKENIZER_NAME} "
                    f"does: {text!r} becomes {ids[:12]}, and by the file {encoded.ids[:12]}. The model was trained on "
                    "the latter."
                )


def _refuse_other_places(
    tokenizer: PreTrainedTokenizerBase, own: tokenizers.Tokenizer, settings: Mapping[str, Any], path: Path
) -> None:
    """Refuse settings that add a token at another place of the vocabulary than they say."""
    for place, token in _added_tokens(own, settings).get("added_tokens_decoder", {}).items():
        if (found := tokenizer.convert_tokens_to_ids(token.content)) != place:
            raise ModelError(
                f"{path / TOKENIZER_CONFIG} has the token {token.content!r} at {place}, which {TOKENIZER_NAME} does "
                f"not know, and where it has another one; it would become {found}. The two files are of different "
                "models."
            )
