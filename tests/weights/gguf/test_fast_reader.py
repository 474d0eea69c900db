"""A GGUF file's header is read as gguf's own reader reads it, and once."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFEndian, GGUFReader, GGUFWriter
from gguf_files import tiny_weights, write_gguf

from qlora_trainer.common.progress import silent
from qlora_trainer.weights.gguf.fast_reader import FastReader
from qlora_trainer.weights.gguf.importer import import_gguf

LISTS: dict[str, list[Any]] = {
    "texts": ["a", "", "voilà 日本", "end"],
    "one text": ["a"],
    "integers": [1, -2, 3],
    "floats": [0.5, -1.25],
    "flags": [True, False, True],
}


def write_lists(path: Path, endianess: GGUFEndian = GGUFEndian.LITTLE) -> Path:
    writer = GGUFWriter(path, "llama", endianess=endianess)
    for name, values in LISTS.items():
        writer.add_array(name, values)
        writer.add_string(f"after {name}", name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def described(reader: GGUFReader) -> dict[str, Any]:
    fields = {
        name: (field.offset, field.types, list(field.data), [part.tolist() for part in field.parts], field.contents())
        for name, field in reader.fields.items()
    }
    return fields | {tensor.name: (tensor.data_offset, tensor.data.tolist()) for tensor in reader.tensors}


@pytest.mark.parametrize("endianess", [GGUFEndian.LITTLE, GGUFEndian.BIG])
def test_lists_are_read_as_ggufs_reader_reads_them(tmp_path: Path, endianess: GGUFEndian) -> None:
    path = write_lists(tmp_path / "lists.gguf", endianess)
    reader = FastReader(path)
    assert described(reader) == described(GGUFReader(path))
    assert {name: reader.fields[name].contents() for name in LISTS} == LISTS


def test_a_models_file_is_read_as_ggufs_reader_reads_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    assert described(FastReader(path)) == described(GGUFReader(path))


@pytest.mark.parametrize("name", ["texts", "integers"])
def test_a_list_that_ends_after_the_file_is_refused(tmp_path: Path, name: str) -> None:
    path = write_lists(tmp_path / "lists.gguf")
    count = FastReader(path).fields[name].parts[4]
    content = bytearray(path.read_bytes())
    place = content.index(name.encode()) + len(name) + 8  # after the type of the value, and that of the items
    assert content[place : place + 8] == count.tobytes()
    content[place : place + 8] = (2**40).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"after the file|requires a buffer"):
        FastReader(path)


def test_an_import_reads_the_header_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    opened, real = [], GGUFReader.__init__

    def init(self: GGUFReader, path: Any, *options: Any) -> None:
        opened.append(path)
        real(self, path, *options)

    monkeypatch.setattr(GGUFReader, "__init__", init)
    import_gguf(path, tmp_path / "cache", silent)
    assert opened == [path]
