"""Describe one file of rows and how it is read, and know the kinds of files by their endings.

A file may have been taken out of an archive: its bytes then lie elsewhere than its name says. Left out: opening it
(unpacking.py), and finding the files that a path means (locations.py).
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

PACKED_SUFFIXES = {
    ".gz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".zst": "zstandard",
    ".zstd": "zstandard",
}
# Endings of files that hold rows, each with the name of its kind.
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".jl": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".xlsx": "excel",
    ".xlsm": "excel",
}
TEXT_KINDS = ("jsonl", "json", "csv", "tsv", "txt")  # the others are binary, and compress their own content
HEADER_KINDS = ("csv", "tsv", "excel")  # of which the first row names the columns
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tbz2", ".txz")


@dataclass(frozen=True, eq=False)
class DataFile:
    """Describe a file of rows: where its bytes are, what it is called, and how it is read.

    `name` begins the place of each row, and `location` is the complete path in messages. Readers put into `notes` what
    is worth knowing of how the file was read.
    """

    path: Path
    name: str = ""  # "": the path's last part
    location: str = ""  # "": the path
    encoding: str | None = None  # of text, as Python names it; None: UTF-8
    header: Sequence[str] = ()  # names of the columns of a CSV or TSV file without a line of them
    rows: str | None = None  # the path of the rows inside a JSON object
    is_document: bool = False  # whether a .txt file is one document, whatever it looks like
    sheet: str | None = None  # of a workbook
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the complete path for messages.

        Returns:
            Where the file is, in its archive if it is in one.
        """
        return self.location or str(self.path)

    @property
    def title(self) -> str:
        """Return the name that begins the place of each row."""
        return self.name or self.path.name

    @property
    def suffix(self) -> str:
        """Return the ending that says what it holds, as `content_suffix` does."""
        return content_suffix(PurePath(str(self)))

    @property
    def quoted(self) -> str:
        """Return the complete path as a shell takes it."""
        return shlex.quote(str(self))

    def note(self, text: str) -> None:
        """Add what is worth knowing, once however often the file is read.

        Args:
            text: a sentence without its end.
        """
        if f"{self.title}: {text}" not in self.notes:
            self.notes.append(f"{self.title}: {text}")

    def renamed(self, suffix: str) -> str:
        """Write the shell's command that gives the file another ending.

        Args:
            suffix: with its dot.

        Returns:
            The command.
        """
        path = PurePath(str(self))
        packed = path.suffix if path.suffix.lower() in PACKED_SUFFIXES else ""
        plain = path.with_suffix("") if packed else path
        bare = plain.with_suffix("")  # a browser saves rows.jsonl as rows.jsonl.txt
        made = bare if bare.suffix.lower() == suffix else plain.with_suffix(suffix)
        return f"mv {self.quoted} {shlex.quote(str(made) + packed)}"


def content_suffix(path: PurePath) -> str:
    """Find the ending that says what a file holds, a compression's left aside: .jsonl for rows.jsonl.gz.

    Args:
        path: the file.

    Returns:
        The ending in lower case, with its dot.
    """
    if path.suffix.lower() in PACKED_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def kind_of(path: PurePath) -> str | None:
    """Find what kind of rows a file holds, by its ending.

    Args:
        path: the file.

    Returns:
        A value of `KINDS`; None for a file that cannot be read as rows.
    """
    return KINDS.get(content_suffix(path))


def is_archive(path: PurePath) -> bool:
    """Return True for an archive of files, by its ending.

    Args:
        path: the file.

    Returns:
        True if it is one.
    """
    return content_suffix(path) in ARCHIVE_SUFFIXES
