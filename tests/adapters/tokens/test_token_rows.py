"""Promises of rows of tokens that train: which rows they are, how they begin, and that nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spying import noting
from tiny_models import load, make_model_directory
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.tokens.new_tokens import run_tokenizer
from qlora_trainer.adapters.tokens.token_choice import choose_tokens
from qlora_trainer.adapters.tokens.token_modules import TokenEmbedding, TokenHead, token_modules
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.merging.rounding import rounded_weights
from qlora_trainer.model.forward import LossPath, find_loss_path, loss_sum
from qlora_trainer.weights.model_directory import ModelDirectory

Models = Callable[[str], Path]
TRAINED = ["Ġthe", "Ġfox", "<|im_start|>"]
NEW = ["<gene>", "<protein>", "<cell>", "<virus>"]
IDS = torch.tensor([[5, 301, 3, 9, 2, 7, 44]])


def put(directory: Path, adapter: dict[str, Any], **settings: Any) -> Any:
    """A base with adapters, as a run makes it."""
    config = AdapterConfig(rank=4, **adapter)
    model = load(directory, **settings).model
    add_adapters(model, config, tokenizer=run_tokenizer(ModelDirectory.open(directory), config))
    return model


def embedding_of(height: int, ids: list[int], dtype: torch.dtype = torch.float64) -> TokenEmbedding:
    torch.manual_seed(0)
    base = nn.Embedding(height, 4).to(dtype).requires_grad_(False)
    return TokenEmbedding(base, ids, torch.randn(len(ids), 4, dtype=torch.float64))


def test_trained_tokens_have_their_own_rows_and_all_others_the_bases() -> None:
    module = embedding_of(11, [2, 7, 11, 12])
    ids = torch.tensor([[2, 0, 12, 7], [11, 10, 2, 3]])
    rows = module(ids)
    for token, row in zip(ids.flatten().tolist(), rows.flatten(0, 1), strict=True):
        own = {2: 0, 7: 1, 11: 2, 12: 3}.get(token)
        assert torch.equal(row, module.weight[token] if own is None else module.values[own])


@pytest.mark.parametrize(
    "scale", [None, 2.5, torch.tensor(3.0, dtype=torch.float64)], ids=["plain", "number", "tensor"]
)
def test_the_gradient_of_the_embedding_is_right_in_fp64(scale: Any) -> None:
    module = embedding_of(11, [2, 7, 11, 12])
    module.base.embed_scale = scale  # as Gemma 3 has one
    ids = torch.tensor([[2, 0, 12, 7], [2, 10, 2, 3]])

    def embedded(values: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"values": values}, (ids,))

    assert torch.autograd.gradcheck(embedded, module.values.detach().requires_grad_())


@pytest.mark.parametrize("ids", [[2, 7, 10], [2, 7, 11, 12]], ids=["rows that exist", "new rows"])
def test_the_head_computes_the_logits_of_its_whole_matrix_and_copies_them_to_lengthen_them_alone(
    ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    base = nn.Linear(4, 11, bias=False, dtype=torch.float64).requires_grad_(False)
    height = max(11, ids[-1] + 1)
    head = TokenHead(base, ids, height, torch.randn(len(ids), 4, dtype=torch.float64))
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    padded: list[object] = []
    monkeypatch.setattr(F, "pad", noting(F.pad, lambda logits, size: padded.append(size)))
    found = head(hidden)
    assert padded == ([] if height == 11 else [(0, height - 11)])
    matrix = torch.cat([base.weight, base.weight.new_zeros(height - 11, 4)]).index_copy(0, head.ids, head.values)
    torch.testing.assert_close(found, hidden @ matrix.T, rtol=0, atol=1e-14)

    def computed(hidden: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"values": values}, (hidden,))

    assert torch.autograd.gradcheck(computed, (hidden.requires_grad_(), head.values.detach().requires_grad_()))


HELD = [
    ("llama", {}),
    ("llama_tied", {}),
    ("gemma3", {"compute_dtype": "bfloat16"}),
    ("gpt2", {}),
    ("llama_tied", {"lm_head": "4bit", "embeddings": "cpu"}),
    ("llama", {"lm_head": "8bit"}),
    ("gemma3", {"lm_head": "8bit", "embeddings": "cpu", "compute_dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("family", "settings"), HELD)
def test_before_the_first_step_the_model_computes_what_the_base_does(
    tiny_models: Models, family: str, settings: dict[str, Any]
) -> None:
    directory = tiny_models(family)
    model = put(directory, {"trainable_tokens": TRAINED}, **settings)
    embedding, head = token_modules(model)
    ids = torch.cat([IDS, torch.tensor([embedding.token_ids])], dim=1)
    base = load(directory, **settings).model
    with torch.no_grad():
        assert torch.equal(embedding(ids), base.get_input_embeddings()(ids))
        found, expected = model(input_ids=ids).logits, base(input_ids=ids).logits
    assert found.shape == expected.shape
    is_tied = base.config.tie_word_embeddings
    if is_tied and "lm_head" in settings:  # the rows are the embedding's, and those of the head are rounded to 4 bits
        for each in (found, expected):
            each[..., list(embedding.token_ids)] = 0
    # Products of one shape sum otherwise than those of another.
    bound = 1e-5 if found.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * expected.abs().max().item())
    assert sum(1 for _ in head.own_parameters()) == (0 if is_tied else 1)
    assert isinstance(head, TokenHead)


def test_new_tokens_take_the_rows_behind_the_tokenizer_first_and_then_lengthen_the_matrices(tmp_path: Path) -> None:
    directory = ModelDirectory.open(make_model_directory(tmp_path / "model", vocab_size=401))
    rows, config = directory.facts.vocabulary, AdapterConfig(new_tokens=NEW)
    assert rows is not None
    before = len(run_tokenizer(directory, AdapterConfig()))
    tokenizer = run_tokenizer(directory, config)
    assert [tokenizer.convert_tokens_to_ids(token) for token in NEW] == list(range(before, before + 4))
    model = put(directory.path, {"new_tokens": NEW})
    embedding, head = token_modules(model)
    assert embedding.token_ids == tuple(range(before, before + 4))
    assert before < rows < before + 4, "the test needs both kinds of rows"
    ids = torch.tensor([[*range(before, before + 4), 5]])
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (1, 5, before + 4)
    assert tokenizer("a <gene> b<cell>")["input_ids"].count(before) == 1
    assert isinstance(head, TokenHead)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_new_tokens_begin_as_the_mean_of_all_tokens_or_of_a_texts(tiny_models: Models, family: str) -> None:
    directory = tiny_models(family)
    tokenizer = run_tokenizer(ModelDirectory.open(directory), AdapterConfig())
    before, text = len(tokenizer), tokenizer("the quick fox")["input_ids"]
    base = load(directory).model
    texts = {"<gene>": "the quick fox", "<cell>": "the"}
    for module, matrix in zip(
        token_modules(put(directory, {"new_tokens": texts})),
        (base.get_input_embeddings(), base.get_output_embeddings()),
        strict=True,
    ):
        for _, values in module.own_parameters():
            torch.testing.assert_close(values[0], matrix.weight[text].float().mean(dim=0))
            assert values.dtype == torch.float32
    for module, matrix in zip(
        token_modules(put(directory, {"new_tokens": ["<gene>", "<cell>"]})),
        (base.get_input_embeddings(), base.get_output_embeddings()),
        strict=True,
    ):
        for _, values in module.own_parameters():
            torch.testing.assert_close(values, matrix.weight[:before].float().mean(dim=0).expand(2, -1))


@pytest.mark.parametrize(("family", "settings"), [("llama", {}), ("llama_tied", {}), ("llama", {"lm_head": "8bit"})])
def test_the_chunked_loss_has_the_gradient_of_the_models_own_logits(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    directory = make_model_directory(tmp_path / "model", family, vocab_size=401)
    model = put(directory, {"new_tokens": NEW, "trainable_tokens": TRAINED}, **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = find_loss_path(model)
    assert not path.own_logits
    (pack,) = make_packs([Example(row, row) for row in ([5, 402, 9, 400, 399, 1], [401, 7, 300])], 100, packing=True)
    found = []
    for each in (path, LossPath(own_logits=True)):
        model.zero_grad()
        loss = loss_sum(model, pack, each)
        loss.backward()
        found.append(
            (loss.detach(), torch.cat([p.grad.flatten() for _, p in trainable_parameters(model) if p.grad is not None]))
        )
    (ours, gradient), (theirs, expected) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_an_adapter_in_bf16_keeps_rows_of_tokens_in_fp32_and_they_do_not_decay(tiny_llama: Path) -> None:
    model = put(tiny_llama, {"trainable_tokens": TRAINED, "dtype": "bfloat16"})
    for module in token_modules(model):
        assert {p.dtype for _, p in module.own_parameters()} == {torch.float32}
        assert not any(module.decays(name) for name, _ in module.own_parameters())


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"new_tokens": ["<|im_end|>"]}, r"new_tokens names '<\|im_end\|>', which the tokenizer .* has already"),
        ({"trainable_tokens": ["<gene>"]}, r"trainable_tokens names '<gene>', which is no token: .* adapter.new_tok"),
        ({"trainable_tokens": ["Ġthe", " the"]}, r"names the token \d+ twice, as 'Ġthe' and ' the'"),
        ({"trainable_tokens": ["<gene>"], "new_tokens": ["<gene>"]}, "is in adapter.trainable_tokens and"),
        ({"new_tokens": {"<gene>": "<gene>"}}, "gives '<gene>' the text '<gene>', which holds a token without a row"),
    ],
)
def test_tokens_that_cannot_train_are_refused(tiny_llama: Path, adapter: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        run_tokenizer(ModelDirectory.open(tiny_llama), AdapterConfig(**adapter))


def test_models_that_cannot_train_rows_of_tokens_are_refused(tiny_llama: Path) -> None:
    config = AdapterConfig(trainable_tokens=TRAINED)
    tokenizer = run_tokenizer(ModelDirectory.open(tiny_llama), config)
    model = load(tiny_llama).model
    model.model.embed_tokens_per_layer = nn.Embedding(model.config.vocab_size, 8)
    with pytest.raises(AdapterError, match=r"looks tokens up in model\.embed_tokens_per_layer too"):
        add_adapters(model, config, tokenizer=tokenizer)
    with pytest.raises(AdapterError, match="no tokenizer was given"):
        add_adapters(load(tiny_llama).model, config)
    model = load(tiny_llama).model
    model.lm_head.bias = nn.Parameter(torch.zeros(model.config.vocab_size))
    with pytest.raises(AdapterError, match="has a bias"):
        add_adapters(model, config, tokenizer=tokenizer)


def test_rows_are_saved_and_loaded_by_pefts_names(tiny_models: Models) -> None:
    name = "token_adapter.trainable_tokens_delta"
    for family, places in (("llama", ["model.embed_tokens", "lm_head"]), ("llama_tied", ["model.embed_tokens"])):
        model = put(tiny_models(family), {"trainable_tokens": TRAINED})
        state = adapter_state_dict(model)
        assert [key for key in state if name in key] == [f"base_model.model.{place}.{name}" for place in places]
        changed = {key: tensor + 0.5 if name in key else tensor for key, tensor in state.items()}
        load_adapter_state(model, changed)
        again = adapter_state_dict(model)
        assert all(torch.equal(again[key], changed[key]) for key in changed)


class Vocabulary:
    """A tokenizer of a few tokens, which makes a token of each character."""

    def __init__(self, **ids: int) -> None:
        self.ids = ids

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def get_vocab(self) -> dict[str, int]:
        return self.ids


def test_a_tokenizer_of_another_model_is_refused() -> None:
    new, old = AdapterConfig(new_tokens=["new"]), AdapterConfig(trainable_tokens=["old"])
    with pytest.raises(AdapterError, match="names the token 9, beyond the 8 rows"):
        choose_tokens(old, Vocabulary(old=9), 8)
    with pytest.raises(AdapterError, match="The tokenizer has 9 tokens, and the model's embedding 8 rows"):
        choose_tokens(new, Vocabulary(new=9), 8)
    for token, height in ((7, 8), (8, 9)):
        choice = choose_tokens(new, Vocabulary(new=token), 8)
        assert (choice.ids, choice.height, choice.existing) == ((token,), height, token)


def test_the_check_of_a_merge_rounds_the_rows_as_the_merge_does(tiny_llama: Path) -> None:
    model = put(tiny_llama, {"trainable_tokens": TRAINED}, compute_dtype="float32")
    for module in token_modules(model):
        module.values.data.add_(1 / 3)
        values = module.values.detach().clone()
        with rounded_weights(model, torch.float16):
            assert torch.equal(module.values, values.half().float())
        assert torch.equal(module.values, values)
