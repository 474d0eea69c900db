"""Promises of a fingerprint: a base is known on every device and in every dtype, and another base is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from marks import slow_but
from safetensors.torch import load_file
from tiny_models import load, scale_tensor

from qlora_trainer.common.errors import CheckpointError
from qlora_trainer.common.hashing import bytes_sha256
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.fingerprint import BaseFingerprint, base_fingerprint
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.weights.bitsandbytes_format import check_dequantization

Config = Callable[..., RunConfig]


def test_a_fingerprint_survives_json_and_says_what_differs(tiny_llama: Path) -> None:
    base = load(tiny_llama)
    assert len(base.fingerprint.tensors) == 14
    again = BaseFingerprint.from_json(json.loads(json.dumps(base.fingerprint.to_json())))
    assert again == base.fingerprint
    assert again.difference(base.fingerprint) is None
    layer = base.model.get_submodule("model.layers.0.mlp.up_proj")
    layer.packed[0] ^= 1
    changed = base_fingerprint(base.model, {}, torch.bfloat16)
    assert "1 of 14 layers holds other weights, such as model.layers.0.mlp.up_proj" in (again.difference(changed) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_base_on_cuda_holds_the_same_codes_as_on_the_cpu(tiny_llama: Path) -> None:
    on_cpu = load(tiny_llama, device="cpu")
    on_cuda = load(tiny_llama, device="cuda")
    assert on_cuda.compute_dtype in (torch.bfloat16, torch.float16)
    assert on_cpu.fingerprint.difference(on_cuda.fingerprint) is None
    check_dequantization(torch.device("cuda"))


def test_the_fingerprint_made_while_loading_is_that_of_the_loaded_model(tiny_models: Callable[[str], Path]) -> None:
    """The tensors of the checkpoint as they lie on disk, the packed codes, and what stayed dense, before the cast."""
    for family in ("llama_tied", "qwen2", "gpt2"):
        directory = tiny_models(family)
        found = load(directory, compute_dtype="bfloat16")
        config = json.loads((directory / "config.json").read_text())
        again = base_fingerprint(found.model, config, torch.bfloat16)  # nothing was cast
        assert dataclasses.replace(found.fingerprint, sources={}) == again
        source = load_file(directory / "model.safetensors")
        assert found.fingerprint.sources == {name: bytes_sha256(tensor) for name, tensor in source.items()}


@pytest.mark.parametrize(
    "name", slow_but(["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"], "model.embed_tokens.weight")
)
def test_a_base_with_another_dense_tensor_is_refused_on_resume(tiny_config: Config, own_base: Path, name: str) -> None:
    run = start_run(tiny_config(model={"name": str(own_base)}))
    scale_tensor(own_base, name, 1.5)
    with pytest.raises(CheckpointError, match=rf"1 of 7 tensors outside the 4-bit layers differs, such as {name}"):
        resume_run(run.directory)


def test_a_base_with_the_same_codes_and_other_scales_is_refused_on_resume(tiny_config: Config, own_base: Path) -> None:
    """Twice the weights have the same 4-bit codes."""
    run = start_run(tiny_config(model={"name": str(own_base)}))
    scale_tensor(own_base, "model.layers.1.mlp.up_proj.weight", 2.0)
    with pytest.raises(
        CheckpointError, match=r"1 of 14 layers holds other weights, such as model\.layers\.1\.mlp\.up_"
    ):
        resume_run(run.directory)


def test_another_config_of_the_base_is_refused_with_the_key_that_changed(tiny_config: Config, own_base: Path) -> None:
    run = start_run(tiny_config(model={"name": str(own_base)}))
    path = own_base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"transformers_version": "4.0.0", "use_cache": False, "dtype": "float32"}))
    resume_run(run.directory)
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with pytest.raises(
        CheckpointError, match=r"config\.json differs in rms_norm_eps \(rms_norm_eps was .* and is 0\.5"
    ):
        resume_run(run.directory)


def test_a_base_is_the_same_in_every_compute_dtype(tiny_config: Config) -> None:
    fingerprints = [
        start_run(tiny_config(dtype, model={"compute_dtype": dtype})).base.fingerprint
        for dtype in ("float32", "bfloat16")
    ]
    assert fingerprints[0] == fingerprints[1]


def test_a_last_bit_of_the_statistics_does_not_make_another_base(tiny_config: Config) -> None:
    """The offset is a mean, summed otherwise by other devices and numbers of threads."""
    run = start_run(tiny_config())
    layer = run.base.model.get_submodule("model.layers.0.mlp.up_proj").base
    original = base_fingerprint(run.base.model, {}, torch.bfloat16)
    layer.offset.copy_(torch.nextafter(layer.offset, torch.tensor(1.0)))
    assert original.difference(base_fingerprint(run.base.model, {}, torch.bfloat16)) is None
    layer.offset.mul_(1.001)
    assert original.difference(base_fingerprint(run.base.model, {}, torch.bfloat16)) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_base_is_the_same_on_cpu_and_cuda(tiny_config: Config) -> None:
    runs_of = [start_run(tiny_config(device, model={"device": device})) for device in ("cpu", "cuda")]
    first, second = (run.base.fingerprint for run in runs_of)
    assert first.difference(second) is None
    assert dataclasses.replace(first, dense={}).difference(second) is not None
