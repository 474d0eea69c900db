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
    "learned[-_ ]tokens?": "trained tokens",
    r"(?<=adapter\.)targets": "target_modules",
    "output[-_ ]head": "lm_head, LM head",
    "kept_layers|offload_every(?!_n_layers)|minimum_4bit_share|keep_quantized": "what config/renamed.py says",
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
    "modelled|cancelled|travelled|<analys(e[ds]?|ing)>|<whilst>|<programme>": "American spelling",
}
# Old names are said where they are refused; a chat template, a row and a person's data are quoted as they are.
EXEMPT = (
    HERE,
    "qlora_trainer/config/renamed.py",
    "tests/config/test_renamed.py",
    "tests/chat_templates/",
    "tests/data/rows/",
    "benchmarks/models/",
    "benchmarks/demo_",
    "qlora_trainer/cli/demo_rows/",
    "LICENSE",
)
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
        if name.endswith(TEXT) and not name.startswith(EXEMPT) and (ROOT / name).is_file()
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
    ],
)
def test_a_banned_word_is_found_and_no_other(text: str, word: str) -> None:
    found = [line.split(": ")[1].split(",")[0] for line in banned_words(text)]
    assert found == ([word] if word else [])


def test_source_messages_and_docs_use_the_words_of_the_field() -> None:
    found = []
    for path in project_files():
        text = path.read_text("utf-8")
        written = OLD_NAMES.sub("``", text) if path.name == "CHANGELOG.md" else text
        found += [f"{path.relative_to(ROOT)}:{line}" for line in banned_words(written)]
    found += [f"the name {path}" for path in project_files() if banned_words(path.relative_to(ROOT).as_posix())]
    assert found == [], "\n" + "\n".join(found)
