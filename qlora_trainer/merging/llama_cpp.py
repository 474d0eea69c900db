"""Find the tokens that end answers and would not stop llama.cpp, which knows them by spelling or by a key of its file.

Its converter takes one end-of-text token from a directory (tokenizer_config.json, else config.json) and reads no
generation_config.json. All other ends are a list of spellings in its source. So an answer that ends otherwise goes on,
unless the converted file names its token. Left out: what its converter knows of single models.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

# As llama.cpp of October 2026 has them (docs/decisions/0042); older ones have fewer. Left out: names of padding and of
# files, which end generation too, and no answer.
END_NAMES = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<|ifm|im_end|>", "[e~["),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
)
_FREE_KEYS = ("eot", "eom")  # of a GGUF file, next to its end of text


def stops_unknown_to_llama_cpp(directory: Path, stops: Mapping[int, str]) -> list[str]:
    """Describe the tokens that end an answer and would not stop llama.cpp.

    Args:
        directory: of the merged model.
        stops: tokens that end an answer: id and text.

    Returns:
        A sentence with the way out, or none.
    """
    missing = {token: text for token, text in stops.items() if text not in END_NAMES}
    if missing:
        missing = {token: text for token, text in missing.items() if token not in _named_ends(directory)}
    if not missing:
        return []
    names = " and ".join(f"{text} ({token})" for token, text in missing.items())
    keys = " ".join(f"--special-token-by-id {key} {token}" for key, token in zip(_FREE_KEYS, missing, strict=False))
    return [
        f"llama.cpp will not stop at {names}, which may end answers: it knows other spellings only. After converting "
        f"the merged model, name it in the file: gguf-new-metadata MODEL.gguf NEW.gguf {keys}"
    ]


def _named_ends(directory: Path) -> set[int]:
    """Return the ends that llama.cpp's converter takes from a directory."""
    from gguf import SpecialVocab  # takes a while

    logger = logging.getLogger("gguf.vocab")  # says what it makes of the tokens around a text
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return set(SpecialVocab(directory, special_token_types=("eos",)).special_token_ids.values())
    finally:
        logger.setLevel(level)
