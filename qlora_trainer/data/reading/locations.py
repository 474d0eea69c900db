"""Find the files that a path of the config means: a file, a folder, a pattern, an archive; and refuse what is none.

Files of a folder, a pattern or an archive are all of one kind, and in order. Left out: reading them.
"""

import difflib
import glob
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from urllib.parse import unquote, urlsplit

from qlora_trainer.common.errors import DataError, FileMissingError
from qlora_trainer.config.override import override
from qlora_trainer.data.reading.archives import member_names
from qlora_trainer.data.reading.data_file import (
    KINDS,
    PACKED_SUFFIXES,
    TEXT_KINDS,
    DataFile,
    content_suffix,
    is_archive,
    kind_of,
)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{1,3}")
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of the library datasets
_SPLIT_NAME = re.compile(r"(?<![a-z])(train(?:ing)?|test(?:ing)?|eval(?:uation)?|valid(?:ation)?|val|dev)(?![a-z])")
# What to do with a file of another kind, by its ending; {old} is the file, {new} the name of what is made of it.
_OTHER_ENDINGS = {
    ".xls": "an old Excel workbook: save the sheet as CSV or .xlsx.",
    ".ods": "a spreadsheet: save the sheet as CSV or .xlsx.",
    ".pdf": "a document: take the text out of it into a .txt file.",
    ".docx": "a document: save it as plain text (.txt).",
    ".doc": "a document: save it as plain text (.txt).",
    ".md": "plain text by another ending: cp {old} {new}.txt",
    ".rst": "plain text by another ending: cp {old} {new}.txt",
    ".text": "plain text by another ending: cp {old} {new}.txt",
    ".db": "a database: export a table of it as CSV.",
    ".sqlite": "a database: export a table of it as CSV.",
    ".pkl": "a pickle, which can run programs and is not read: write the rows as JSONL.",
    ".pickle": "a pickle, which can run programs and is not read: write the rows as JSONL.",
    ".7z": "an archive: unpack it, then name the folder.",
    ".rar": "an archive: unpack it, then name the folder.",
    ".yaml": "YAML: " + (
        "python3 -c \"import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout, default=str)\" "
        "< {old} > {new}.json"
    ),
}  # fmt: skip
_OTHER_ENDINGS[".yml"] = _OTHER_ENDINGS[".yaml"]


@dataclass(frozen=True)
class Location:
    """Name one file of rows: on disk, or inside an archive that is."""

    path: Path
    name: str  # begins the places of its rows
    member: str | None = None  # of an archive

    @property
    def content_name(self) -> PurePath:
        """Return the name whose ending says what the file holds."""
        return PurePath(self.member) if self.member is not None else self.path


@dataclass(frozen=True)
class Found:
    """List the files that a path means, and the names of those that were passed over, as they hold no rows."""

    files: Sequence[Location]
    kind: str  # of all of them, a value of KINDS
    passed_over: Sequence[str] = ()


def refuse_url(path: str) -> None:
    """Refuse a URL, with the command that fetches the file.

    Args:
        path: of the config.

    Raises:
        DataError: it is one.
    """
    if not _URL.match(path):
        return
    scheme, where = path.partition(":")[0].lower(), urlsplit(path)
    name = PurePath(unquote(where.path)).name or "rows.jsonl"
    then = override("data.train", name)
    if scheme == "file":
        raise DataError(f"{path} is a URL. Name the file itself: {override('data.train', _local(path))}")
    if scheme in ("http", "https"):
        page = re.fullmatch(r"/datasets/([\w.-]+(?:/[\w.-]+)?)/?", where.path)
        if where.hostname in ("huggingface.co", "hf.co") and page:
            raise DataError(f"{path} is the page of a hub data set. Name the data set: data.train={page[1]}")
        fetch = f"curl -fL {shlex.quote(_raw(path))} -o {shlex.quote(name)}"
    elif scheme == "hf" and (parts := re.fullmatch(r"hf:/+datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", path)):
        revision = f" --revision {shlex.quote(unquote(parts[2]))}" if parts[2] else ""
        fetch = f"hf download --repo-type dataset {parts[1]} {shlex.quote(parts[3])}{revision} --local-dir ."
        then = override("data.train", parts[3])
    elif scheme == "hf":
        data_set = path.partition(":")[2].strip("/").removeprefix("datasets/")
        raise DataError(f"{path} is a URL. Name the hub data set: {override('data.train', data_set)}")
    elif scheme in ("s3", "s3a"):
        fetch = f"aws s3 cp {shlex.quote('s3' + path[len(scheme) :])} ."
    elif scheme in ("gs", "gcs"):
        fetch = f"gcloud storage cp {shlex.quote('gs' + path[len(scheme) :])} ."
    else:
        raise DataError(f"{path} is a URL, and rows are read from files. Fetch it, then: {then}")
    raise DataError(f"{path} is a URL, and rows are read from files. Fetch it: {fetch}\nThen: {then}")


def _local(url: str) -> str:
    return unquote(re.sub(r"^file:/*(localhost/)?", "/", url, flags=re.IGNORECASE))


def _raw(url: str) -> str:
    """Return the address of the file itself, where the URL is that of a page about it."""
    url = re.sub(r"^(https?://(?:huggingface|hf)\.co/datasets/[^/]+/[^/]+)/blob/", r"\1/resolve/", url)
    return re.sub(r"^https?://github\.com/([^/]+/[^/]+)/blob/", r"https://raw.githubusercontent.com/\1/", url)


def is_pattern(path: str) -> bool:
    """Return True for a pattern of file names, unless a file has it for its name.

    Args:
        path: of the config.

    Returns:
        True if it is one.
    """
    return glob.has_magic(path) and not Path(path).expanduser().exists()


def find_files(path: str) -> Found:
    """Find the files that a local path means.

    Args:
        path: of a file, a folder or an archive, or a pattern.

    Returns:
        The files, at least one.

    Raises:
        FileMissingError: there is no such file.
        DataError: no file there holds rows, or they are of several kinds.
    """
    local = Path(path).expanduser()
    if is_pattern(path):
        return _of_one_kind(path, _matches(path), has_all=False)
    if local.is_dir():
        return _of_one_kind(path, _walked(local), has_all=True)
    _check_exists(local, path)
    if is_archive(local):
        return _of_one_kind(path, ([Location(local, local.name)], []), has_all=True)
    kind = kind_of(local)
    if kind is None:
        raise DataError(_of_no_kind(local))
    _check_not_packed(local, kind)
    return Found([Location(local, local.name)], kind)


def _matches(pattern: str) -> tuple[list[Location], list[str]]:
    expanded = os.path.expanduser(pattern)  # noqa: PTH111  a Path would drop the ./ and // of a pattern
    base = Path(expanded.partition("*")[0].partition("?")[0].partition("[")[0] + "x").parent
    paths = [Path(name) for name in sorted(glob.glob(expanded, recursive=True))]  # noqa: PTH207  with ** as in a shell
    files = [path for path in paths if path.is_file()]
    if not files:
        raise FileMissingError(f"No file matches {pattern}." + (f" There is a folder {paths[0]}." if paths else ""))
    return [Location(file, str(file.relative_to(base))) for file in files], []


def _walked(folder: Path) -> tuple[list[Location], list[str]]:
    """List a folder's files by their path, its folders too; hidden ones and links to folders are left out."""
    files, passed_over = [], []
    for root, names, file_names in os.walk(folder):
        links = [Path(root) / name for name in names if (Path(root) / name).is_symlink()]
        passed_over += [str(link.relative_to(folder)) for link in links]
        names[:] = sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")
        files += [Path(root) / name for name in file_names if not name.startswith(".") and name not in _METADATA]
    name = folder.absolute().name
    return [Location(file, f"{name}/{file.relative_to(folder)}") for file in sorted(files)], passed_over


def _of_one_kind(path: str, found: tuple[list[Location], list[str]], has_all: bool) -> Found:
    files, passed_over = found
    rows: list[Location] = []
    for file in files:
        inside = _inside(file) if is_archive(file.path) else [file]
        rows += [one for one in inside if kind_of(one.content_name)]
        passed_over = passed_over + [one.name for one in inside if not kind_of(one.content_name)]
    by_kind: dict[str, list[Location]] = {}
    for one in rows:
        by_kind.setdefault(kind_of(one.content_name) or "", []).append(one)
    if not by_kind:
        raise DataError(
            f"{path} has no file that holds rows; it has {', '.join(passed_over[:8]) or 'none at all'}. {_known()}"
        )
    if len(by_kind) > 1:
        raise DataError(
            f"{path} has files of several kinds: {_kinds(by_kind)}. Name those of one kind{_pattern(by_kind)}"
        )
    if has_all:  # that are there, not those that a pattern names
        _check_splits(path, rows)
    (kind,) = by_kind
    for one in rows:
        _check_not_packed(one.content_name, kind)
    return Found(rows, kind, passed_over)


def _inside(archive: Location) -> list[Location]:
    names = [name for name in member_names(archive.path) if not _is_hidden(name)]
    return [Location(archive.path, f"{archive.name}/{name}", name) for name in names]


def _is_hidden(name: str) -> bool:
    path = PurePath(name)
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts) or path.name in _METADATA


def _kinds(by_kind: dict[str, list[Location]]) -> str:
    return ", ".join(f"{len(files)} {content_suffix(files[0].content_name)}" for files in by_kind.values())


def _pattern(by_kind: dict[str, list[Location]]) -> str:
    """Write a setting that names the files of the most common kind, where they lie in one folder."""
    most = max(by_kind.values(), key=len)
    folders, endings = {file.path.parent for file in most}, {"".join(file.path.suffixes[-1:]) for file in most}
    if any(file.member for file in most) or len(folders) > 1 or len(endings) > 1:
        return ", after unpacking what is packed."
    pattern = str(folders.pop() / f"*{endings.pop()}")
    return f": {override('data.train', pattern)}"


def _check_splits(path: str, files: Iterable[Location]) -> None:
    """Refuse a folder that by its names holds rows for training and others for evaluation."""
    by_split: dict[bool, list[Location]] = {}
    for file in files:
        if named := _SPLIT_NAME.search(file.name.partition("/")[2].lower()):
            by_split.setdefault(named[1].startswith("train"), []).append(file)
    if len(by_split) < 2:
        return
    train, other = by_split[True], by_split[False]
    way_out = "Unpack it, and name them apart: data.train and data.eval."
    if not any(file.member for file in [*train, *other]):
        sets = {"train": train, "eval": other}
        settings = " ".join(override(f"data.{key}", _one_or_list(group)) for key, group in sets.items())
        way_out = f"Name them apart: {settings}"
    raise DataError(
        f"{path} has files for training and others for evaluation, by their names: {train[0].name}, {other[0].name}. "
        f"{way_out}"
    )


def _one_or_list(files: Sequence[Location]) -> str | list[str]:
    return str(files[0].path) if len(files) == 1 else [str(file.path) for file in files]


def _check_not_packed(path: PurePath, kind: str) -> None:
    if kind not in TEXT_KINDS and path.suffix.lower() in PACKED_SUFFIXES:
        raise DataError(
            f"{path}: unpack it: files of this kind are compressed inside already, and are not read from front to back."
        )


def _known() -> str:
    packed = ", ".join(PACKED_SUFFIXES)
    return f"Known endings: {', '.join(KINDS)}; those of text also with {packed}; and .zip and .tar archives."


def _of_no_kind(path: Path) -> str:
    if way_out := _OTHER_ENDINGS.get(path.suffix.lower()):
        made = shlex.quote(str(path.with_suffix("")))
        return f"{path} is {way_out.format(old=DataFile(path).quoted, new=made)}"
    return f"{path} is of no kind that can be read. {_known()}"


def _check_exists(path: Path, given: str) -> None:
    if path.is_file():
        return
    if path.exists():
        raise DataError(
            f"{path} is no regular file, but a pipe or a device, and data is read more than once. Write it into a file."
        )
    several = [part for part in re.split(r"[,\s]+", given.strip("[] ")) if part]
    siblings = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.6)
    if len(several) > 1 and all(Path(part).expanduser().exists() for part in several):
        hint = f"Several files are a list: {override('data.train', several)}"
    elif not path.parent.is_dir():
        hint = f"There is no directory {path.parent} either."
    elif near:
        hint = f"Did you mean {' or '.join(near)}?"
    else:
        readable = [name for name in siblings if kind_of(PurePath(name))]
        hint = f"That directory has {', '.join(readable[:8]) or 'no data files'}."
    raise FileMissingError(f"There is no file {path}. {hint}")
