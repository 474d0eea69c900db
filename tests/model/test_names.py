"""Promises of tensor names: those that transformers translates are found, and kept for the merge."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import load
from transformers.core_model_loading import WeightRenaming

from qlora_trainer.model import names as checkpoint_names
from qlora_trainer.model.fingerprint import BaseFingerprint


def test_names_that_transformers_translates_are_found_and_remembered_for_the_merge(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name.replace("self_attn", "old"): t for name, t in load_file(tiny_llama / "model.safetensors").items()}
    directory = tmp_path / "renamed"
    shutil.copytree(tiny_llama, directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    renaming = WeightRenaming(r"\.old\.", r"\.self_attn\.")
    monkeypatch.setattr(checkpoint_names, "conversion_mapping", lambda model: ([renaming], []))
    base, plain = load(directory), load(tiny_llama)
    assert base.fingerprint.difference(plain.fingerprint) is None
    assert plain.fingerprint.stored_as == {}
    assert len(base.fingerprint.stored_as) == 8
    assert base.fingerprint.stored_as["model.layers.0.self_attn.q_proj.weight"] == "model.layers.0.old.q_proj.weight"
    assert BaseFingerprint.from_json(base.fingerprint.to_json()) == base.fingerprint
