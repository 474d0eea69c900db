"""Draw docs/concepts/folders.svg: the folders of the package in the order of who may import whom.

The order is that of import-linter's contract in pyproject.toml; a folder's subject is the first sentence of its
docstring. So the picture shows what is checked.
"""

import ast
import re
import tomllib
from html import escape
from pathlib import Path

WIDTH, ROW, GAP = 720, 46, 10
STYLE = (
    "text { font: 15px system-ui, sans-serif; fill: #1c2733 } .name { font-weight: 600 } .subject { font-size: 13px }"
    " rect { fill: #eef3f8; stroke: #9fb3c8 } .page { fill: #ffffff; stroke: none } .low { fill: #f7f0e4 }"
)


def folders_picture(root: Path) -> str:
    """Draw the picture.

    Args:
        root: of the repository.

    Returns:
        SVG.
    """
    contracts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (contract["layers"] for contract in contracts if contract["id"] == "layers")
    rows = [[name.strip() for name in layer.split("|")] for layer in layers]
    height = (len(rows) + 1) * (ROW + GAP) + 2 * GAP + 22
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Folders: each imports only from those below it</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        f'<text class="subject" x="{GAP}" y="20">Each folder imports only from those below it.</text>',
    ]
    top = 22 + GAP
    for names in [*rows, ["kernels"]]:
        wide = (WIDTH - GAP * (len(names) + 1)) / len(names)
        for place, name in enumerate(names):
            folder = root / "kernels" / "qlora_kernels" if name == "kernels" else root / "qlora_trainer" / name
            left = GAP + place * (wide + GAP)
            low = ' class="low"' if name == "kernels" else ""
            drawn += [
                f'<rect{low} x="{left:g}" y="{top}" width="{wide:g}" height="{ROW}" rx="6"/>',
                f'<text class="name" x="{left + 12:g}" y="{top + 19}">{name}</text>',
                f'<text class="subject" x="{left + 12:g}" y="{top + 37}">{escape(_subject(folder, wide))}</text>',
            ]
        top += ROW + GAP
    return "\n".join([*drawn, "</svg>"]) + "\n"


def _subject(folder: Path, wide: float) -> str:
    """Take the first sentence of a folder's docstring, up to the last comma that fits."""
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=\.)\s", " ".join(docstring.split()), maxsplit=1)[0].removesuffix(".")
    most = int(wide / 6.9)  # characters of 13 pixels
    return sentence if len(sentence) <= most else re.split("[,;] ?(?!.*[,;] )", sentence[:most])[0]
