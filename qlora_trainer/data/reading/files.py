"""Read what a config names as records, one at a time, each with the place it came from.

A file, a folder or a pattern of files, an archive, what `save_to_disk` wrote, or a data set on the hub. Nothing is
skipped here: a row that cannot be read comes as its error, so that the caller may stop or count it, and what is wrong
with a file as a whole is raised. Left out: which files are meant (locations.py), bytes and text (streams.py), the kinds
of file (json_rows.py, tables.py, columnar.py).
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qlora_trainer.common.errors import DataError, QLoRATrainerError, first_line
from qlora_trainer.common.file_identity import file_sha256
from qlora_trainer.common.units import counted
from qlora_trainer.data.reading import streams
from qlora_trainer.data.reading.archives import unpacked_members
from qlora_trainer.data.reading.columnar import read_arrow, read_excel, read_parquet
from qlora_trainer.data.reading.data_file import HEADER_KINDS, TEXT_KINDS, DataFile, is_archive, kind_of
from qlora_trainer.data.reading.hub import is_saved, load_hub, load_saved
from qlora_trainer.data.reading.json_layouts import Placed
from qlora_trainer.data.reading.json_rows import read_json, read_jsonl
from qlora_trainer.data.reading.locations import Found, Location, find_files, is_pattern, refuse_url
from qlora_trainer.data.reading.tables import read_table, table_suffix
from qlora_trainer.data.reading.values import without_nulls

if TYPE_CHECKING:
    import datasets

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MOST_NAMED = 3
# Which keys of a source have an effect on which kinds of files.
_EFFECTS = {
    "encoding": TEXT_KINDS,
    "header": HEADER_KINDS,
    "rows": ("json", "jsonl"),
}


@dataclass(frozen=True)
class RecordSource:
    """Name where records come from. `digest` names the content and how it is read.

    `records` starts from the first record each time: the place of each, such as "rows.jsonl, line 12", with the record,
    or with a DataError where that row cannot be read but the next one can. It raises DataError for faults of the file.
    While it is taken, `notes` gets sentences on how files were read. `effects` has those of the keys encoding, header
    and rows that mean something for these files.
    """

    name: str
    digest: str
    records: Callable[[], Iterator[Placed]]
    path: str = ""  # complete, for messages
    summary: str = ""  # which files are read, where the name alone does not say it
    lines: int | None = None  # of files with one row a line
    effects: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Content:
    """Hold what was found in a file: its sha256 in hexadecimal, and how many newline characters it has."""

    sha256: str
    lines: int | None = None


def open_source(
    path: str,
    split: str = "train",
    *,
    subset: str | None = None,
    encoding: str | None = None,
    header: Sequence[str] = (),
    rows: str | None = None,
    is_document: bool = False,
    content: Callable[[Path], Content] | None = None,
) -> RecordSource:
    """Open local files, or where there are none and the name could be one, a data set on the hub.

    Args:
        path: of a file, folder or archive, a pattern, or the data set's name.
        split: of a hub data set, or of what save_to_disk wrote.
        subset: of a hub data set that has several, or the sheet of a workbook.
        encoding: of a text file, as Python names it; None for UTF-8.
        header: names of the columns of a table without a line of them.
        rows: where the rows are inside a JSON object, such as data.examples.
        is_document: whether a .txt file is a document, though it looks like rows.
        content: finds what is in a local file, maybe from memory; None: it is read.

    Returns:
        The source, nothing of it read but its digest.

    Raises:
        FileMissingError: no such file; the message has near misses.
        DataError: a URL, a file that cannot be opened or holds no rows, a split or subset of a file, or a hub data set
            that cannot be had.
    """
    how = DataFile(Path(), "", "", encoding, tuple(header), rows, is_document, subset)
    content = content or (lambda path: Content(file_sha256(path)))
    with _opening(path):
        match _place(path):
            case "saved":
                _check_is_one_piece(path, "train", subset)
                return _saved_source(Path(path).expanduser(), split, content)
            case "files":
                return _file_source(path, split, how, content)
    found = load_hub(path, split, subset)
    return _of_datasets(f"{path} ({split})", found, found._fingerprint)


def check_path(path: str) -> bool:
    """Look for the local files that a path means, and refuse a URL; a name that may be on the hub is not looked up.

    Args:
        path: as `open_source` takes it.

    Returns:
        True for files; False for what save_to_disk wrote and for a name on the hub, which the library datasets reads.

    Raises:
        FileMissingError: no such file; the message has near misses.
        DataError: a URL, or files that cannot be used.
    """
    with _opening(path):
        is_files = _place(path) == "files"
        if is_files:
            find_files(path)
        return is_files


@contextlib.contextmanager
def _opening(path: str) -> Iterator[None]:
    """Turn an error of the system, or of a ~nobody who is no user here, into one that names the path."""
    try:
        yield
    except QLoRATrainerError:
        raise
    except (OSError, RuntimeError) as error:
        said = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{path} cannot be opened: {said}.") from error


def _place(path: str) -> Literal["saved", "files", "hub"]:
    """Decide what a path means: what save_to_disk wrote, files of rows, or a data set on the hub."""
    refuse_url(path)
    local = Path(path).expanduser()
    if local.is_dir() and is_saved(local):
        return "saved"
    return "files" if local.exists() or is_pattern(path) or _could_be_file(path, local) else "hub"


def _could_be_file(path: str, local: Path) -> bool:
    return bool(kind_of(local)) or is_archive(local) or not _HUB_NAME.fullmatch(path)


def _file_source(path: str, split: str, how: DataFile, content: Callable[[Path], Content]) -> RecordSource:
    found = find_files(path)
    _check_is_one_piece(path, split, how.sheet if found.kind != "excel" else None)
    name = Path(path).expanduser().absolute().name
    contents = {path: content(path) for path in dict.fromkeys(file.path for file in found.files)}
    digest = contents[found.files[0].path].sha256
    if [file.name for file in found.files] != [name]:
        digest = json.dumps([[file.name, contents[file.path].sha256] for file in found.files])
    settings = (how.encoding, list(how.header), how.rows, how.sheet)
    reading = repr(settings) if any(settings) else ""
    lines = [contents[file.path].lines for file in found.files if file.path.suffix == ".jsonl"]
    return RecordSource(
        name=name,
        digest=hashlib.sha256((digest + reading).encode()).hexdigest(),
        records=lambda: _readable(path, _read_all(found, path, how)),
        path=str(Path(path).expanduser().absolute()),
        summary=_summary(name, found),
        lines=sum(count or 0 for count in lines) if len(lines) == len(found.files) and None not in lines else None,
        effects=frozenset(key for key, kinds in _EFFECTS.items() if found.kind in kinds),
        notes=how.notes,
    )


def _summary(name: str, found: Found) -> str:
    """Say how many files are read, and which were passed over."""
    if [file.name for file in found.files] == [name]:
        return ""
    named = [file.name for file in found.files]
    listed = ", ".join(named if len(named) <= _MOST_NAMED else [named[0], "…", named[-1]])
    passed = ", ".join(found.passed_over[:_MOST_NAMED]) + ", …" * (len(found.passed_over) > _MOST_NAMED)
    return (
        f"{name}: {counted(len(named), 'file')} {'is' if len(named) == 1 else 'are'} read: {listed}"
        + f"; passed over: {passed}" * bool(passed)
    )


def _read_all(found: Found, path: str, how: DataFile) -> Iterator[Placed]:
    """Read all files in order; each archive is gone through once."""
    is_empty = True
    for file in _opened(found.files, how):
        none = True
        for place, record in _read(file, found.kind):
            none = False
            yield f"{file.title}, {place}", record
        is_empty = is_empty and none
        if none and len(found.files) > 1:
            file.note("holds no rows")
    if is_empty:
        raise DataError(f"{path} holds no rows.")


def _opened(files: Iterable[Location], how: DataFile) -> Iterator[DataFile]:
    """Make each file ready to be read, out of its archive where it is in one."""
    for archive, group in itertools.groupby(files, key=lambda file: file.path if file.member else None):
        if archive is None:
            yield from (dataclasses.replace(how, path=file.path, name=file.name) for file in group)
            continue
        names = {file.member: file.name for file in group if file.member}
        for member, copy in unpacked_members(archive, set(names)):
            yield dataclasses.replace(how, path=copy, name=names[member], location=f"{archive}/{member}")


def _read(file: DataFile, kind: str) -> Iterator[Placed]:
    match kind:
        case "jsonl":
            return read_jsonl(file)
        case "json":
            return read_json(file)
        case "csv" | "tsv":
            return read_table(file, "," if kind == "csv" else "\t")
        case "parquet":
            return read_parquet(file)
        case "arrow":
            return read_arrow(file)
        case "excel":
            return read_excel(file)
    return _read_text(file)


def _read_text(file: DataFile) -> Iterator[Placed]:
    """Read the whole file as one document; rendering cuts it into rows of full length."""
    text = streams.whole(file)
    if not file.is_document and (found := _rows_in_text(text)):
        what, suffix = found
        raise DataError(
            f"{file} looks like {what}, and a .txt file is read as one plain text. To read its rows, give it the "
            f"ending of that kind: {file.renamed(suffix)}\nTo train on the text as it is: data.format=text"
        )
    if text.strip():
        yield "line 1", {"text": text.replace("\r\n", "\n")}


def _rows_in_text(text: str) -> tuple[str, str] | None:
    """Find whether a text holds rows, by its first lines.

    Returns:
        What it looks like, and the ending of such files; None for a plain text.
    """
    head = text[:100_000]
    cut = head if len(head) == len(text) else head[: head.rfind("\n") + 1]
    lines = [line for line in cut.split("\n") if line.strip()][:20]
    if lines and all(_is_json_row(line) for line in lines):
        return "JSON lines", ".jsonl"
    if re.match(r'\s*(\{\s*"[^"\n]*"\s*:|\[\s*(\[|\{\s*"))', head):
        return "JSON", ".json"
    if suffix := table_suffix(lines):
        return "a table", suffix
    return None


def _is_json_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def _check_is_one_piece(path: str, split: str, subset: str | None) -> None:
    """Refuse a part of a file: it is read whole, so an eval split of itself would be trained on and measured."""
    given = [f"split {split}"] if split != "train" else []
    given += [f"subset {subset}"] if subset else []
    if given:
        raise DataError(
            f"{path} is a file, and {' and '.join(given)} would have no effect: only hub data sets have such parts, a "
            "file is read whole. Leave that out, or put the rows that are meant into a file of their own."
        )


def _saved_source(folder: Path, split: str, content: Callable[[Path], Content]) -> RecordSource:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    digest = json.dumps([split, *([str(file.relative_to(folder)), content(file).sha256] for file in files)])
    name = folder.absolute().name
    return _of_datasets(name, load_saved(folder, split), hashlib.sha256(digest.encode()).hexdigest())


def _of_datasets(name: str, rows: "datasets.Dataset", digest: str) -> RecordSource:
    if not len(rows):
        raise DataError(f"{name} holds no rows.")

    def records() -> Iterator[Placed]:
        for number, record in enumerate(rows, start=1):
            yield f"{name}, row {number}", {column: without_nulls(value) for column, value in record.items()}

    return RecordSource(name, digest, lambda: _readable(name, records()), path=name)


def _readable(path: str, records: Iterator[Placed]) -> Iterator[Placed]:
    """Pass records on; an error of the system while they are read is one of the file, not of where they are going."""
    try:
        yield from records
    except QLoRATrainerError:
        raise
    except OSError as error:
        raise DataError(
            f"{path} cannot be read any further: {error.strerror or first_line(error)}. Look at the disk or network "
            "that it lies on, then try again."
        ) from error
