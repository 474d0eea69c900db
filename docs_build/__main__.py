"""Write every generated page into docs/; a test compares the pages in the repository with what this writes."""

from pathlib import Path

from docs_build.command_line import command_line_page
from docs_build.config_keys import config_page
from docs_build.decisions import decisions_page
from docs_build.folders import folders_picture

DOCS = Path(__file__).parents[1] / "docs"


def pages() -> dict[Path, str]:
    """Make the pages.

    Returns:
        {path: text}.
    """
    return {
        DOCS / "reference" / "config.md": config_page(),
        DOCS / "reference" / "command-line.md": command_line_page(),
        DOCS / "decisions" / "index.md": decisions_page(DOCS / "decisions"),
        DOCS / "concepts" / "folders.svg": folders_picture(DOCS.parent),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
