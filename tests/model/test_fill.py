"""Promises of loading a tensor at a time: every tensor as transformers and bitsandbytes would have it, and no more."""

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from cards import pretend_free_memory
from marks import slow, slow_but
from safetensors.torch import load_file
from tiny_models import FAMILIES, change_tensors, load, make_model_directory
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.llama_checkpoint import LlamaShape, make_checkpoint
from qlora_kernels.nf4 import dequantize_nf4
from qlora_trainer.common.errors import InsufficientMemoryError, ModelError, QuantizationError
from qlora_trainer.common.process_memory import private_bytes
from qlora_trainer.model import fill as streaming_load
from qlora_trainer.model.device import choose_device
from qlora_trainer.model.load_plan import widest_dtype
from qlora_trainer.model.modules.lm_head import quantize_head
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.quantized_copy import quantize_checkpoint
from qlora_trainer.weights.file_reading import FileReader
from qlora_trainer.weights.model_directory import ModelDirectory

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def load_by_transformers(directory: Path) -> nn.Module:
    """In the checkpoint's widest dtype, with NF4 and double quantization."""
    dtype = widest_dtype(ModelDirectory.open(directory))
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=nf4, device_map={"": "cpu"})


def everything_in(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor by name, ties under each of their names; floats that stay dense in fp32, as ours are cast."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors |= {f"{path}.packed": module.weight.data.reshape(-1), f"{path}.absmax": state.absmax}
            tensors |= {f"{path}.nested_absmax": state.state2.absmax, f"{path}.nested_code": state.state2.code}
            tensors |= {f"{path}.offset": state.offset.reshape(())}
        for name, parameter in module.named_parameters(path, recurse=False, remove_duplicate=False):
            if not isinstance(parameter, bnb.nn.Params4bit):
                tensors[name] = parameter.data.float()
        tensors |= dict(module.named_buffers(path, recurse=False, remove_duplicate=False))
    return tensors


def assert_same_tensors(ours: nn.Module, theirs: nn.Module) -> None:
    found, expected = everything_in(ours), everything_in(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", slow_but(sorted(FAMILIES), "gemma3", "gpt2", "phi3"))
def test_every_tensor_is_as_transformers_loads_it(family: str, tiny_models: Callable[[str], Path]) -> None:
    """Parameters, stored buffers and computed ones, packed codes and their statistics, to the last bit."""
    ours = load(tiny_models(family), compute_dtype="bfloat16")  # the checkpoint's, in which theirs computes its buffers
    assert_same_tensors(ours.model, load_by_transformers(tiny_models(family)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_model_computes_for_itself_is_as_transformers_has_it_in_that_dtype(dtype: str, tmp_path: Path) -> None:
    """Gemma 3 scales its embedding by the root of its width, here one that bf16 does not hold."""
    directory = make_model_directory(tmp_path / "m", "gemma3", hidden_size=192)
    ours = load(directory, compute_dtype=dtype).model
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    found, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert "model.embed_tokens.embed_scale" in expected
    assert all(torch.equal(found[name], buffer) for name, buffer in expected.items())
    if dtype == "float32":
        assert float(found["model.embed_tokens.embed_scale"]) == pytest.approx(192**0.5, rel=1e-6)
        for path, layer in ours.named_modules():
            if isinstance(layer, NF4Linear):
                theirs.get_submodule(path).weight.data = dequantize_nf4(layer.nf4_weight, torch.float32)
        ids = torch.arange(5, 25)[None]
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None], **config: object) -> Path:
    """A copy of a model directory in which `change` has been at the tensors."""
    shutil.copytree(source, target)
    change_tensors(target, change)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


def saved_without_prefix(tensors: dict[str, Tensor]) -> None:
    """As older GPT-2 checkpoints are: the body alone, with the masks that were stored once."""
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)


def norms_in_fp32(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].float() * 1.001 if "norm" in name else tensors[name]


def head_stored_too(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_stored_otherwise(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2


def head_stored_alone(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt2", saved_without_prefix),
        ("llama", norms_in_fp32),
        slow(("llama_tied", head_stored_too)),
        ("llama_tied", head_stored_otherwise),
        slow(("llama_tied", head_stored_alone)),
    ],
)
def test_checkpoints_of_every_habit_load_as_transformers_loads_them(
    family: str, change: Callable[[dict[str, Tensor]], None], tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = changed(tiny_models(family), tmp_path / "changed", change)
    ours: Any = load(directory).model
    theirs: Any = load_by_transformers(directory)  # its computed buffers are in fp32 too
    assert_same_tensors(ours, theirs)
    is_tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == is_tied
    assert ours.all_tied_weights_keys == theirs.all_tied_weights_keys
    warnings = load(directory).warnings
    assert len(warnings) == (change is head_stored_otherwise and family == "llama_tied"), warnings


def test_shards_are_one_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert load(tmp_path / "shards").fingerprint == load(tiny_llama).fingerprint


def test_tensors_that_no_parameter_takes_are_reported(tiny_llama: Path, tmp_path: Path) -> None:
    def extra(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # known from older checkpoints
        tensors["mtp.weight"] = torch.ones(8)

    (warning,) = load(changed(tiny_llama, tmp_path / "extra", extra)).warnings
    assert "1 tensor that this model has no place for, such as mtp.weight" in warning


def test_a_parameter_that_is_stored_under_two_names_is_refused(
    tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    def stored_twice(tensors: dict[str, Tensor]) -> None:
        tensors["ln_f.weight"] = tensors["transformer.ln_f.weight"] * 2

    with pytest.raises(ModelError, match=r"stores transformer\.ln_f\.weight twice, as .*ln_f\.weight and as .*ln_f"):
        load(changed(tiny_models("gpt2"), tmp_path / "twice", stored_twice))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_tensor_of_a_dtype_that_is_no_models_is_refused_by_name(
    dtype: torch.dtype, name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    def stored_otherwise(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    reported = str(dtype).removeprefix("torch.")
    with pytest.raises(ModelError, match=rf"{name} in .*model\.safetensors is stored as {reported} \(1 such"):
        load(changed(tiny_llama, tmp_path / "otherwise", stored_otherwise))


def test_a_tensor_of_such_a_dtype_that_the_model_does_not_use_is_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    def extra(tensors: dict[str, Tensor]) -> None:
        tensors["mtp.weight"] = torch.ones(8).to(torch.float8_e4m3fn)

    directory = changed(tiny_llama, tmp_path / "extra", extra)
    assert load(directory).fingerprint == load(tiny_llama).fingerprint
    quantize_checkpoint(ModelDirectory.open(directory), tmp_path / "nf4", device=CPU)
    assert load_file(tmp_path / "nf4" / "model.safetensors")["mtp.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_dense_tensor_that_is_not_finite_is_refused_by_name_and_file(
    value: float, tiny_llama: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][5, 3] = value

    directory = changed(tiny_llama, tmp_path / "spoiled", spoil)
    with pytest.raises(QuantizationError, match=r"model\.embed_tokens\.weight in model\.safetensors .* not finite"):
        load(directory)


@pytest.mark.parametrize("settings", slow_but([{"lm_head": "4bit"}, {"lm_head": "8bit"}], {"lm_head": "4bit"}))
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_quantized_head_is_made_of_the_checkpoints_values(
    family: str, settings: Any, tiny_models: Callable[[str], Path]
) -> None:
    """As from the dense head of a loaded model, and the embedding it may share stays what it was."""
    made = load(tiny_models(family), **settings).model
    dense = load(tiny_models(family), compute_dtype="bfloat16").model  # the checkpoint's dtype
    quantize_head(dense, settings["lm_head"])
    expected = dict(dense.get_output_embeddings().named_buffers())
    found = dict(made.get_output_embeddings().named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(made.get_input_embeddings().weight, dense.get_input_embeddings().weight.float())


def test_what_cannot_be_is_refused_before_a_weight_is_read(
    tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileReader, "read", lambda self, info: pytest.fail(f"{info.name} was read"))
    pretend_free_memory(monkeypatch, lambda device: 10_000)
    with pytest.raises(InsufficientMemoryError):
        load(tiny_models("llama"))
    with pytest.raises(ModelError, match=r"model\.lm_head=4bit"):
        load(tiny_models("llama_tied"), embeddings="cpu")


def test_memory_that_runs_out_while_loading_ends_with_an_error_message(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(streaming_load, "quantize_weight", full)
    with pytest.raises(InsufficientMemoryError, match=r"Loading .* on cpu ran out of memory: .*2 GiB"):
        load(tiny_llama)


PEAKS = """
import sys
from pathlib import Path
from benchmarks.private_memory import PrivatePeak
from qlora_trainer.model.load import load_base_model
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.common.cache import user_cache
settings = ModelConfig(name="base", device="cpu", compute_dtype="bfloat16")
first, *others = map(Path, sys.argv[1:])
load_base_model(ModelDirectory.open(first), settings, user_cache())  # what libraries keep from their first use
for directory in others:
    with PrivatePeak() as memory:
        base = load_base_model(ModelDirectory.open(directory), settings, user_cache())
    print(memory.peak - memory.before, base.bytes)
    del base
"""


@pytest.mark.slow
@pytest.mark.skipif(private_bytes() is None, reason="needs Linux's /proc")
def test_private_memory_is_the_4bit_model_and_little_more(tiny_llama: Path, tmp_path: Path) -> None:
    """Neither all of the 16-bit weights nor two copies of what is made of them; of a copy kept in 4 bits, nothing."""
    plain = make_checkpoint(tmp_path / "plain", LlamaShape(512, 4096, 6, 8, 8, 512))
    quantize_checkpoint(ModelDirectory.open(plain), tmp_path / "kept", device=CPU)
    command = [sys.executable, "-c", PEAKS, str(tiny_llama), str(tmp_path / "kept"), str(plain)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    (of_kept, _), (of_plain, model) = (map(int, line.split()) for line in lines)
    sizes = [info.nbytes for info in ModelDirectory.open(plain).tensors.values()]
    assert of_plain < model + 2 * max(sizes) + 2**23 < sum(sizes) * 0.6  # one tensor is read ahead
    assert of_kept < model / 2


def test_a_base_goes_to_the_current_card_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread that reads or hashes, a device without an index would be the first card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cpu") == CPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, {"lm_head": "4bit", "embeddings": "cpu"}])
def test_16_bit_weights_never_gather_on_a_card(settings: dict[str, str], tmp_path: Path) -> None:
    """The 4-bit model, the tensor being quantized, the one read ahead, and what quantizing a part of it takes."""
    plain = make_checkpoint(tmp_path / "plain", LlamaShape(1024, 4096, 12, 16, 16, 8192))
    sizes = sorted(info.nbytes for info in ModelDirectory.open(plain).tensors.values())
    load(plain, device="cuda", **settings)  # what libraries keep from their first use
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    base = load(plain, device="cuda", **settings)
    on_card = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < on_card + sizes[-1] + sizes[-2] + 14 * 2**21 < sum(sizes)
    assert base.fingerprint.difference(load(plain, device="cpu").fingerprint) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loading_on_cuda_gives_back_what_the_tensors_came_through(tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "m", hidden_size=1024, intermediate_size=4096)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    base = load(directory, device="cuda")
    # Two of the allocator's segments may be used in part, one of small tensors and one of large ones, and of large ones
    # a page of 20 MiB on either side of a hole: a page is given back only when nothing of it is used.
    assert torch.cuda.memory_reserved() - before <= base.bytes + (2 + 2 * 20) * 2**20
