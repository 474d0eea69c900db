"""Tensors are read from the file by the import's record, and only while both are as they were."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import GGUF_NAMES, HIDDEN, tiny_weights, write_gguf
from merge_runs import stored as stored_tensors
from transformers import AutoModelForCausalLM

from qlora_trainer.common.errors import FileMissingError, ModelError
from qlora_trainer.common.progress import silent
from qlora_trainer.weights.gguf import reader as gguf_weights
from qlora_trainer.weights.gguf.importer import import_gguf
from qlora_trainer.weights.model_directory import ModelDirectory


def test_value_beyond_float16_keeps_its_tensor_in_float32(tmp_path: Path) -> None:
    weights = tiny_weights()
    weights["model.layers.0.mlp.up_proj.weight"][5, 7] = 1e6
    path = write_gguf(tmp_path / "tiny.gguf", weights, GGMLQuantizationType.Q8_0)
    directory = import_gguf(path, tmp_path / "cache", silent)
    stored = stored_tensors(directory)
    wide = {name for name, tensor in stored.items() if tensor.dim() == 2 and tensor.dtype == torch.float32}
    assert wide == {"model.layers.0.mlp.up_proj.weight"}
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    for name, tensor in stored.items():
        assert torch.equal(tensor, reference[name].to(tensor.dtype)), name
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("text", ["", "{}", '{"file": "x", "tensors": {"a": 1}}', "[1]"])
def test_a_damaged_record_is_reported(tmp_path: Path, text: str) -> None:
    directory = import_gguf(write_gguf(tmp_path / "tiny.gguf", tiny_weights()), tmp_path / "cache", silent)
    (directory / "import.json").write_text(text)
    with pytest.raises(ModelError, match=r"import\.json cannot be read .* Delete "):
        _ = ModelDirectory.open(directory).tensors


def test_a_file_that_is_gone_or_changed_is_reported_and_not_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    directory = import_gguf(path, tmp_path / "cache", silent)
    path.touch()
    with pytest.raises(ModelError, match=r"tiny\.gguf was changed since it was imported"):
        _ = ModelDirectory.open(directory).tensors
    assert import_gguf(path, tmp_path / "cache", silent) == directory  # the same content: only its date was new
    assert ModelDirectory.open(directory).tensors
    path.unlink()
    with pytest.raises(FileMissingError, match=r"tiny\.gguf, from which this base is read, is gone"):
        _ = ModelDirectory.open(directory).tensors


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.F32])
def test_rows_are_those_of_the_whole_tensor(
    tmp_path: Path, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_weights, "CHUNK_ELEMENTS", 7 * HIDDEN)  # so that chunks end within the rows asked for
    directory = import_gguf(write_gguf(tmp_path / "tiny.gguf", tiny_weights(), kind), tmp_path / "cache", silent)
    for name, info in ModelDirectory.open(directory).tensors.items():
        whole = info.read()
        assert whole.shape == info.shape
        for rows in (slice(0, 1), slice(3, 20), slice(31, None), slice(5, 5)):
            assert torch.equal(info.read(rows), whole[rows]), name


def test_what_llama_cpp_permutes_is_read_by_its_recorded_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tiny_weights()
    directory = import_gguf(write_gguf(tmp_path / "tiny.gguf", weights), tmp_path / "cache", silent)
    tensors = json.loads((directory / "import.json").read_text())["tensors"]
    permuted = {name: fields["rows"] for name, fields in tensors.items() if fields["rows"] != "as stored"}
    assert {name.split(".")[-2] for name in permuted} == {"q_proj", "k_proj"}
    assert "otherwise" not in permuted.values()
    assert not list(directory.glob("*.safetensors")), "no copy of the weights is made"
    monkeypatch.setattr(gguf_weights, "translations_of", lambda *_: pytest.fail("transformers was asked again"))
    assert all(
        torch.equal(tensor, torch.from_numpy(weights[name])) for name, tensor in stored_tensors(directory).items()
    )


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("row", [3, 70])
def test_nan_in_a_tensor_is_refused_by_name(
    tmp_path: Path, name: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_weights, "SAMPLE_ELEMENTS", 32 * HIDDEN)
    weights = tiny_weights()
    weights[name][row, 3] = np.nan
    path = write_gguf(tmp_path / "tiny.gguf", weights)
    with pytest.raises(ModelError, match=rf"{GGUF_NAMES[name]} holds NaN"):
        import_gguf(path, tmp_path / "cache", silent)
