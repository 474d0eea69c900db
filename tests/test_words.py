"""The project's vocabulary: the field's words in plain American English, in source, messages and docs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).relative_to(ROOT).as_posix()

# A pattern of words that are not used, and what is written instead; < and > are the ends of a word, also inside an
# identifier, where an underscore or a capital follows.
BANNED = {
    "held[-_ ]?out": "eval",
    "learned[-_ ]tokens?|(?:per|[\"'`])[ ]?label[_ ]tokens?>": "trained tokens",
    r"(?<=adapter\.)targets": "target_modules",
    "output[-_ ]head": "lm_head, LM head",
    "kept_layers|offload_every(?!_n_layers)|minimum_4bit_share|keep_quantized": "what config/renamed.py says",
    # Checkpointing's policies, where they name a step or a contender of a benchmark, or the key's value.
    r"<\d+k-(?:recompute|keep)>|(?:ours|}), recompute>|against recompute>|offload and tile>|"
    r"activation_checkpointing\W{1,4}(?:keep|recompute|tile)>": "full, none, tiled",
    "<lean(er|est)?>": "memory-efficient",
    "<letters?>(?!-spacing)": "error message; character",
    "<rooms?>": "module; space",
    '<notices?>(?!")': "warning",
    "<told>": "reported",
    "<beside>": "next to; relative to",
    "<stands?>(?!-)": "is",
    "<stretch(es)?>": "span",
    "<twins?>": "duplicate",
    "(?:quant|token|normal|initial|optim|recogn|serial|summar|organ|synchron|general|special|parallel|vector|util|"
    "minim|maxim|material|memor|capital|categor|custom|final|emphas|prior|visual|central|real)"
    "is(?:e[ds]?|ers?|ings?|ations?)>": "-ize",
    "colour|behaviour|neighbour|favour|honour|labour|<centre|<grey>|catalogue|<licences?>|artefact|labelled|"
    "modelled|cancelled|travelled|<analys(e[ds]?|ing)>|<whilst>|<programme>|<afterwards>|"
    "<misspelt>": "American spelling",
}
# Old names are said where they are refused; what the demo's rows are made of are things at home, with their rooms.
EXEMPT = (
    HERE,
    "qlora_trainer/config/renamed.py",
    "tests/config/test_renamed.py",
    "benchmarks/demo_frames.py",
    "benchmarks/demo_values.py",
)
EXEMPT_TEXT = {"benchmarks/demo_rows.py": '_EVAL_SEED = "heldout"'}  # a seed: another word would choose other rows
OLD_NAMES = re.compile("`[^`]*`")  # in CHANGELOG.md: what is quoted there may be what was renamed
TEXT = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".cpp", ".txt")


def project_files() -> list[Path]:
    """List the text files of the project that its vocabulary holds for."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [
        ROOT / name
        for name in listed.stdout.split("\n")
        if name.endswith(TEXT) and name not in EXEMPT and (ROOT / name).is_file()
    ]


def banned_words(text: str) -> list[str]:
    """Return "line: word, write …" for each banned word of a text."""
    found = []
    text = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", text)  # SomeName is two words, as some_name is
    for pattern, instead in BANNED.items():
        pattern = pattern.replace("(?<", "(?\0").replace("<", "(?<![a-z])").replace(">", "(?![a-z])").replace("\0", "<")
        for match in re.finditer(pattern, text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{line}: {match[0]}, write {instead}")
    return found


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("the held-out rows", "held-out"),
        ("heldout_loss", "heldout"),
        ("Beside it lies", "Beside"),
        ("what a letter says", "letter"),
        ("dequantised", "quantised"),
        ("is told apart", "told"),
        ("the prompt_twins", "twins"),
        ("a stand-in, letter-spacing, besides, broom, understands", ""),
        ("the leanest way", "leanest"),
        ("adapter.targets=all", "targets"),
        ("_PLAIN_INITIALISATIONS", "INITIALISATIONS"),
        ("class QuantisedLinear", "Quantised"),
        ("class LeanLayer", "Lean"),
        ("def tokenisers_of", "tokenisers"),
        ("a misspelt key", "misspelt"),
        ('{"label_tokens": pack.label_tokens}', '"label_tokens'),
        ("an afterward", ""),
        ('Case("2k-keep", None)', "2k-keep"),
        ('"ours, recompute"', "ours, recompute"),
        ("training.activation_checkpointing=tile", "activation_checkpointing=tile"),
        ("activation checkpointing: keep fewer; it recomputes a tile, 2k-keeps", ""),
    ],
)
def test_a_banned_word_is_found_and_no_other(text: str, word: str) -> None:
    found = [line.split(": ", 1)[1].split(", write")[0] for line in banned_words(text)]
    assert found == ([word] if word else [])


def test_source_messages_and_docs_use_the_words_of_the_field() -> None:
    found = []
    for path in project_files():
        name, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        written = OLD_NAMES.sub("``", text) if name == "CHANGELOG.md" else text
        found += [f"{name}:{line}" for line in banned_words(written.replace(EXEMPT_TEXT.get(name, "\0"), ""))]
        found += [f"the name {name}"] if banned_words(name) else []
    assert found == [], "\n" + "\n".join(found)


def test_what_is_exempt_needs_to_be() -> None:
    texts = {name: (ROOT / name).read_text("utf-8") for name in EXEMPT}
    for name, exempt in EXEMPT_TEXT.items():
        assert exempt in (ROOT / name).read_text("utf-8"), name
        texts[name] = exempt
    assert [name for name, text in texts.items() if not banned_words(text)] == []
