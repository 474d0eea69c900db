"""Promises of the plan of a merge: what cannot be merged is refused before anything is written."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from merge_runs import Run, altered, merge_to, on_base, stored
from spying import noting
from torch import Tensor

from qlora_trainer.common.errors import AdapterError, DiskError, MergeError, ModelError, OutputExistsError
from qlora_trainer.merging.merge_plan import plan_merge


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, llama: Run) -> None:
    inputs, prefix = llama.inputs, "base_model.model."
    q_proj = f"{prefix}model.layers.0.self_attn.q_proj"
    head = {f"{prefix}lm_head.lora_A.weight": torch.ones(8, 64), f"{prefix}lm_head.lora_B.weight": torch.ones(128, 8)}
    tied = {f"{prefix}model.embed_tokens.lora_{factor}.weight": torch.ones(8, 8) for factor in "AB"}
    cases: dict[str, Mapping[str, Tensor | None]] = {
        "which is no part of such an adapter": {f"{prefix}lm_head.weight": torch.ones(128, 64)},
        r"lm_head\.weight has an adapter, but the base's": head,
        r"changes model\.embed_tokens\.weight, which this model ties": tied,
        "has lora_A but not the other half": {f"{q_proj}.lora_B.weight": None},
        r"q_proj\.weight does not fit .* has the shape \(64, 64\)": {f"{q_proj}.lora_B.weight": torch.ones(65, 8)},
        "holds no lora_A and lora_B": dict.fromkeys(inputs.adapter.tensors),
    }
    for message, changes in cases.items():
        with pytest.raises((AdapterError, MergeError), match=message):
            merge_to(altered(inputs, changes), tmp_path / "merged")
    config = inputs.adapter.config.model_copy(update={"bias": "all"})
    biased = dataclasses.replace(inputs, adapter=dataclasses.replace(inputs.adapter, config=config))
    with pytest.raises(MergeError, match=r"q_proj\.bias was trained, but"):
        merge_to(altered(biased, {f"{q_proj}.base_layer.bias": torch.ones(64)}), tmp_path / "merged")
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.float64):
        with pytest.raises(MergeError, match="cannot be written as"):
            merge_to(inputs, tmp_path / "merged", dtype=dtype)
    tensors = inputs.fingerprint.tensors | {
        "model.layers.0.mlp.experts": next(iter(inputs.fingerprint.tensors.values()))
    }
    fused = dataclasses.replace(inputs.fingerprint, tensors=tensors)
    with pytest.raises(MergeError, match=r"experts\.weight was 4-bit in training, but .* transformers fuses"):
        merge_to(dataclasses.replace(inputs, fingerprint=fused), tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_a_tensor_of_training_that_the_checkpoint_lacks_is_refused(tmp_path: Path, llama: Run) -> None:
    dense = llama.inputs.fingerprint.dense | {"model.extra.weight": "0" * 64}
    fingerprint = dataclasses.replace(llama.inputs.fingerprint, dense=dense)
    with pytest.raises(MergeError, match=r"model\.extra\.weight was in the base in training, but"):
        merge_to(dataclasses.replace(llama.inputs, fingerprint=fingerprint), tmp_path / "merged")


def test_a_place_in_the_users_home_is_known_by_its_full_path(
    tmp_path: Path, llama: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(OutputExistsError, match="full exists"):
        plan_merge(llama.inputs, Path("~/full"))
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", noting(lambda path: SimpleNamespace(free=2**40), asked.append))
    plan_merge(llama.inputs, Path("~/merged"))
    assert asked == [tmp_path]


def test_output_needs_an_empty_place_and_space_on_the_disk(
    tmp_path: Path, llama: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "adapter_config.json").write_text("{}")  # loaders would apply the adapter a second time
    with pytest.raises(OutputExistsError, match="not empty"):
        merge_to(llama.inputs, tmp_path / "full")
    adapted = tmp_path / "adapted"
    shutil.copytree(llama.inputs.base.path, adapted)
    (adapted / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter_config"):
        merge_to(on_base(llama.inputs, adapted), tmp_path / "merged")
    planned = plan_merge(llama.inputs, tmp_path / "deep" / "merged").tensors
    assert len(planned) == len(stored(llama.inputs.base.path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
    with pytest.raises(DiskError, match="GiB free"):
        plan_merge(llama.inputs, tmp_path / "deep" / "merged")
    assert not (tmp_path / "deep").exists()
