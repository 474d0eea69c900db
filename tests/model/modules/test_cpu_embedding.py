"""The embedding in host memory changes where numbers lie, not what they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from tiny_models import load
from torch import Tensor, nn

from qlora_trainer.common.errors import ModelError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.model.modules.cpu_embedding import CpuEmbedding, known_ids, tensors_on_cpu
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.generation import generate_answers
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
Models = Callable[[str], Path]
HOST = {"embeddings": "cpu"}
QUANTIZED = {"embeddings": "cpu", "lm_head": "4bit"}


def records_of(run: Any) -> list[tuple[float, float, float]]:
    records: list[tuple[float, float, float]] = []
    run.train(lambda r: records.append((r["loss"], r["grad_norm"], r.get("eval_loss", 0.0))))
    return records


@pytest.mark.parametrize("dropout", slow_but([0.0, 0.1], 0.1))
def test_training_with_host_embeddings_is_bit_for_bit_the_same(tiny_config: Config, dropout: float) -> None:
    settings = {"adapter": {"dropout": dropout}, "training": {"max_steps": 4}}
    device = start_run(tiny_config("device", **settings))
    expected = records_of(device)
    host = start_run(tiny_config("host", **settings, model=HOST))
    assert isinstance(host.base.model.get_input_embeddings(), CpuEmbedding)
    assert records_of(host) == expected
    for ours, theirs in zip(host.state.groups, device.state.groups, strict=True):
        assert torch.equal(ours.data, theirs.data)


@pytest.mark.slow
def test_a_run_may_move_its_embedding_when_it_is_resumed(tiny_config: Config) -> None:
    whole = start_run(tiny_config("whole"))
    records = records_of(whole)
    parts = start_run(tiny_config("parts"))
    parts.train(lambda record: None, stop_after=3)
    resumed = resume_run(parts.directory, ["model.embeddings=cpu"])
    assert resumed.warnings == []
    assert records_of(resumed) == records[3:]


@pytest.mark.parametrize("family", slow_but(["llama", "qwen3", "phi3"], "llama"))
def test_the_base_is_the_same_and_its_names_too(tiny_models: Models, family: str) -> None:
    directory = tiny_models(family)
    device = load(directory)
    host = load(directory, **HOST)
    assert host.fingerprint.difference(device.fingerprint) is None
    assert host.fingerprint.dense.keys() == device.fingerprint.dense.keys()
    (weight,) = tensors_on_cpu(host.model)
    assert list(tensors_on_cpu(device.model)) == []
    assert weight.dtype == torch.bfloat16  # the checkpoint's
    assert torch.equal(weight.float(), device.model.get_input_embeddings().weight)
    assert host.bytes == device.bytes - weight.nbytes  # half of fp32


@pytest.mark.parametrize("family", slow_but(["gemma2", "gemma3", "llama_tied"], "gemma3"))
def test_what_a_model_does_in_its_embedding_is_done(tiny_models: Models, family: str) -> None:
    """Gemma 3 multiplies by the root of the hidden size inside; its scale goes to the host with the weight."""
    directory = tiny_models(family)
    settings = {"lm_head": "4bit", "compute_dtype": "bfloat16"}
    device = load(directory, **settings).model
    host = load(directory, **settings, **HOST).model
    ids = torch.arange(30)[None]
    assert torch.equal(host.get_input_embeddings()(ids), device.get_input_embeddings()(ids))
    tokenizer = load_tokenizer(ModelDirectory.open(directory))
    prompts = [PromptTokens([5, 9, 30], [2]), PromptTokens([7, 8], [2])]
    answers = [generate_answers(model, tokenizer, prompts, max_new_tokens=5) for model in (device, host)]
    assert answers[0] == answers[1]


def test_the_models_device_is_the_one_that_computes(tiny_llama: Path) -> None:
    """transformers takes the first parameter's; the host's must not be it, nor move or be cast with the model."""
    model = load(tiny_llama, **HOST).model
    model.to("meta")
    assert model.device == torch.device("meta")
    (weight,) = tensors_on_cpu(model)
    assert weight.device == torch.device("cpu")


def test_tied_embeddings_on_the_host_are_refused(
    tiny_config: Config, tiny_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether loaded or planned; a quantized head has a weight of its own."""
    directory = tiny_models("llama_tied")
    refused = tiny_config(model={"name": str(directory), **HOST})
    for attempt in (lambda: start_run(refused), lambda: plan_memory(ModelDirectory.open(directory), refused)):
        with pytest.raises(ModelError, match=r"lm_head\.weight are one weight.* Set model\.lm_head=4bit"):
            attempt()
    run = start_run(tiny_config(model={"name": str(directory), **QUANTIZED}, training={"max_steps": 2}))
    assert run.train(lambda record: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_rows_come_to_the_card_and_the_weight_stays(tiny_models: Models) -> None:
    directory = tiny_models("gemma3")
    settings = {"device": "cuda", "lm_head": "4bit"}
    device = load(directory, **settings).model
    host = load(directory, **settings, **HOST).model
    assert {tensor.device.type for tensor in tensors_on_cpu(host)} == {"cpu"}
    ids = torch.arange(30, device="cuda")[None]
    found = host.get_input_embeddings()(ids)
    assert found.device.type == host.device.type == "cuda"
    assert torch.equal(found, device.get_input_embeddings()(ids))
    tokenizer = load_tokenizer(ModelDirectory.open(directory))
    prompts = [PromptTokens([5, 9, 30], [2]), PromptTokens([7], [2])]
    answers = [generate_answers(model, tokenizer, prompts, max_new_tokens=5) for model in (device, host)]
    assert answers[0] == answers[1]


def test_ids_come_from_the_host_where_they_are_known_and_else_from_the_tensor_that_is_given() -> None:
    """Other ids on the host than in the tensor show which are taken."""
    embedding = CpuEmbedding(nn.Embedding(20, 4), torch.device("cpu"), torch.float32)
    ids, on_host = torch.arange(8)[None], torch.arange(10, 18)[None]

    def found(given: Tensor) -> list[int]:
        rows = embedding(given)
        assert rows.shape == (*given.shape, 4)
        return [int((embedding.weight == row).all(dim=1).nonzero()) for row in rows.reshape(-1, 4)]

    with known_ids(ids, on_host):
        assert found(ids) == on_host.flatten().tolist()
        assert found(ids.view(2, 4)) == on_host.flatten().tolist(), "in another shape"
        assert found(ids[:, :4]) == [0, 1, 2, 3], "a part of them"
        assert found(ids.clone()) == ids.flatten().tolist(), "a copy, which may differ"
        assert found(ids.view(2, 4).T) == [0, 4, 1, 5, 2, 6, 3, 7]
        with known_ids(ids, None):
            assert found(ids) == ids.flatten().tolist()
        ids[0, 0] = 7
        assert found(ids) == [7, *range(1, 8)], "written to since"
    with known_ids(ids, on_host):
        pass
    assert found(ids) == [7, *range(1, 8)], "outside the block"
