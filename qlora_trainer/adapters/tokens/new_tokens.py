"""Add tokens to the tokenizer of a run, and write its files with them.

New tokens are ordinary words, not control tokens: where a row's text spells one, it becomes that token, and answers
show it. Their ids are those that the tokenizer's library gives, the ones after its last; rows that a model's embedding
has beyond its tokenizer are taken first. In files only the lists of added tokens change, by these.
"""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers

from qlora_trainer.adapters.tokens.token_choice import choose_tokens
from qlora_trainer.common.boundary import library_boundary
from qlora_trainer.common.errors import AdapterError, ModelError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.tokenizer import TOKENIZER_NAME, load_tokenizer, own_tokenizer
from qlora_trainer.weights.listing import read_json_object
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.turn_files import TOKENIZER_CONFIG

_WITH_IT = "special_tokens_map.json"  # of older versions of transformers
_OLDER_LIST = "added_tokens.json"  # of added tokens, likewise
_LISTED = "added_tokens_decoder"  # the list of tokenizer_config.json
_RULES = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_CLASS = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is


def run_tokenizer(directory: ModelDirectory, settings: AdapterConfig) -> Any:
    """Load the tokenizer of a model directory, with the settings' new tokens in it.

    A tokenizer that cannot be read raises ModelError, and tokens that it has or has not, AdapterError.

    Args:
        directory: of the model.
        settings: the config's section `adapter`.

    Returns:
        The tokenizer of transformers.
    """
    tokenizer = load_tokenizer(directory)
    add_new_tokens(tokenizer, directory, [*settings.new_tokens])
    if settings.trains_tokens:  # what is wrong with them is said before any weight is read
        choose_tokens(settings, tokenizer, directory.facts.vocabulary or len(tokenizer))
    return tokenizer


def check_tokens(directory: ModelDirectory, settings: AdapterConfig) -> None:
    """Refuse tokens that the tokenizer of a model directory has or has not; one without a tokenizer is passed over.

    What is wrong with them is an AdapterError.

    Args:
        directory: of the model.
        settings: the config's section `adapter`.
    """
    if settings.trains_tokens:
        with contextlib.suppress(ModelError):
            run_tokenizer(directory, settings)


def add_new_tokens(tokenizer: Any, directory: ModelDirectory, tokens: Sequence[str]) -> None:
    """Add tokens to a tokenizer of transformers.

    Args:
        tokenizer: of the directory; changed.
        directory: of the model.
        tokens: that it has not.

    Raises:
        AdapterError: it has one of them, or its files cannot hold more.
    """
    if not tokens:
        return
    if own_tokenizer(directory) is None:
        raise AdapterError(
            f"{directory} has no {TOKENIZER_NAME}, which adapter.new_tokens would be written to. Convert its tokenizer "
            "with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...)), or leave the key out."
        )
    known = tokenizer.get_vocab()
    if exists := [token for token in tokens if token in known]:
        raise AdapterError(
            f"adapter.new_tokens names {exists[0]!r}, which the tokenizer of {directory} has already (token "
            f"{known[exists[0]]}). To train its rows, name it in adapter.trainable_tokens."
        )
    tokenizer.add_tokens(_added(tokens))


def vocabulary_with(tokenizer: Any, settings: AdapterConfig, rows: int | None) -> int | None:
    """Count the rows of a model's embedding with those of new tokens.

    Args:
        tokenizer: with the new tokens in it.
        settings: the config's section `adapter`.
        rows: of the base's embedding; None: not known.

    Returns:
        The count; None where it is not known.
    """
    if rows is None or not settings.new_tokens:
        return rows
    return max(rows, *(tokenizer.convert_tokens_to_ids(token) + 1 for token in settings.new_tokens))


def own_ids_with(directory: ModelDirectory, tokens: Sequence[str]) -> Callable[[Sequence[str]], list[list[int]]] | None:
    """Return what encodes texts by the directory's tokenizer.json and new tokens alone, to compare rows with.

    Args:
        directory: of the model.
        tokens: that it has not.

    Returns:
        A function from texts to the ids of each; None where there is no such file.
    """
    own = own_tokenizer(directory)
    if own is None:
        return None
    own.add_tokens(_added(tokens))
    return lambda texts: [each.ids for each in own.encode_batch(list(texts), add_special_tokens=False)]


def changed_tokenizer_files(
    directory: ModelDirectory, tokens: Sequence[str], settings: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Write the files of a tokenizer that new tokens change; all else in them stays.

    Args:
        directory: of the model, with a tokenizer.json.
        tokens: that its tokenizer has not; none: no files.
        settings: of tokenizer_config.json, where they are others than the directory's.

    Returns:
        Text by file name: tokenizer.json, and the other files that list added tokens, where there are any.
    """
    if not tokens:
        return {}
    own = own_tokenizer(directory)
    assert own is not None, "a tokenizer without the file was refused"
    own.add_tokens(_added(tokens))
    ids = {token: own.token_to_id(token) for token in tokens}
    content = dict(read_json_object(directory.path / TOKENIZER_NAME))
    new = [{"id": ids[token], "content": token, **_RULES} for token in tokens]
    content["added_tokens"] = [*(content.get("added_tokens") or []), *new]
    files = {TOKENIZER_NAME: _as_text(content)}
    with library_boundary(f"{directory.path / TOKENIZER_NAME} with adapter.new_tokens cannot be read"):
        again = tokenizers.Tokenizer.from_str(files[TOKENIZER_NAME])
    assert {token: again.token_to_id(token) for token in tokens} == ids, "the file gives other ids"
    found = dict(settings if settings is not None else _settings(directory))
    if _LISTED in found:  # classes of transformers that make a tokenizer of its vocabulary go by this list alone
        listed = {str(ids[token]): {"content": token, **_RULES} for token in tokens}
        files[TOKENIZER_CONFIG] = _as_text({**found, _LISTED: {**found[_LISTED], **listed}})
    if (directory.path / _OLDER_LIST).is_file():
        files[_OLDER_LIST] = _as_text({**read_json_object(directory.path / _OLDER_LIST), **ids})
    return files


def tokenizer_files_with(directory: ModelDirectory, tokens: Sequence[str]) -> dict[str, str]:
    """Make the files of a tokenizer with new tokens, to be put next to an adapter.

    Args:
        directory: of the model.
        tokens: that its tokenizer has not; none: no files.

    Returns:
        Text by file name, from which transformers loads the tokenizer by itself.
    """
    if not tokens:
        return {}
    settings = _settings(directory)
    settings.setdefault(
        "tokenizer_class", _CLASS
    )  # without it transformers asks the model's config, which is elsewhere
    files = {TOKENIZER_CONFIG: _as_text(settings), **changed_tokenizer_files(directory, tokens, settings)}
    if (directory.path / _WITH_IT).is_file():
        files[_WITH_IT] = (directory.path / _WITH_IT).read_text(encoding="utf-8")
    return files


def _settings(directory: ModelDirectory) -> dict[str, Any]:
    path = directory.path / TOKENIZER_CONFIG
    return dict(read_json_object(path)) if path.is_file() else {}


def _as_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _added(tokens: Sequence[str]) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(token, normalized=False, special=False) for token in tokens]
