"""Split text as the model of a GGUF file does before its merges, by the rule that `tokenizer.ggml.pre` names.

transformers knows some of the names, and gives all others GPT-2's rule without a word. Left out: the rules themselves
(split_rules.py).
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers

from qlora_trainer.common.errors import ModelError
from qlora_trainer.weights.gguf.split_rules import BEGINS, SPLITS, WHOLE_PIECES


def restore_split(tokenizer: Any, keys: Mapping[str, Any], path: Path) -> list[str]:
    """Give a tokenizer the split rule of its GGUF file.

    Args:
        tokenizer: as transformers reads it from the file; changed in place.
        keys: the file's metadata of the tokenizer, named without "tokenizer.".
        path: the file, for error messages.

    Returns:
        Warnings for the user.

    Raises:
        ModelError: the file names a rule that is not known.
    """
    backend = tokenizer.backend_tokenizer
    if keys.get("ggml.model") == "llama" and keys.get("ggml.add_space_prefix") is False:
        _take_out_space_prefix(backend)
    if keys.get("ggml.model") != "gpt2":
        return []  # only byte-level vocabularies have a split rule; the others are written with the rule "default"
    name = keys.get("ggml.pre") or None
    if name not in SPLITS and name is not None:
        raise ModelError(
            f"{path} names the split rule {name!r} (tokenizer.ggml.pre), which is not known here, so its texts would "
            "become other tokens than the model was trained on. Use the model's safetensors directory or hub name. "
            f"Known rules: {', '.join(sorted(SPLITS))}."
        )
    rule = SPLITS[name or "default"]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in rule),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.model.ignore_merges = name in WHOLE_PIECES
    if name in BEGINS and "ggml.add_bos_token" not in keys and tokenizer.bos_token is not None:
        tokenizer.add_bos_token = True
    if name is None:
        return [
            "The GGUF file does not name the split rule of its tokenizer (tokenizer.ggml.pre), so texts are split by "
            "llama.cpp's default rule, which is right for few models. Where the model's is known, such as qwen2, write "
            f"a file that names it: gguf-new-metadata --pre-tokenizer qwen2 {shlex.quote(str(path))} named.gguf"
        ]
    return []


def _take_out_space_prefix(backend: Any) -> None:
    """Take out what puts a space before each text, and what drops it when tokens become text."""
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        backend.pre_tokenizer.prepend_scheme = "never"
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
