"""Promises of the 4-bit base: the quantization asked for, of finite weights, of every linear layer but the head."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from cards import pretend_free_memory
from marks import slow_but
from prequantized import prequantized
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, make_model_directory
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    GraniteMoeConfig,
)
from transformers.core_model_loading import WeightRenaming

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4
from qlora_kernels.nf4_reference import MIDPOINTS
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import (
    DiskError,
    FileMissingError,
    InsufficientMemoryError,
    ModelError,
    QLoRATrainerError,
    QuantizationError,
)
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.model import names as checkpoint_names
from qlora_trainer.model.fingerprint import BaseFingerprint, base_fingerprint, is_same, tensor_fingerprint
from qlora_trainer.model.load import Base, check_mergeable, load_base_model, load_dense_model, plan_base
from qlora_trainer.model.modules.nf4_linear import NF4Linear, adopt_linear4bit, quantized_fraction
from qlora_trainer.model.source import resolve_model
from qlora_trainer.planning.fake_tensors import FakeRun
from qlora_trainer.weights.bitsandbytes_format import check_dequantization, weight_from_checkpoint, weight_to_checkpoint
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.nf4 import WEIGHT_TENSORS, quantize_weight

CPU = torch.device("cpu")


def load(directory: Path, **settings: object) -> Base:
    return load_base_model(ModelDirectory.open(directory), ModelConfig(name=str(directory), **settings), user_cache())


@pytest.mark.parametrize("family", slow_but(sorted(FAMILIES), "gpt2", "llama", "llama_tied"))
def test_every_linear_but_the_lm_head_is_nf4_and_all_is_frozen(family: str, tiny_models: Callable[[str], Path]) -> None:
    base = load(tiny_models(family))
    head = base.model.get_output_embeddings()
    linears = [name for name, m in base.model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    assert linears == []
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in base.model.modules())
    assert isinstance(head, nn.Linear)
    assert base.quantized_fraction == 1.0
    assert not any(p.requires_grad for p in base.model.parameters())
    assert all(p.dtype == torch.float32 for p in base.model.parameters())


def test_a_tied_head_stays_tied_and_dense(tiny_models: Callable[[str], Path]) -> None:
    model = load(tiny_models("llama_tied")).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_are_quantized_from_the_checkpoints_own_values(tiny_llama: Path) -> None:
    """bf16 weights in the checkpoint, fp32 compute: the codes are those of the bf16 values, as everywhere else."""
    source = load_file(tiny_llama / "model.safetensors")
    base = load(tiny_llama)
    assert base.fingerprint.source_dtype == "bfloat16"
    layers = {name: m for name, m in base.model.named_modules() if isinstance(m, NF4Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        packed, state = bnb.functional.quantize_4bit(
            source[f"{name}.weight"], blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(layer.packed, packed.reshape(-1)), name
        assert torch.equal(layer.absmax, state.absmax)
        assert torch.equal(layer.offset, state.offset)


def test_the_layer_computes_with_the_dequantized_weight(tiny_llama: Path) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 128), torch.randn(96)
    layer = NF4Linear(quantize_weight(weight), bias)
    x = torch.randn(5, 128)
    dense = dequantize_nf4(layer.nf4_weight, torch.float32)
    assert torch.equal(layer(x), nn.functional.linear(x, dense, bias))
    assert 0 < float((dense - weight).abs().mean()) < 0.1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    directory = make_model_directory(tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* not finite"):
        load(directory)
    with pytest.raises(QuantizationError, match="holds 1 value"):
        quantize_weight(torch.tensor([[1.0, bad]]))


def quantized(**settings: object) -> nn.Sequential:
    layer = bnb.nn.Linear4bit(64, 64, bias=False, **settings)
    return nn.Sequential(layer).to("cpu")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_type": "fp4"}, "type fp4"),
        ({"quant_type": "nf4", "compress_statistics": False}, "double quantization False"),
        ({"quant_type": "nf4", "quant_storage": torch.bfloat16}, "storage bfloat16"),
    ],
)
def test_a_layer_quantized_otherwise_is_refused(settings: dict, reason: str) -> None:
    with pytest.raises(QuantizationError, match=reason):
        adopt_linear4bit(quantized(**settings))


def test_a_prequantized_checkpoint_loads_to_the_same_base(tiny_llama: Path, tmp_path: Path) -> None:
    ours = load(tiny_llama)
    theirs = load(prequantized(tiny_llama, tmp_path / "nf4"))
    assert ours.fingerprint.tensors == theirs.fingerprint.tensors
    ids = torch.arange(5, 25)[None]
    assert torch.equal(ours.model(ids).logits, theirs.model(ids).logits)


@pytest.mark.parametrize("settings", [{"bnb_4bit_quant_type": "fp4"}, {"bnb_4bit_use_double_quant": False}])
def test_a_checkpoint_prequantized_otherwise_is_refused(tiny_llama: Path, tmp_path: Path, settings: dict) -> None:
    with pytest.raises(QuantizationError, match="quantized otherwise"):
        load(prequantized(tiny_llama, tmp_path / "other", **settings))


STATE = "quant_state.bitsandbytes__nf4"


def say(stored: dict[str, Tensor], **facts: object) -> None:
    """Change what the JSON next to a weight says."""
    reported = json.loads(bytes(stored[STATE].tolist())) | facts
    stored[STATE] = torch.frombuffer(bytearray(json.dumps(reported).encode()), dtype=torch.uint8)


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "codes cut": (lambda s: s.update({"": s[""][:-1]}), r"packed is uint8 of shape \(9215,\), .* \(9216,\)"),
    "scales cut": (lambda s: s.update(absmax=s["absmax"][:-1]), r"absmax is uint8 of shape \(287,\)"),
    "scales as floats": (lambda s: s.update(absmax=s["absmax"].float()), "absmax is float32"),
    "scales missing": (lambda s: s.pop("absmax"), "absmax"),
    "nested scales in fp16": (lambda s: s.update(nested_absmax=s["nested_absmax"].half()), "nested_absmax is float16"),
    "nested scales missing": (lambda s: s.pop("nested_absmax"), "nested_absmax"),
    "nested code in fp16": (
        lambda s: s.update(nested_quant_map=s["nested_quant_map"].half()),
        "nested_code is float16",
    ),
    "nested code cut": (lambda s: s.update(nested_quant_map=s["nested_quant_map"][:4]), r"nested_code .*\(4,\)"),
    "nested code not finite": (lambda s: s["nested_quant_map"].fill_(torch.inf), "not finite"),
    "nested scale not finite": (lambda s: s["nested_absmax"].fill_(torch.nan), "not finite"),
    "code changed": (lambda s: s.update(quant_map=s["quant_map"].flip(0)), "quant_map, .* not that of NF4"),
    "code missing": (lambda s: s.pop("quant_map"), "quant_map, .* not that of NF4"),
    "shape not reported": (lambda s: say(s, shape=None), "shape is None"),
    "shape of one size": (lambda s: say(s, shape=[18432]), r"shape is \[18432\]"),
    "shape of no numbers": (lambda s: say(s, shape=["96", 192]), "no matrix's"),
    "shape below zero": (lambda s: say(s, shape=[-96, -192]), "no matrix's"),
    "shape beyond reason": (lambda s: say(s, shape=[2**40, 2**40]), "no matrix's"),
    "another shape": (lambda s: say(s, shape=[96, 256]), r"packed is uint8 of shape \(9216,\)"),
    "offset not reported": (lambda s: say(s, nested_offset=None), "not finite"),
    "offset beyond fp32": (lambda s: say(s, nested_offset=1e300), "not finite"),
    "block size as text": (lambda s: say(s, blocksize="64"), "block size 64 "),
    "no JSON": (lambda s: s[STATE].fill_(91), "cannot be read"),
    "JSON of floats": (lambda s: s.update({STATE: s[STATE].float()}), "cannot be read"),
    "dtype unknown": (lambda s: say(s, dtype=["bfloat16"]), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_prequantized_weight_whose_tables_do_not_fit_is_refused_by_name(damage: str) -> None:
    """Before a kernel reads them, which goes by the weight's shape alone."""
    weight = quantize_weight(torch.randn(96, 192, generator=torch.Generator().manual_seed(0)))
    stored = {key: tensor.clone() for key, tensor in weight_to_checkpoint(weight, torch.bfloat16).items()}
    again = weight_from_checkpoint(stored[""], {key: stored[key] for key in stored if key}, "a.weight")
    assert all(torch.equal(getattr(again, table), getattr(weight, table)) for table in WEIGHT_TENSORS)
    change, reported = DAMAGES[damage]
    change(stored)
    with pytest.raises(QuantizationError, match=rf"^a\.weight.* {reported}"):
        weight_from_checkpoint(stored.pop(""), stored, "a.weight")


def test_a_model_that_reads_a_4_bit_layers_weight_is_refused() -> None:
    """As the fused path of a Mamba does: the error message comes in whatever forward is the first."""
    layer = NF4Linear(quantize_weight(torch.ones(96, 64)), None)
    assert not hasattr(layer, "weight")
    with pytest.raises(ModelError, match=r"reads the weight of a linear layer \(96 x 64\) .*another architecture"):
        nn.functional.linear(torch.ones(1, 64), layer.weight)
    with pytest.raises(AttributeError, match="no attribute 'scales'"):
        _ = layer.scales


def test_dequantization_is_checked_against_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    check_dequantization(CPU)
    from qlora_trainer.weights import bitsandbytes_format

    right = bitsandbytes_format.dequantize_nf4
    monkeypatch.setattr(bitsandbytes_format, "dequantize_nf4", lambda *a: right(*a).nextafter(torch.tensor(9e9)))
    with pytest.raises(QuantizationError, match="otherwise than they are defined"):
        check_dequantization(CPU)


def test_experts_that_stay_16_bit_are_refused_with_their_share(tmp_path: Path) -> None:
    """Granite's lie fused on disk too, so there is no tensor for each matrix."""
    config = GraniteMoeConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    with pytest.raises(ModelError, match=r"Only \d+\.\d% .*min_quantized_fraction"):
        load(tmp_path / "moe")
    base = load(tmp_path / "moe", min_quantized_fraction=0.0)
    attention = sum(m.in_features * m.out_features for m in base.model.modules() if isinstance(m, NF4Linear))
    experts = 4 * 3 * 64 * 128
    share, others = quantized_fraction(base.model)
    # The router, 4 x 64, may count or not; the share must not look better than it is.
    assert share == pytest.approx(attention / (attention + experts), abs=0.01)
    assert "experts" in others[0]


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


def broken_config(directory: Path) -> Path:
    (directory / "config.json").write_text("{")
    return directory


def unknown_architecture(directory: Path) -> Path:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "not-a-model"}))
    return directory


def missing_tensor(directory: Path) -> Path:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def other_shape(directory: Path) -> Path:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def cut_short(directory: Path) -> Path:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return directory


@pytest.mark.parametrize("damage", [broken_config, unknown_architecture, missing_tensor, other_shape, cut_short])
def test_an_unreadable_model_directory_ends_with_an_error_message(
    tmp_path: Path, damage: Callable[[Path], Path]
) -> None:
    directory = damage(make_model_directory(tmp_path / "m"))
    for opener in (load, lambda path: load_dense_model(ModelDirectory.open(path), CPU)):
        with pytest.raises(ModelError) as caught:
            opener(directory)
        assert str(directory) in str(caught.value)


def test_each_kind_of_path_without_a_base_model_gets_its_own_message(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="no model at"):
        resolve_model(str(tmp_path / "nowhere"), None, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path / "empty"), None, tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter\.init_from"):
        resolve_model(str(tmp_path / "adapter"), None, tmp_path)


def test_a_hub_name_that_cannot_be_fetched_ends_with_an_error_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(QLoRATrainerError, match="owner/model could not be fetched"):
        resolve_model("owner/model", None, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        resolve_model("owner/model", None, tmp_path)


def test_a_download_that_breaks_off_ends_with_an_error_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    (library,) = {kind.__module__.split(".")[0] for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"}
    broken = __import__(library).ReadTimeout("nothing came for 10 seconds")
    assert not isinstance(broken, OSError)

    def breaks_off(*args: object, **kwargs: object) -> str:
        raise broken

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks_off)
    with pytest.raises(ModelError, match="could not be fetched from the hub: ReadTimeout: nothing came"):
        resolve_model("owner/model", None, tmp_path)


def test_a_hub_cache_that_cannot_be_written_is_named_with_what_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/dev/null/hub")
    with pytest.raises(
        DiskError, match=r"^/dev/null/hub cannot be written: Not a directory\. Set HF_HOME to a writable folder"
    ):
        resolve_model("owner/model", None, tmp_path)


def test_a_name_that_is_neither_a_directory_nor_a_hub_name_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="There is no directory my models/foo"):
        resolve_model("my models/foo", None, tmp_path)


def test_weights_in_other_formats_next_to_the_shards_are_not_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    from qlora_trainer.model.source import NOT_FETCHED, WEIGHT_FILES

    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"]
    others = ["consolidated.safetensors", "original/params.json", "original/consolidated.00.pth", "onnx/config.json"]
    kept = filter_repo_objects(files + others, allow_patterns=[*WEIGHT_FILES], ignore_patterns=[*NOT_FETCHED])
    assert list(kept) == files


def test_too_little_memory_is_reported_before_loading(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    pretend_free_memory(monkeypatch, lambda device: 10_000)
    with pytest.raises(InsufficientMemoryError, match="Choose a smaller base"):
        load(tiny_llama)


@pytest.mark.slow
def test_the_memory_a_base_needs_is_what_it_takes(
    tiny_models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: the model, its largest tensor with the copies that are made of it on its way, and the one after."""

    packed = prequantized(tiny_models("llama"), tmp_path / "nf4")
    mixed = tmp_path / "mixed"  # its weights are quantized from fp32, and its embedding is loaded in that
    shutil.copytree(tiny_models("llama"), mixed)
    tensors = load_file(mixed / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, mixed / "model.safetensors", metadata={"format": "pt"})
    fused = tmp_path / "fused"  # its largest tensor is stored as (I, O)
    make_model_directory(fused, "gpt2", n_inner=4096)
    plain = (tiny_models("gpt2"), tiny_models("llama_tied"), tiny_models("qwen2"), packed)
    free: dict[str, int] = {}
    for directory, copies in (*((directory, 0) for directory in plain), (mixed, 4 / 2), (fused, 1)):
        largest = max(info.nbytes for info in ModelDirectory.open(directory).tensors.values())
        needed = load(directory).bytes + int(largest * (2 + copies))
        with monkeypatch.context() as patch:
            free["cpu"] = needed
            pretend_free_memory(patch, lambda device: free[device.type])
            load(directory)
            free["cpu"] = needed - 1
            with pytest.raises(InsufficientMemoryError):
                load(directory)


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


def test_what_could_be_trained_but_not_merged_is_refused_before_training(tiny_llama: Path) -> None:
    plan, _ = plan_base(ModelDirectory.open(tiny_llama))
    check_mergeable(plan, ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ModelError, match=r"no tensor of its own for 1 weight.*model\.layers\.0\.mlp\.both\.weight"):
        check_mergeable(plan, ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.both"])


def test_a_model_with_a_vision_tower_is_refused(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path / "m")
    assert AutoConfig.from_pretrained(tmp_path / "m").model_type == "gemma3"
    with pytest.raises(ModelError, match=r"several kinds of input \(gemma3, with a part for vision\)"):
        load(tmp_path / "m")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_base_on_cuda_holds_the_same_codes_as_on_the_cpu(tiny_llama: Path) -> None:
    on_cpu = load(tiny_llama, device="cpu")
    on_cuda = load(tiny_llama, device="cuda")
    assert on_cuda.compute_dtype in (torch.bfloat16, torch.float16)
    assert on_cpu.fingerprint.difference(on_cuda.fingerprint) is None
    check_dequantization(torch.device("cuda"))


def next_to_midpoints(dtype: torch.dtype) -> Tensor:  # (1024, 1024)
    """Blocks whose values lie within two steps of fp32 of the middle of two codes, under as many maxima as blocks."""
    generator = torch.Generator().manual_seed(0)
    maxima = torch.rand(1 << 14, 1, generator=generator) + 0.5
    midpoints = MIDPOINTS[torch.randint(15, (1 << 14, 63), generator=generator)]
    values = (midpoints.double() * maxima).float()
    values += values * torch.randint(-2, 3, values.shape, generator=generator) * 2**-24
    return torch.cat([maxima, values], dim=1).to(dtype).view(1024, 1024)


def codes_by_numpy(values: Tensor, reciprocal_off_by: int = 0) -> Any:
    """The code of every value by the definition, with the reciprocals of the maxima so many steps of fp32 off."""
    blocks = values.float().numpy().reshape(-1, 64)
    inverse = np.float32(1) / np.abs(blocks).max(1, keepdims=True)
    for _ in range(abs(reciprocal_off_by)):
        inverse = np.nextafter(inverse, np.float32(np.sign(reciprocal_off_by) * np.inf))
    return np.searchsorted(MIDPOINTS.numpy(), blocks * inverse, side="left").reshape(-1)


def unpacked(weight: NF4Weight) -> Any:
    return torch.stack([weight.packed >> 4, weight.packed & 15], dim=1).view(-1).cpu().numpy()


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_codes_are_those_of_exact_division(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes divides on CUDA, with a reciprocal that may be one step of fp32 off, fp32 values change codes."""
    monkeypatch.setenv("QLORA_KERNELS", choice)
    values = next_to_midpoints(torch.float32)
    exact = codes_by_numpy(values)
    assert all((codes_by_numpy(values, off) != exact).sum() > 1000 for off in (-1, 1))
    assert (unpacked(quantize_weight(values)) == exact).all()


def test_no_device_quantizes_by_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("bitsandbytes was asked to quantize")

    monkeypatch.setattr(bnb.functional, "quantize_4bit", refuse)
    run = FakeRun()
    run.mode.allow_non_fake_inputs = True  # the tables of the format
    with run:
        weight = quantize_weight(torch.empty(64, 128, dtype=torch.bfloat16, device="meta"))
    assert (weight.packed.device.type, tuple(weight.packed.shape)) == ("meta", (4096,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_quantizes_to_the_codes_of_a_cpu(dtype: torch.dtype) -> None:
    plain = torch.randn(1024, 1000, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)
    for values in (plain, next_to_midpoints(dtype)):
        ours, theirs = quantize_weight(values), quantize_weight(values.cuda())
        assert torch.equal(ours.packed, theirs.packed.cpu()), int((ours.packed != theirs.packed.cpu()).sum())
        assert torch.equal(ours.nested_code, theirs.nested_code.cpu())
        assert is_same(tensor_fingerprint(ours), tensor_fingerprint(theirs))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_refused_on_cuda(dtype: torch.dtype, bad: float) -> None:
    weight = torch.randn(64, 128, dtype=dtype, device="cuda")
    weight[3, 5] = bad
    with pytest.raises(QuantizationError, match="holds 1 value"):
        quantize_weight(weight)
    with pytest.raises(QuantizationError, match="holds 1 value"):
        quantize_weight(weight.T)
