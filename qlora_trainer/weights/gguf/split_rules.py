"""List the split rules of byte-level tokenizers, by the names that `tokenizer.ggml.pre` of a GGUF file has for them.

The names, and the expressions behind them, are those of llama.cpp, which applies several one after the other, each to
the pieces of the one before. Where llama.cpp writes an expression otherwise, as its engine lacks a feature, the one of
the model's own tokenizer.json is taken. Left out: rules that llama.cpp has in code of its own, and vocabularies without
bytes.
"""

_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CJK = r"[一-龥\u3040-ゟ゠-ヿ]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NOT_HAN = r"&&[^\p{Han}]"


def _words(digits: str, word: str = r"\p{L}+", other: str = r"[^\s\p{L}\p{N}]", after: str = r"[\r\n]*") -> str:
    """Return the rule of Llama 3 and its many relatives; a word takes the one character before it."""
    return rf"{_SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?{word}|{digits}| ?{other}+{after}|{_ENDS}"


def _cased_words(
    digits: str, short_forms: str, upper: str = _UPPER, lower: str = _LOWER, after: str = r"[\r\n/]*"
) -> str:
    """Return the rule of GPT-4o and its relatives, which begins a word where capitals begin."""
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}{upper}*{lower}+{short_forms}|{first}{upper}+{lower}*{short_forms}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+{after}|{_ENDS}"
    )


_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_SINGLE_DIGITS = (r"\p{N}", *_GPT2)
_LLAMA3 = (_words(r"\p{N}{1,3}"),)
_QWEN2 = (_words(r"\p{N}"),)
_GPT4O = (_cased_words(r"\p{N}{1,3}", f"{_SHORT_FORMS}?"),)
_FEWER_SPACES = "|".join(
    [r"\s*[\r\n]+", *(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")), r"\s"]
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    _CJK,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _ENDS,
)
_ALPHABETS = (  # of DeepSeek LLM: alphabets that have cases
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbe"
    "ῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗ\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_CJK = r"[一-龥ࠀ-一가-퟿]+"

# Each rule's expressions, and the names that have it.
_RULES: dict[tuple[str, ...], str] = {
    (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", "[0-9][0-9][0-9]"): "default",
    _LLAMA3: "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe glm4 "
    "chatglm-bpe",
    _QWEN2: "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    (_words(r"\p{N}", r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]"),): "qwen35",
    (
        "[\r\n]",
        rf"\s?[{_ALPHABETS}]+",
        "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
        r"\s+$",
        _DEEPSEEK_CJK,
        r"\p{N}+",
    ): "deepseek-llm",
    ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"): "deepseek-coder",
    _DEEPSEEK_V3: "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2, "[0-9][0-9][0-9]"): "falcon",
    _SINGLE_DIGITS: "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    _GPT2: "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 "
    "mellum modern-bert mpt olmo jais trillion granite-docling exaone4",
    (_BLOOM,): "bloom poro-chat gpt3-finnish",
    (_BLOOM, r"\p{N}"): "viking",
    (_cased_words(r"\p{N}", ""),): "tekken",
    _GPT4O: "gpt-4o llama4 kanana2 talkie minimax-m2",
    (r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O): "tiny_aya cohere2moe",
    (
        r"\p{Han}+",
        _cased_words(
            r"\p{N}{1,3}",
            f"{_SHORT_FORMS}?",
            upper=f"{_UPPER[:-1]}{_NOT_HAN}]",
            lower=f"{_LOWER[:-1]}{_NOT_HAN}]",
            after=r"[\r\n]*",
        ),
    ): "kimi-k2",
    (
        "<sentinel:[0-9]+>",
        "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        "([\t\n]|    |  )",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        *_GPT2,
    ): "chameleon",
    (r"\p{N}+", r"(?=(\d{3})+(?!\d))"): "superbpe",
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ): "bailingmoe bailingmoe2 llada-moe",
    (_words(r"\p{N}", other=r"[^\s\p{L}\p{N}\r\n]", after=""),): "seed-coder",
    (_QWEN2[0].removeprefix(f"{_SHORT_FORMS}|"),): "ufakzeka",
    (r"[^\n]+|[\n]+", *_QWEN2): "laguna",
    (r"\p{N}{1,3}", _words(r"\p{N}+")): "minicpm5",
    (f"{_LLAMA3[0].removesuffix(_ENDS)}{_FEWER_SPACES}",): "jais-2",
    (
        rf"{_SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ): "exaone-moe",
}
SPLITS = {name: rule for rule, names in _RULES.items() for name in names.split()}
# A piece that is a token as a whole is taken as it is, whatever its merges.
WHOLE_PIECES = {*_RULES[_LLAMA3].split(), "tekken", "minicpm5"} - {"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"}
# Begin a text with the token for that, where the file does not say otherwise.
BEGINS = WHOLE_PIECES - {"minicpm5"} | {"chameleon"}
