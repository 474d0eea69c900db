"""Promises of the weights as in training: of either copy of the base the same bits, and of another base none."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from marks import slow_but
from merge_runs import Run, by_hand, merge_to, on_base, stored, train, verifier
from prequantized import prequantized
from safetensors.torch import load_file, save_file

from qlora_trainer.common.errors import CheckpointError, MergeError
from qlora_trainer.merging.merge_plan import MergeInputs
from qlora_trainer.weights.model_directory import ModelDirectory


def test_a_prequantized_base_merges_without_its_16_bit_copy(tmp_path: Path, llama: Run) -> None:
    run = train(prequantized(llama.inputs.base.path, tmp_path / "base"))
    merge_to(run.inputs, tmp_path / "merged", verify=verifier(run))
    merge_to(llama.inputs, tmp_path / "from_plain")
    merged, from_plain = stored(tmp_path / "merged"), stored(tmp_path / "from_plain")
    assert merged.keys() == from_plain.keys()
    assert all(torch.equal(merged[name], from_plain[name]) for name in merged)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with pytest.raises(MergeError, match="no original weights"):
        merge_to(run.inputs, tmp_path / "original", base="original")


def test_a_base_other_than_the_one_trained_is_refused(tmp_path: Path, llama: Run) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama.inputs.base.path, other)
    name = "model.layers.0.mlp.up_proj.weight"
    file = ModelDirectory.open(other).tensors[name].file
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name][3, 5] *= -1.0
    save_file(tensors, file, metadata={"format": "pt"})
    for base in ("dequantized", "original"):
        with pytest.raises(CheckpointError, match=f"{name} in .* does not give the 4-bit weights"):
            merge_to(on_base(llama.inputs, other), tmp_path / "merged", base=base)
    assert not (tmp_path / "merged").exists()

    fingerprint = llama.inputs.fingerprint
    path, recorded = next(iter(fingerprint.tensors.items()))

    def with_offset(factor: float) -> MergeInputs:
        changed = dataclasses.replace(recorded, offset=recorded.offset * factor)
        tensors = fingerprint.tensors | {path: changed}
        return dataclasses.replace(llama.inputs, fingerprint=dataclasses.replace(fingerprint, tensors=tensors))

    with pytest.raises(CheckpointError, match="offset"):
        merge_to(with_offset(1.00001), tmp_path / "merged")
    merge_to(with_offset(1.0000004), tmp_path / "merged", dtype=torch.float32)  # as summed in another order
    found = stored(tmp_path / "merged")[f"{path}.weight"]
    expected = by_hand(llama, f"{path}.weight", stored(llama.inputs.base.path)[f"{path}.weight"])
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found, expected)  # the recorded offset was used


def test_a_changed_tensor_that_is_not_4_bit_is_refused_by_name(tmp_path: Path, llama: Run) -> None:
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        other = tmp_path / name
        shutil.copytree(llama.inputs.base.path, other)
        file = ModelDirectory.open(other).tensors[name].file
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        tensors[name].view(-1)[5] += 0.5
        save_file(tensors, file, metadata={"format": "pt"})
        for base in ("dequantized", "original"):
            with pytest.raises(CheckpointError, match=f"{name} in .* holds other values than in training"):
                merge_to(on_base(llama.inputs, other), tmp_path / "merged", base=base)
        assert not (tmp_path / "merged").exists()


def test_changed_block_scales_of_a_prequantized_base_are_refused(tmp_path: Path, llama: Run) -> None:
    """The packed codes and the mean are those of training, but every other block has its neighbor's scale."""
    directory = prequantized(llama.inputs.base.path, tmp_path / "base")
    merge_to(on_base(llama.inputs, directory), tmp_path / "merged")
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    file = ModelDirectory.open(directory).tensors[name].file
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight in .* does not give the 4-bit weights"):
        merge_to(on_base(llama.inputs, directory), tmp_path / "again")


@pytest.mark.parametrize("dtype", slow_but([torch.float16, torch.bfloat16, torch.float32], torch.float32))
def test_a_run_merges_from_either_copy_of_its_base_to_the_same_bits(
    tmp_path: Path, llama: Run, dtype: torch.dtype
) -> None:
    copy = prequantized(llama.inputs.base.path, tmp_path / "copy")
    on_copy = train(copy).inputs
    merged = []
    for trained, inputs in (("original", llama.inputs), ("copy", on_copy)):
        for directory in (llama.inputs.base.path, copy):
            output = tmp_path / f"{trained}-{directory.name}"
            merge_to(on_base(inputs, directory), output, dtype=dtype, max_shard_bytes=100_000)
            merged.append(stored(output))
    assert len(merged) == 4
    for tensors in merged[1:]:
        assert tensors.keys() == merged[0].keys()
        assert all(tensors[name].dtype == dtype and torch.equal(tensors[name], merged[0][name]) for name in tensors)
