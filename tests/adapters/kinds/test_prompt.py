"""Promises of prompt tuning: which tokens get which vectors, what trains, and how it begins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spying import noting, unchanged
from tiny_models import load, make_model_directory
from tiny_tokenizers import tiny_tokenizer
from torch import Tensor, nn

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.kinds.prompt_embedding import PromptEmbedding
from qlora_trainer.adapters.tokens.token_rows import TOKENS_AT_ONCE
from qlora_trainer.adapters.trainable import leading_ids
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.weights.model_directory import ModelDirectory

V, P, H = 11, 3, 4
IDS = torch.tensor([[V, V + 1, V + 2, 5, 0, 10], [V, V + 1, V + 2, 7, 5, 0]])  # the last token of all is padding


def prompt_of(dtype: torch.dtype, prompt_dtype: torch.dtype | None = None) -> PromptEmbedding:
    torch.manual_seed(0)
    base = nn.Embedding(V, H).to(dtype).requires_grad_(False)
    return PromptEmbedding(base, torch.randn(P, H).to(prompt_dtype or dtype))


def gradient_for(module: PromptEmbedding, ids: Tensor, incoming: Tensor) -> Tensor:
    module.prompt_embeddings.grad = None
    module(ids).backward(incoming)
    assert module.prompt_embeddings.grad is not None
    return module.prompt_embeddings.grad


def test_tokens_of_the_vocabulary_have_the_bases_rows_and_virtual_ones_their_own() -> None:
    module = prompt_of(torch.bfloat16, torch.float32)
    rows = module(IDS)
    assert rows.dtype == torch.bfloat16
    assert module.leading_ids == [V, V + 1, V + 2]
    for place in (0, 1):
        assert torch.equal(rows[place, :P], module.prompt_embeddings.to(torch.bfloat16))
        assert torch.equal(rows[place, P:], module.base(IDS[place, P:]))


def test_the_gradient_of_the_wrapped_embedding_is_right_in_fp64() -> None:
    module = prompt_of(torch.float64)

    def embedded(prompt: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"prompt_embeddings": prompt}, (IDS,))

    assert torch.autograd.gradcheck(embedded, module.prompt_embeddings.detach().requires_grad_())


def test_gradients_are_added_up_in_fp32_over_more_tokens_than_are_taken_at_once() -> None:
    """Of bf16 gradients with equal values, a sum in bf16 is another number."""
    module = prompt_of(torch.bfloat16, torch.float32)
    ids = torch.tensor([[V, 5, 5]]).expand(2 * TOKENS_AT_ONCE + 1, -1)
    gradient = gradient_for(module, ids, torch.ones(*ids.shape, H, dtype=torch.bfloat16))
    expected = torch.zeros(P, H)
    expected[0] = 2 * TOKENS_AT_ONCE + 1
    assert torch.equal(gradient, expected)


def test_a_gradient_that_is_not_finite_elsewhere_leaves_those_of_virtual_tokens_finite() -> None:
    module = prompt_of(torch.float32)
    incoming = torch.ones(*IDS.shape, H)
    incoming[:, P:] = torch.inf
    assert torch.equal(gradient_for(module, IDS, incoming), torch.full((P, H), 2.0))


def test_backward_keeps_no_more_than_a_number_a_token() -> None:
    module = prompt_of(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        module(IDS)
    assert [tuple(tensor.shape) for tensor in kept] == [tuple(IDS.shape)]


def settings(**changes: Any) -> AdapterConfig:
    return AdapterConfig(**{"kind": "prompt", "virtual_tokens": 5, **changes})


def test_virtual_tokens_begin_as_rows_of_the_embedding_that_the_seed_draws(tiny_llama: Path) -> None:
    made = []
    for seed in (0, 0, 1):
        model = load(tiny_llama).model
        table = model.get_input_embeddings().weight
        add_adapters(model, settings(virtual_tokens=20), seed)
        made.append(adapter_state_dict(model)["prompt_embeddings"])
        assert made[-1].dtype == torch.float32
        assert all((row == table).all(dim=1).any() for row in made[-1])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("text", ["Answer in one word.", "the"], ids=["cut", "repeated"])
def test_a_text_gives_the_values_that_peft_gives(tiny_llama: Path, text: str) -> None:
    from peft import PromptEmbedding as Theirs
    from peft import PromptTuningConfig

    tokenizer = tiny_tokenizer("smollm2")
    count = max(len(tokenizer(text)["input_ids"]) - 2, 3)
    model = load(tiny_llama).model
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=count,
        token_dim=64,
        num_transformer_submodules=1,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=str(tiny_llama),
    )
    theirs = Theirs(config, model.get_input_embeddings())
    add_adapters(model, settings(virtual_tokens=count, prompt_init_text=text), tokenizer=tokenizer)
    assert torch.equal(adapter_state_dict(model)["prompt_embeddings"], theirs.embedding.weight)


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (None, "no tokenizer was given"),
        (lambda _: {"input_ids": []}, "becomes 0 tokens"),
        (lambda _: {"input_ids": [3, 99999]}, "99999, beyond the"),
    ],
)
def test_a_text_that_gives_no_values_is_refused(tiny_llama: Path, tokenizer: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        add_adapters(load(tiny_llama).model, settings(prompt_init_text="fox"), tokenizer=tokenizer)


def test_a_model_that_looks_tokens_up_elsewhere_too_is_refused(tiny_llama: Path) -> None:
    model = load(tiny_llama).model
    model.model.embed_tokens_per_layer = nn.Embedding(model.config.vocab_size, 8)
    with pytest.raises(AdapterError, match=r"looks tokens up in model\.embed_tokens_per_layer too"):
        add_adapters(model, settings())
    with pytest.raises(AdapterError, match="Linear has no input embedding"):
        add_adapters(nn.Linear(8, 8), settings())


def test_an_embedding_on_the_cpu_gives_the_same(tiny_llama: Path) -> None:
    found = []
    for place in ("device", "cpu"):
        model = load(tiny_llama, embeddings=place).model
        add_adapters(model, settings(), seed=2)
        ids = torch.tensor([[*leading_ids(model), 4, 9]])
        output = model(input_ids=ids, use_cache=False).logits
        output.square().sum().backward()
        found.append((output.detach(), model.get_input_embeddings().prompt_embeddings.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_twenty_virtual_tokens_of_width_768_train_15_360_numbers(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    directory = make_model_directory(tmp_path / "wide", hidden_size=768, num_hidden_layers=1)
    config = tiny_config(model={"name": str(directory)}, adapter={"kind": "prompt"})
    assert plan_memory(ModelDirectory.open(directory), config).adapter_parameters == 15_360


def test_values_of_another_width_are_refused(tiny_llama: Path) -> None:
    model = load(tiny_llama).model
    add_adapters(model, settings())
    with pytest.raises(AdapterError, match=r"has shape \(5, 32\), the model needs \(5, 64\)"):
        load_adapter_state(model, {"prompt_embeddings": torch.zeros(5, 32)})
