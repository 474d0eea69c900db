"""Promises of the streamed model: the dense model's logits, in the memory of one matrix."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cards import pretend_free_memory
from marks import slow_but
from safetensors.torch import load_file, save_file
from spying import Operations, noting
from tiny_models import make_model_directory
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    Lfm2Config,
    MambaConfig,
)

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import CheckpointError, InsufficientMemoryError, ModelError
from qlora_trainer.config.schema import AdapterConfig, ModelConfig
from qlora_trainer.merging import streamed_model
from qlora_trainer.merging.stream_plan import plan_stream
from qlora_trainer.merging.streamed_model import (
    StreamedHead,
    StreamedMatrix,
    has_finite_logits,
    load_streamed_model,
)
from qlora_trainer.merging.trained_weights import trained_weights
from qlora_trainer.model import empty
from qlora_trainer.model.load import load_base_model, load_dense_model
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.tensors import TensorInfo

CPU = torch.device("cpu")
IDS = torch.arange(5, 65).reshape(3, 20)


def assert_same_logits(streamed: Any, dense: Any) -> None:
    with torch.no_grad():
        found, expected = streamed(input_ids=IDS).logits, dense(input_ids=IDS).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def live_bytes(model: nn.Module) -> int:
    """What the model's parameters take, each storage once; a matrix that is away takes four bytes."""
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def matrices(model: nn.Module) -> list[StreamedMatrix]:
    return [parameter for parameter in model.parameters() if isinstance(parameter, StreamedMatrix)]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"])
def test_a_streamed_model_gives_the_dense_models_logits(family: str, tiny_models: Callable[[str], Path]) -> None:
    streamed = load_streamed_model(ModelDirectory.open(tiny_models(family)), CPU)
    assert_same_logits(streamed, load_dense_model(ModelDirectory.open(tiny_models(family)), CPU))
    assert all(isinstance(parameter, StreamedMatrix) == (parameter.ndim >= 2) for parameter in streamed.parameters())
    assert all(torch.isnan(matrix).all() for matrix in matrices(streamed))
    assert not any(parameter.requires_grad for parameter in streamed.parameters())


def test_streamed_layers_multiply_by_the_library_that_uses_the_whole_processor(tiny_llama: Path) -> None:
    model = load_streamed_model(ModelDirectory.open(tiny_llama), CPU)
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    with torch.no_grad(), Operations() as operations:
        model(input_ids=IDS)
    assert operations.seen.count(torch.ops.qlora_kernels.linear.default) == len(layers) > 0


def test_names_without_the_models_prefix_are_found(tiny_models: Callable[[str], Path], tmp_path: Path) -> None:
    """As GPT-2's own checkpoint has them: the body saved alone."""
    AutoModel.from_pretrained(tiny_models("gpt2")).save_pretrained(tmp_path / "gpt2")
    assert "wte.weight" in load_file(tmp_path / "gpt2" / "model.safetensors")
    streamed = load_streamed_model(ModelDirectory.open(tmp_path / "gpt2"), CPU)
    assert len(matrices(streamed)) == 2 + 4 * 2
    assert_same_logits(streamed, load_dense_model(ModelDirectory.open(tmp_path / "gpt2"), CPU))


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_never_more_than_one_matrix_is_live_and_embedding_and_head_never(
    family: str, tiny_models: Callable[[str], Path]
) -> None:
    streamed = load_streamed_model(ModelDirectory.open(tiny_models(family)), CPU)
    idle = live_bytes(streamed)
    vectors = sum(parameter.nbytes for parameter in streamed.parameters() if parameter.ndim < 2)
    assert idle <= vectors + 4 * len(matrices(streamed))
    seen: dict[str, int] = {}

    def observed(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            seen[path] = live_bytes(streamed)
            return forward(*arguments, **named)

        return run

    for path, module in streamed.named_modules():
        if any(isinstance(parameter, StreamedMatrix) for parameter in module.parameters(recurse=False)):
            if isinstance(module.forward, functools.partial):  # fetches, and runs the module's own
                module_itself, forward = module.forward.args
                module.forward = functools.partial(module.forward.func, module_itself, observed(path, forward))
            else:
                module.forward = observed(path, module.forward)
    with torch.no_grad():
        streamed(input_ids=IDS)
    assert len(seen) == 2 + 7 * 2
    assert seen.pop("model.embed_tokens") == seen.pop("lm_head") == idle
    largest = 4 * 128 * 64  # of an MLP
    assert idle + largest - 4 <= max(seen.values()) <= idle + largest
    assert live_bytes(streamed) == idle


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
def test_of_an_embedding_the_tokens_rows_are_read_and_of_the_head_a_block_at_a_time(
    family: str, tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = load_streamed_model(ModelDirectory.open(tiny_models(family)), CPU)
    dense = load_dense_model(ModelDirectory.open(tiny_models(family)), CPU)
    embedding, head = streamed.get_input_embeddings(), streamed.get_output_embeddings()
    assert isinstance(head, StreamedHead)
    assert (head.weight is embedding.weight) == (family != "llama")
    read: list[Any] = []
    noted = noting(StreamedMatrix.rows, lambda matrix, index, dtype: read.append(index))
    monkeypatch.setattr(StreamedMatrix, "rows", noted)
    ids = torch.tensor([[7, 300, 7, 5], [5, 5, 300, 7]])
    with torch.no_grad():
        assert torch.equal(embedding(ids), dense.get_input_embeddings()(ids))
        assert [index.tolist() for index in read] == [[5, 7, 300]]
        read.clear()
        hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(head(hidden), dense.get_output_embeddings()(hidden), rtol=1e-5, atol=1e-6)
    vocabulary = dense.config.vocab_size
    assert max(index.stop - index.start for index in read) <= -(-vocabulary // 16)
    assert torch.isnan(head.weight).all()


def test_a_matrix_is_dropped_when_the_forward_fails(tiny_llama: Path) -> None:
    streamed = load_streamed_model(ModelDirectory.open(tiny_llama), CPU)
    idle = live_bytes(streamed)
    with pytest.raises(IndexError):
        streamed(input_ids=torch.tensor([[10**6]]))
    assert live_bytes(streamed) == idle


def test_a_failed_fetch_is_forgotten(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a disk that fails once: the forward after it gives logits."""
    streamed = load_streamed_model(ModelDirectory.open(tiny_llama), CPU)
    idle = live_bytes(streamed)
    with torch.no_grad():
        expected = streamed(input_ids=IDS).logits
        for failing in (1, 9):
            reads = iter(range(1, 100))
            read = streamed_model._read

            def fail_once(*arguments: Any, at: int = failing, reads: Any = reads, read: Any = read) -> torch.Tensor:
                if next(reads) == at:
                    raise ModelError("cannot be read")
                return read(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(streamed_model, "_read", fail_once)
                with pytest.raises(ModelError, match="cannot be read"):
                    streamed(input_ids=IDS)
            assert live_bytes(streamed) == idle
            assert torch.equal(streamed(input_ids=IDS).logits, expected)


HYBRIDS = {
    "mamba": MambaConfig(hidden_size=64, state_size=4, num_hidden_layers=2, vocab_size=128),
    "falcon_mamba": FalconMambaConfig(hidden_size=64, state_size=4, num_hidden_layers=2, vocab_size=128),
    "lfm2": Lfm2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, layer_types=["conv", "full_attention"],
    ),
    "bamba": BambaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8,
    ),
    "falcon_h1": FalconH1Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_chunk_size=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", HYBRIDS)
def test_weights_that_are_taken_without_calling_their_modules_are_there_or_it_is_reported(
    family: str, tmp_path: Path
) -> None:
    """All of these take the weights of their convolutions so; Mambas take a linear layer's too, which are absent."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(HYBRIDS[family]).save_pretrained(tmp_path / family)
    streamed = load_streamed_model(ModelDirectory.open(tmp_path / family), CPU)
    dense = load_dense_model(ModelDirectory.open(tmp_path / family), CPU)
    assert len(matrices(streamed)) > 4
    assert has_finite_logits(dense)
    assert has_finite_logits(streamed) == (family not in ("mamba", "falcon_mamba"))
    if has_finite_logits(streamed):
        assert_same_logits(streamed, dense)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_adapters_work_on_a_streamed_model(bias: str, tiny_models: Callable[[str], Path]) -> None:
    settings = AdapterConfig(rank=4, alpha=8.0, bias=bias)
    dense = load_dense_model(ModelDirectory.open(tiny_models("qwen2")), CPU)
    add_adapters(dense, settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable_parameters(dense):
            parameter.normal_(0.0, 0.2, generator=generator)
    streamed = load_streamed_model(ModelDirectory.open(tiny_models("qwen2")), CPU)
    add_adapters(streamed, settings, seed=0)
    load_adapter_state(streamed, adapter_state_dict(dense))
    assert_same_logits(streamed, dense)


def test_a_head_stored_next_to_its_embedding_is_tied_only_where_both_are_equal(tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "m", "llama_tied")
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for head in (embedding.clone(), embedding.flip(0).contiguous()):
        save_file(tensors | {"lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
        assert_same_logits(
            load_streamed_model(ModelDirectory.open(directory), CPU),
            load_dense_model(ModelDirectory.open(directory), CPU),
        )


def test_experts_stream_one_matrix_at_a_time_under_the_names_of_the_checkpoint(
    tiny_models: Callable[[str], Path],
) -> None:
    model = load_streamed_model(ModelDirectory.open(tiny_models("mixtral")), CPU)
    sources = [matrix.source for matrix in matrices(model)]
    of_experts = [source for source in sources if isinstance(source, TensorInfo) and ".experts." in source.name]
    assert len(of_experts) == 2 * 4 * 3
    assert_same_logits(model, load_dense_model(ModelDirectory.open(tiny_models("mixtral")), CPU))


def test_what_is_fused_while_loading_is_loaded_whole(
    tiny_models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(empty, "split_experts", lambda model, stored: [])
    model = load_streamed_model(ModelDirectory.open(tiny_models("mixtral")), CPU)
    assert matrices(model) == []
    assert_same_logits(model, load_dense_model(ModelDirectory.open(tiny_models("mixtral")), CPU))


def test_a_tensor_of_another_shape_ends_with_an_error_message(tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "m")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(ModelError, match=r"mlp\.\w+\.weight .* has shape .* the config asks for"):
        load_streamed_model(ModelDirectory.open(directory), CPU)


def test_too_little_memory_for_one_matrix_is_reported(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_stream(ModelDirectory.open(tiny_llama), CPU).device == CPU
    pretend_free_memory(monkeypatch, lambda device: 10**9)
    with pytest.raises(InsufficientMemoryError, match=r"Comparing logits .* 1\.00 GiB, and cpu has 0\.93 GiB free"):
        plan_stream(ModelDirectory.open(tiny_llama), CPU)


@pytest.mark.parametrize(
    "family", slow_but(["llama", "llama_tied", "qwen2", "gemma2", "phi3", "gpt2"], "llama_tied", "gpt2")
)
def test_weights_as_trained_give_the_4_bit_models_logits(family: str, tiny_models: Callable[[str], Path]) -> None:
    directory = tiny_models(family)
    base = load_base_model(ModelDirectory.open(directory), ModelConfig(name=str(directory), device="cpu"), user_cache())
    conv1d = family == "gpt2"
    weights = trained_weights(base.directory, base.fingerprint, fan_in_fan_out=conv1d)
    streamed = load_streamed_model(ModelDirectory.open(directory), CPU, weights)
    assert_same_logits(streamed, base.model)
    with torch.no_grad():  # and they are not the dense model's
        dense = load_dense_model(ModelDirectory.open(directory), CPU)(input_ids=IDS).logits
        assert float((streamed(input_ids=IDS).logits - dense).norm() / dense.norm()) > 1e-2


def test_a_weight_that_is_not_the_trained_one_is_refused_when_it_is_read(tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "m")
    base = load_base_model(ModelDirectory.open(directory), ModelConfig(name=str(directory), device="cpu"), user_cache())
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(directory / "model.safetensors")
    tensors[name][3, 5] *= -1.0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    changed = ModelDirectory.open(directory)
    streamed = load_streamed_model(changed, CPU, trained_weights(changed, base.fingerprint))
    with pytest.raises(CheckpointError, match=f"{name} in .* does not give the 4-bit weights"):
        streamed(input_ids=IDS)


def test_some_of_the_layers_are_the_first_ones(deep_llama: Path) -> None:
    cut = load_streamed_model(ModelDirectory.open(deep_llama), CPU, layers=2)
    whole = load_dense_model(ModelDirectory.open(deep_llama), CPU)
    whole.model.layers = whole.model.layers[:2]
    assert len(cut.model.layers) == 2
    assert_same_logits(cut, whole)


def test_rows_of_what_cannot_be_mapped_are_read_one_by_one(tiny_llama: Path) -> None:
    """As an embedding's in a GGUF file, of which the whole would be dequantized."""
    info = ModelDirectory.open(tiny_llama).tensors["model.embed_tokens.weight"]
    expected = info.read()
    read: list[slice] = []
    source = SimpleNamespace(read=noting(lambda name, rows: expected[rows], lambda name, rows: read.append(rows)))
    unmapped = dataclasses.replace(info, source=source, offset=None)
    matrix = StreamedMatrix.of(unmapped, expected.shape, CPU)
    ids = torch.tensor([[9, 2, 9]])
    assert torch.equal(nn.functional.embedding(ids, matrix), nn.functional.embedding(ids, expected.float()))
    assert torch.equal(matrix.rows(slice(10, 30), torch.float32), expected[10:30].float())
    assert read == [slice(2, 3), slice(9, 10), slice(10, 30)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt2"])
def test_a_streamed_model_gives_the_same_logits_on_a_gpu_and_leaves_it_empty(
    family: str, tiny_models: Callable[[str], Path]
) -> None:
    directory = tiny_models(family)
    base = load_base_model(ModelDirectory.open(directory), ModelConfig(name=str(directory), device="cpu"), user_cache())
    weights = trained_weights(base.directory, base.fingerprint, fan_in_fan_out=family == "gpt2")
    on_cpu, on_cuda = (
        load_streamed_model(ModelDirectory.open(directory), torch.device(kind), weights) for kind in ("cpu", "cuda")
    )
    with torch.no_grad():
        expected = on_cpu(input_ids=IDS).logits
        before = torch.cuda.memory_allocated()
        found = on_cuda(input_ids=IDS.cuda()).logits.cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.cuda.memory_allocated() <= before + 4 * len(matrices(on_cuda)) * 512
