"""Promises of streaming: tensors come in order, and no more than one is read ahead."""

from pathlib import Path

import pytest
import torch

from benchmarks.llama_checkpoint import LlamaShape, make_checkpoint
from qlora_trainer.weights import stream as tensor_stream
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.stream import stream_tensors
from qlora_trainer.weights.tensors import TensorInfo

CPU = torch.device("cpu")


def test_no_more_than_one_tensor_is_read_ahead(tiny_llama: Path) -> None:
    infos = list(ModelDirectory.open(tiny_llama).tensors.values())
    seen: list[str] = []

    def noted(info: TensorInfo) -> bool:  # asked when a tensor is about to be read
        seen.append(info.name)
        return info.name.endswith("norm.weight")

    arrivals = stream_tensors(infos, CPU, stays_on_host=lambda info: False, stays_in_file=noted)
    for taken, arrival in enumerate(arrivals, start=1):
        assert arrival.info is infos[taken - 1]
        assert torch.equal(arrival.values, arrival.info.read())
        assert (arrival.sha256 is None) == arrival.info.name.endswith("norm.weight")
        assert len(seen) <= taken + 1
    assert seen == [info.name for info in infos]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_tensor_larger_than_the_staging_buffers_comes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_stream, "STAGING_BYTES", 1000)
    path = make_checkpoint(tmp_path / "plain", LlamaShape(128, 256, 2, 4, 2, 512))
    infos = list(ModelDirectory.open(path).tensors.values())
    arrivals = stream_tensors(infos, torch.device("cuda"), stays_on_host=lambda info: "norm" in info.name)
    for arrival in arrivals:
        assert arrival.values.device.type == ("cpu" if "norm" in arrival.info.name else "cuda")
        assert torch.equal(arrival.values.cpu(), arrival.info.read())
