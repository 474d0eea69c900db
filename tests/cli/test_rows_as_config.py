"""Rows that are typed where a config is meant are recognized, and the line of the message reads them."""

import bz2
import gzip
import io
import json
import lzma
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import openpyxl
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from qlora_trainer.cli.rows_as_config import is_rows
from qlora_trainer.common.errors import QLoRATrainerError
from qlora_trainer.data.reading.data_file import ARCHIVE_SUFFIXES, KINDS, PACKED_SUFFIXES

Qlora = Callable[..., tuple[int, str, str]]
ROWS = [{"question": f"what is {number} and one", "answer": f"it is {number + 1}"} for number in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = pyarrow.Table.from_pylist(ROWS)
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    ".zstd": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}
TEXTS = {
    "jsonl": LINES,
    "csv": b"question,answer\nwhat is one,it is one\nwhat is two,it is two\n",
    "tsv": b"question\tanswer\nwhat is one\tit is one\nwhat is two\tit is two\n",
    "txt": b"a text of some words\n",
    "json": json.dumps(ROWS).encode(),
}
JSON = {
    "array.json": json.dumps(ROWS),
    "array_over_lines.json": json.dumps(ROWS, indent=1),
    "lines.json": LINES.decode(),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "one.json": json.dumps({**ROWS[0], "model": "gpt-4", "data": "x"}),
    "by_columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}),
}


def write_table(path: Path) -> None:
    match path.suffix:
        case ".parquet":
            pyarrow.parquet.write_table(TABLE, str(path))
        case ".arrow":
            with pyarrow.ipc.new_file(str(path), TABLE.schema) as file:
                file.write_table(TABLE)
        case ".feather":
            pyarrow.feather.write_feather(TABLE, str(path))
        case _:
            book = openpyxl.Workbook()
            for row in (list(ROWS[0]), *(list(row.values()) for row in ROWS)):
                book.active.append(row)
            book.save(path)


def write_archive(path: Path) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("rows.jsonl", LINES)
        return
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(LINES)
        file.addfile(member, io.BytesIO(LINES))
    packing = {".tgz": ".gz", ".gz": ".gz", ".tbz2": ".bz2", ".txz": ".xz"}
    content = packed.getvalue()
    path.write_bytes(PACKED[packing[path.suffix]](content) if path.suffix in packing else content)


def written(folder: Path, name: str) -> str:
    """Write rows under a name, and return the word that means them."""
    path = folder / name
    suffix = path.suffix
    if name == "folder":
        path.mkdir()
        (path / "rows.jsonl").write_bytes(LINES)
    elif name == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    elif name == "p*.jsonl":
        (folder / "part.jsonl").write_bytes(LINES)
    elif name in JSON:
        path.write_text(JSON[name])
    elif suffix in ARCHIVE_SUFFIXES or name.endswith(".tar.gz"):
        write_archive(path)
    elif suffix in PACKED:
        path.write_bytes(PACKED[suffix](TEXTS[KINDS[Path(path.stem).suffix]]))
    elif KINDS[suffix] in TEXTS:
        path.write_bytes(TEXTS[KINDS[suffix]])
    else:
        write_table(path)
    return str(path)


ALL = [
    *(f"rows{suffix}" for suffix in (*KINDS, *ARCHIVE_SUFFIXES, ".tar.gz")),
    *(
        f"rows.{kind}{packed}"
        for kind, packed in zip(("jsonl", "csv", "json", "tsv", "txt"), PACKED_SUFFIXES, strict=True)
    ),
    *JSON,
    *("folder", "saved", "p*.jsonl", "a b's.jsonl"),
]


@pytest.mark.parametrize("name", ALL)
def test_the_line_to_type_for_rows_of_every_kind_reads_them(
    qlora: Qlora, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The line is followed until the rows are found good, and for one kind to its end."""

    def stop(*_: object, **__: object) -> None:
        raise QLoRATrainerError("the rows are good")

    word = written(tmp_path, name)
    code, out, reported = qlora("inspect", word, "--model", tiny_llama)
    assert (code, out) == (2, "")
    message, _, line = reported.partition(". Rows go with --data: ")
    assert message == f"error {word} is rows, not a YAML config"
    typed = shlex.split(line)
    assert typed == ["qlora", "inspect", "--model", str(tiny_llama), "--data", word]
    if name == "rows.jsonl.gz":
        code, out, reported = qlora(*typed[1:], "--json")
        assert code == 0, reported
        assert json.loads(out)["sources"][0]["rows"] == len(ROWS)
    else:
        monkeypatch.setattr("qlora_trainer.model.source.resolve_model", stop)
        assert qlora(*typed[1:])[2] == "error the rows are good"


def test_every_command_that_takes_a_config_has_its_own_line(qlora: Qlora, rows: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.csv.xz"
    more.write_bytes(lzma.compress(TEXTS["csv"]))
    example = "--model Qwen/Qwen3-8B"
    for words, line in {
        ("train", rows): f"is rows, not a YAML config. Rows go with --data: qlora train {example} --data {rows}",
        ("train", rows, more): f"are rows, not a YAML config. Rows go with --data: qlora train {example} --data {rows} "
        f"--data {more}",
        ("train", rows, "model.name=m/m"): f"qlora train --data {rows} model.name=m/m",
        ("train", rows, "--data", more): f"qlora train {example} --data {rows} --data {more}",
        ("init", more): f"Rows go with --data: qlora init {example} --data {more}",
        ("inspect", more): f"Rows go with --data: qlora inspect {example} --data {more}",
        ("plan", more): f"is rows, not a YAML config, and plan needs none: qlora plan {example}",
        ("plan", rows, "--model", "m/m"): "and plan needs none: qlora plan --model m/m",
    }.items():
        code, out, reported = qlora(*words)
        assert (code, out) == (2, "")
        assert reported.endswith(line), words


def test_rows_that_cannot_be_read_are_reported_at_once(qlora: Qlora, tmp_path: Path) -> None:
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as file:
        file.writestr("picture.png", b"")
    for name, message in {"rows.parquet.gz": "unpack it: files of this", "rows.zip": "has no file that holds"}.items():
        code, _, reported = qlora("train", tmp_path / name)
        assert code == 2
        assert message in reported


def test_a_config_is_taken_for_no_rows(tmp_path: Path, config_file: Path, tiny_llama: Path) -> None:
    config = {"model": {"name": "m/m"}, "data": {"train": "rows.jsonl"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "lines.json").write_text(json.dumps(config, indent=2))
    (tmp_path / "flow.json").write_text("{model: {name: m/m},\n data: {train: rows.jsonl,},}")
    (tmp_path / "part.json").write_text(json.dumps({"data": {"train": "rows.jsonl"}, "modle": {"name": "m/m"}}))
    words = [config_file, tiny_llama, tmp_path, tmp_path / "none.yaml", tmp_path / "none.jsonl", "adapter.rank=8"]
    words += [tmp_path / f"{name}.json" for name in ("config", "lines", "flow", "part")]
    assert [word for word in words if is_rows(str(word))] == []
