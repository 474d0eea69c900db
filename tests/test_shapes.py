"""Each public function says the shape of every tensor that it takes."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*(ROOT / "qlora_trainer").rglob("*.py"), *(ROOT / "kernels" / "qlora_kernels").rglob("*.py")]
# (), (T, H), (..., I), (nested blocks,), (ceil(elements/2),); no words in parentheses.
SHAPE = re.compile(r"\(\)|\((?:\.{3}|[A-Z\d])[^()]*,[^()]*\)|\([^()]*(?:\([^()]*\)[^()]*)?,\)|\bany shape\b")


def without_shape(source: str) -> list[str]:
    """List "line: function, argument" of `Tensor` arguments with no shape, behind them in the signature or in Args."""
    lines, body, found = source.splitlines(), ast.parse(source).body, []
    classes = [node for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in [*body, *(inner for each in classes for inner in each.body)]:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
                if argument.annotation and ast.unparse(argument.annotation) in ("Tensor", "Tensor | None"):
                    own = re.search(rf"^ *{argument.arg}: [^#>]*#(.*)", lines[argument.lineno - 1])
                    listed = re.search(rf"(?m)^ +{argument.arg}: (.*(?:\n {{8}}.*)*)", ast.get_docstring(node) or "")
                    if not any(SHAPE.search(part[1]) for part in (own, listed) if part):
                        found.append(f"{argument.lineno}: {node.name}, {argument.arg}")
    return found


@pytest.mark.parametrize(
    ("arguments", "docstring", "found"),
    [
        ("x: Tensor", "Do it.", ["2: f, x"]),
        ("x: Tensor,  # (T, H)\n", "Do it.", []),
        ("x: Tensor,  # the tokens (that is, all)\n", "Do it.", ["2: f, x"]),
        ("x: Tensor | None = None", "Do it.\n\n    Args:\n        x: one a row,\n            (rows,).", []),
        ("x: Tensor, y: Tensor", "Do it.\n\n    Args:\n        x: of any shape.\n        y: its norm.", ["2: f, y"]),
        ("x: Tensor, y: Tensor", "Do it.\n\n    Args:\n        x: tokens.\n        y: (), its norm.", ["2: f, x"]),
        ("x: list[Tensor], y: int", "Do it.", []),
    ],
)
def test_an_argument_without_a_shape_is_found(arguments: str, docstring: str, found: list[str]) -> None:
    assert without_shape(f'def f(\n    {arguments}) -> Tensor:  # (T, I)\n    """{docstring}"""') == found


def test_each_tensor_that_a_public_function_takes_has_a_shape() -> None:
    sources = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in FILES}
    found = [f"{name}:{line}" for name, text in sources.items() for line in without_shape(text)]
    assert found == [], "add it: # (T, H), or: of any shape"
