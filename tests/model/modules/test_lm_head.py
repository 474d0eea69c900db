"""The quantized head: one function for loss, logits and generation; an approximation that no merge ever sees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from safetensors.torch import load_file
from tiny_models import make_model_directory
from torch import nn
from torch.nn import functional as F

from qlora_trainer.adapters.targets import adapted_paths, find_targets
from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import AdapterError, CheckpointError, ModelError
from qlora_trainer.config.schema import AdapterConfig, ModelConfig, RunConfig
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.model.forward import LossPath, examine_forward, label_logits, loss_sum
from qlora_trainer.model.load import load_base_model
from qlora_trainer.model.modules.lm_head import QuantizedHead, quantize_head
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
Models = Callable[[str], Path]
KINDS = ["8bit", "4bit"]


def base(directory: Path, **settings: str) -> Any:
    return load_base_model(
        ModelDirectory.open(directory), ModelConfig.model_validate({"name": str(directory), **settings}), user_cache()
    )


def pack_of(tokens: int) -> Pack:
    ids = torch.randint(3, 60, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, dims=1).masked_fill(torch.arange(tokens) % 3 == 0, -100)
    return Pack(ids, labels, torch.arange(tokens)[None], None, tokens, int((labels != -100).sum()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", slow_but(["llama", "gemma2", "llama_tied"], "gemma2"))
def test_the_patched_loss_is_that_of_the_models_own_logits(tiny_models: Models, family: str, kind: str) -> None:
    model = base(tiny_models(family), lm_head=kind).model
    assert isinstance(model.get_output_embeddings(), QuantizedHead)
    plan = examine_forward(model)
    assert not plan.loss_path.own_logits
    pack = pack_of(20)
    own, labels = label_logits(model, pack)
    expected = F.cross_entropy(own, labels, reduction="sum")
    torch.testing.assert_close(loss_sum(model, pack, plan.loss_path), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_near_the_original_and_takes_the_bytes_it_says(tiny_llama: Path, kind: str) -> None:
    dense = base(tiny_llama).model.get_output_embeddings()
    model = base(tiny_llama, lm_head=kind).model
    head = model.get_output_embeddings()
    back = head.rows(0, head.shape[0], torch.float32)
    error = (back - dense.weight).norm() / dense.weight.norm()
    # NF4 errs by 8% on normal weights; eight bits of a row whose largest is 2.5 standard deviations by 0.6%.
    assert error < {"4bit": 0.1, "8bit": 0.01}[kind]
    bits = 8 * sum(buffer.nbytes for buffer in head.buffers() if buffer.numel() != 256) / dense.weight.numel()
    assert bits < {"4bit": 4.2, "8bit": 8.51}[kind], "8bit: a scale of 32 bits for 64 columns"
    assert torch.equal(back[5:9], head.rows(5, 9, torch.float32))


def test_codes_do_not_depend_on_the_dtype_of_computation(tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "fp32", dtype=torch.float32)
    heads = [
        base(directory, lm_head="8bit", compute_dtype=dtype).model.get_output_embeddings()
        for dtype in ("float32", "bfloat16")
    ]
    for ours, theirs in zip(*(head.buffers() for head in heads), strict=True):
        assert torch.equal(ours, theirs)


def test_the_base_is_named_as_with_its_own_head(tiny_llama: Path) -> None:
    assert base(tiny_llama).fingerprint.difference(base(tiny_llama, lm_head="4bit").fingerprint) is None


def test_a_tied_embedding_stays_as_it_was(tiny_models: Models) -> None:
    directory = tiny_models("llama_tied")
    dense, quantized = base(directory).model, base(directory, lm_head="4bit").model
    assert torch.equal(dense.get_input_embeddings().weight, quantized.get_input_embeddings().weight)


def test_a_trained_bias_of_the_head_gets_its_gradient() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(64, 128)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    model = Model()
    quantize_head(model, "8bit")
    head = model.lm_head
    assert isinstance(head, QuantizedHead)
    assert list(dict(model.named_parameters())) == ["lm_head.bias"]
    hidden = torch.randn(3, 64, requires_grad=True)
    head(hidden).sum().backward()
    plain = hidden.detach().clone().requires_grad_()
    F.linear(plain, head.rows(0, 128, torch.float32), head.bias.detach()).sum().backward()
    torch.testing.assert_close(hidden.grad, plain.grad, rtol=1e-5, atol=1e-5)
    assert head.bias.grad.tolist() == [3.0] * 128


def test_a_quantized_head_is_no_target_of_adapters(tiny_llama: Path) -> None:
    model = base(tiny_llama, lm_head="4bit", embeddings="cpu").model
    assert "lm_head" not in adapted_paths(model, AdapterConfig())
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(AdapterError, match="Embeddings and the LM head are not adapted"):
            find_targets(model, [name])


def test_a_head_that_is_no_linear_layer_is_reported() -> None:
    class Odd(nn.Module):
        def get_output_embeddings(self) -> nn.Module:
            return nn.Identity()

    with pytest.raises(ModelError, match=r"cannot be held in 8bit\. Set model\.lm_head=dense"):
        quantize_head(Odd(), "8bit")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_resumes_bit_for_bit(tiny_config: Config, kind: str) -> None:
    whole = start_run(tiny_config("whole", model={"lm_head": kind}))
    losses: list[float] = []
    assert whole.train(lambda record: losses.append(record["loss"]))
    assert losses[-1] < losses[0]
    parts = start_run(tiny_config("parts", model={"lm_head": kind}))
    parts.train(lambda record: None, stop_after=5)
    again: list[float] = []
    resume_run(parts.directory).train(lambda record: again.append(record["loss"]))
    assert again == losses[5:]


def test_a_head_held_otherwise_is_another_run(tiny_config: Config) -> None:
    run = start_run(tiny_config(model={"lm_head": "4bit"}))
    with pytest.raises(CheckpointError, match=r"model\.lm_head: 4bit → dense"):
        resume_run(run.directory, ["model.lm_head=dense"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_merge_is_verified_with_the_original_head(
    tiny_config: Config, tiny_models: Models, tmp_path: Path, family: str
) -> None:
    directory = tiny_models(family)
    memory_efficient = {"name": str(directory), "lm_head": "4bit", "embeddings": "cpu"}
    run = start_run(tiny_config(model=memory_efficient, optimizer={"learning_rate": 2e-2}))
    run.train(lambda record: None)
    done = merge_run(run.directory, tmp_path / "merged", base="dequantized")
    assert done.report.verification is not None
    assert done.report.verification.difference.kl < 1e-5
    name = "lm_head.weight" if family == "llama" else "model.embed_tokens.weight"
    merged, source = (load_file(d / "model.safetensors")[name] for d in (tmp_path / "merged", directory))
    assert torch.equal(merged, source.to(torch.float16))

    own, exact = open_trained(run.directory), open_trained(run.directory, lm_head="dense", embeddings="device")
    losses = [evaluate_trained(trained)["eval_loss"] for trained in (own, exact)]
    assert losses[0] != losses[1], "a run is evaluated with its own head"
    assert done.choice.eval_loss["dequantized"] == pytest.approx(losses[1], rel=1e-6)


def test_the_whole_logits_of_an_own_loss_path_have_the_same_gradient(tiny_llama: Path) -> None:
    model = base(tiny_llama, lm_head="8bit").model
    pack, gradients = pack_of(20), []
    for own in (False, True):
        embedding = model.get_input_embeddings()
        embedding.weight.requires_grad_(True)
        embedding.weight.grad = None
        loss_sum(model, pack, LossPath(own_logits=own)).backward()
        gradients.append(embedding.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
