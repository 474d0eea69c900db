"""Make a fast tokenizer of a sentencepiece model, with the ids that sentencepiece itself gives, or refuse.

transformers reads vocabulary and merges from such a file, and leaves out some of its rules: the blank that comes before
a text, and which blanks are dropped. They are read here from the file and put into the tokenizer, whose ids are then
compared with sentencepiece's. Left out: directories that have a tokenizer.json (tokenizer.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_trainer.common.errors import ModelError
from qlora_trainer.weights.listing import file_inside
from qlora_trainer.weights.tensors import refuse_pointer

_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model")
_SPACE = "▁"
_CONTROL, _USER_DEFINED = 3, 4  # types of pieces


@dataclass(frozen=True)
class SentencepieceModel:
    """Hold a sentencepiece model as it was parsed."""

    path: Path
    proto: Any  # sentencepiece's ModelProto


def find_sentencepiece(directory: Path) -> SentencepieceModel | None:
    """Find the sentencepiece model of a model directory.

    Args:
        directory: of the model.

    Returns:
        The model; None where there is none, or where tokenizer.model is of another kind, as tiktoken's is.

    Raises:
        ModelError: it is a git-lfs pointer, or a link that leads outside.
    """
    for name in _NAMES:
        if (directory / name).exists():
            path = file_inside(directory, name)
            refuse_pointer(path)
            proto = _proto(path)
            return None if proto is None else SentencepieceModel(path, proto)
    return None


def sentencepiece_tokenizer(
    model: SentencepieceModel, settings: Mapping[str, Any], probes: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a sentencepiece model.

    After a control token, a text begins with a blank as at its start where the settings say `legacy` or nothing, as
    with Llama 2; with `legacy: false`, only the whole text does. The model's begin token, where it has one, comes first
    unless the settings say otherwise (`add_bos_token`).

    Args:
        model: of a directory without a tokenizer.json.
        settings: what tokenizer_config.json holds.
        probes: texts that must give sentencepiece's ids.

    Returns:
        The tokenizer.

    Raises:
        ModelError: no tokenizer gives sentencepiece's ids.
    """
    path, proto = model.path, model.proto
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent)
    backend = tokenizer.backend_tokenizer
    pieces = [(piece.piece, piece.type) for piece in proto.pieces if piece.type in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text, kind in pieces if kind == 3])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text, kind in pieces if kind == 4])
    judge = sentencepiece.SentencePieceProcessor(model_file=str(path))
    differing = ""
    for begins_once in _orders(settings.get("legacy", True) is False):
        _set_rules(backend, proto.normalizer_spec, begins_once)
        differing = next(
            (text for text in probes if backend.encode(text, add_special_tokens=False).ids != judge.encode(text)), ""
        )
        if not differing:
            break
    else:
        raise ModelError(
            f"The tokenizer that transformers makes of {path} gives other tokens than sentencepiece does: for "
            f"{differing!r}. Put the model's tokenizer.json next to it."
        )
    tokenizer.add_bos_token = settings.get("add_bos_token", proto.trainer_spec.bos_id >= 0)
    tokenizer.add_eos_token = settings.get("add_eos_token", False)
    return tokenizer


def _orders(begins_once: bool) -> Iterator[bool]:
    yield begins_once
    yield not begins_once


def _proto(path: Path) -> Any:
    """Parse the file; None where it is no sentencepiece model."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception:
        return None
    return proto if proto.pieces else None


def _set_rules(backend: Tokenizer, rules: Any, begins_once: bool) -> None:
    """Put a sentencepiece model's rules on blanks into a tokenizer."""
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix and not begins_once:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    # The first puts a blank before the whole text, also where that begins with one, and the second writes it as ▁.
    before = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
    written = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never", split=False)
    both = pre_tokenizers.Sequence([before, written])
    backend.pre_tokenizer = both if rules.add_dummy_prefix and begins_once else None
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
