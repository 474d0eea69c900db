"""Promises of reading: rows are slices of the whole, in few reads, and tensors are compared by rows."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shards import TENSORS, write_all
from spying import noting

from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import read_rows, row_blocks, same_values


def test_rows_are_read_as_slices_of_the_whole(tmp_path: Path) -> None:
    write_all(tmp_path, TENSORS)
    info = ModelDirectory.open(tmp_path).tensors["weight"]
    assert torch.equal(info.read(slice(256, 513)), TENSORS["weight"][256:513])
    assert torch.equal(torch.cat([info.read(rows) for rows in row_blocks(info.shape, 1)]), TENSORS["weight"])


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 511, 512, 1000, 12345])
def test_row_blocks_cover_all_rows_and_none_is_small(rows: int) -> None:
    blocks = row_blocks((rows, 3), block_elements=1)
    taken = [list(range(rows)[block]) for block in blocks if block is not None]
    assert [row for block in taken for row in block] == list(range(rows))
    assert all(len(block) >= 256 for block in taken) or len(blocks) == 1
    assert row_blocks(()) == [None]


def test_rows_from_anywhere_are_read_in_few_spans(tmp_path: Path) -> None:
    """Of what cannot be mapped; what can be is indexed."""
    write_all(tmp_path, TENSORS)
    info = ModelDirectory.open(tmp_path).tensors["weight"]
    spans: list[slice] = []
    source = SimpleNamespace(read=noting(lambda name, rows: TENSORS[name][rows], lambda name, rows: spans.append(rows)))
    unmapped = dataclasses.replace(info, source=source, offset=None)
    for wanted in ([0, 1, 2, 7, 9, 10, 699], [5], [698, 699]):
        rows = torch.tensor(wanted)
        assert torch.equal(read_rows(info, rows), TENSORS["weight"][rows])
        assert torch.equal(read_rows(unmapped, rows), TENSORS["weight"][rows])
    assert spans[:4] == [slice(0, 3), slice(7, 8), slice(9, 11), slice(699, 700)]
    assert len(spans) == 6


def test_same_values_are_found_by_rows_whatever_the_dtype(tmp_path: Path) -> None:
    values = torch.arange(600.0 * 4).reshape(600, 4)
    changed = values.clone()
    changed[599, 3] += 1
    write_all(tmp_path, {"a": values, "b": values.int(), "c": changed, "d": values.reshape(4, 600), "e": values[0, 0]})
    found = ModelDirectory.open(tmp_path).tensors
    assert [same_values(found["a"], found[name]) for name in "abcde"] == [True, True, False, False, False]
    assert same_values(found["e"], found["e"])
