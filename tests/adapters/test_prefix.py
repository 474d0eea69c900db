"""Promises of prefix tuning next to PEFT and transformers: positions, windows, grouped heads, documents, the MLP."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_adapters import dense, differ_by
from packed_losses import examples, loss_and_gradient
from tiny_models import load
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
)

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.peft_format import read_adapter, write_adapter
from qlora_trainer.adapters.prefix import FILE_TENSOR
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.errors import AdapterError, QLoRATrainerError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.model.forward import examine_forward, logits
from qlora_trainer.model.modules.packed_attention import attends_apart, packed_documents
from qlora_trainer.model.modules.prefix_cache import positions_before

Models = Callable[[str], Path]
P = 4
FAMILIES = [
    "llama",
    "qwen2",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt2",
]  # windows of 6; biases; soft caps; trained positions
NAMED = {"base_model_name_or_path": "tiny", "revision": None}


def settings(**changes: Any) -> AdapterConfig:
    return AdapterConfig(**{"kind": "prefix", "virtual_tokens": P, **changes})


def biased(model: Any) -> Any:
    """Give biases values, where a model has any that begin at 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def written(model: Any, config: AdapterConfig, directory: Path) -> Path:
    tensors = adapter_state_dict(model)
    write_adapter(directory, tensors, adapter_kind(config).file_config(config, model, tensors, [], NAMED))
    return directory


@torch.no_grad()
def packed_logits(model: Any, rows: list[list[int]]) -> list[Tensor]:
    """Of each row, all of them packed."""
    (pack,) = make_packs([Example(row, row) for row in rows], 1000, packing=True)
    assert pack.row_lengths == [len(row) for row in rows], "in their order"
    return list(logits(model, pack)[0].split([len(row) for row in rows]))


ROWS = [row.input_ids for row in examples(128)]  # of 2 to 30 tokens, past the windows of 6


@pytest.mark.parametrize("family", FAMILIES)
def test_each_packed_document_has_the_logits_that_peft_gives_it_alone(
    family: str, tiny_models: Models, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = biased(dense(tiny_models(family)))
    base = copy.deepcopy(model)
    add_adapters(model, settings())
    theirs = PeftModel.from_pretrained(base, written(model, settings(), tmp_path))
    assert attends_apart(model, 128), "or it would be padded"
    order = sorted(ROWS, key=len, reverse=True)
    for row, packed in zip(order, packed_logits(model, order), strict=True):
        with torch.no_grad():
            ids = torch.tensor([row])
            expected = theirs(input_ids=ids).logits[0]
            alone = model(input_ids=ids).logits[0]
            padded = model(input_ids=torch.tensor([[*row, 0, 0]]), use_cache=False).logits[0, : len(row)]
        for found in (packed, alone, padded):
            assert differ_by(found, expected) < 1e-5


def test_a_decoder_that_is_called_without_the_module_around_it_has_the_prefix(tmp_path: Path) -> None:
    """OPT's language model calls the decoder inside of its base model."""
    from peft import PeftModel

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "word_embed_proj_dim": 64}
    model = biased(AutoModelForCausalLM.from_config(OPTConfig(vocab_size=128, ffn_dim=64, **shape)).eval())
    base = copy.deepcopy(model)
    add_adapters(model, settings())
    theirs = PeftModel.from_pretrained(base, written(model, settings(), tmp_path))
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert differ_by(model(input_ids=ids).logits, expected) < 1e-5
        assert differ_by(model.lm_head(model.base_model(input_ids=ids).last_hidden_state), expected) < 1e-5
        assert differ_by(packed_logits(model, [ROWS[4], ROWS[0]])[1], expected[0]) < 1e-5


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_positions_are_after_the_prefix_and_a_window_leaves_it_behind(family: str, tiny_models: Models) -> None:
    """The last of 30 tokens sees no key of the prefix in a layer with a window of 6."""
    model = dense(tiny_models(family))
    add_adapters(model, settings())
    seen = []
    with torch.no_grad():
        for change in (0.0, 5.0):
            dict(trainable_parameters(model))[FILE_TENSOR].add_(change)
            if family == "mistral":  # all layers have a window: two of them reach back 10 tokens
                seen.append(packed_logits(model, [ROWS[4]])[0])
            else:
                seen.append(model(input_ids=torch.tensor([ROWS[4]])).logits[0])
    first = 2 * (6 - 1)
    assert not torch.equal(seen[0][:first], seen[1][:first])
    assert torch.equal(seen[0][first:], seen[1][first:]) == (family == "mistral"), "gemma2's other layer sees all"


def test_another_document_of_a_pack_changes_nothing(tiny_models: Models) -> None:
    model = dense(tiny_models("llama"))
    add_adapters(model, settings())
    first, second = packed_logits(model, [ROWS[4], ROWS[0]])
    _, after_another = packed_logits(model, [[5] * 30, ROWS[0]])
    assert torch.equal(second, after_another)
    assert first.shape[0] == 30


@pytest.mark.parametrize("projection", [{}, {"prefix_projection": True, "prefix_hidden_size": 3}], ids=["", "MLP"])
def test_the_gradient_through_packed_documents_is_right_in_fp64(projection: dict[str, Any]) -> None:
    """Of GPT-2, which computes all of it in fp64."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=16)).eval()
    add_adapters(model, settings(virtual_tokens=2, **projection))
    model.double()
    (pack,) = make_packs([Example([3, 4, 5], [3, 4, 5]), Example([6, 7], [6, 7])], 10, packing=True)
    trained = [parameter for _, parameter in trainable_parameters(model)]

    def outputs(*values: Tensor) -> Tensor:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        with packed_documents(model):
            inputs = {"input_ids": pack.input_ids, "position_ids": pack.position_ids, "use_cache": False}
            named = {**inputs, "document_bounds": [0, 3, 5]}
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), kwargs=named).logits

    assert torch.autograd.gradcheck(outputs, [p.detach().clone().requires_grad_() for p in trained], fast_mode=True)


def test_rows_that_are_padded_on_the_left_have_the_logits_of_those_alone(tiny_models: Models) -> None:
    model = dense(tiny_models("llama"))
    add_adapters(model, settings())
    ids = torch.tensor([[0, 0, 0, 7, 8], [3, 4, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        assert differ_by(both[0, 3:], model(input_ids=ids[:1, 3:]).logits[0]) < 1e-5
        assert differ_by(both[1], model(input_ids=ids[1:]).logits[0]) < 1e-5
    with pytest.raises(AdapterError, match="given one of 4 dimensions"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 5, 5))
    by_layer_type = {"full_attention": torch.ones(2, 1, 5, 5)}  # as transformers 5 takes masks too
    with pytest.raises(AdapterError, match=r"takes an attention mask of \(rows, tokens\), .* one of the type dict"):
        model(input_ids=ids, attention_mask=by_layer_type)


def test_the_prefix_is_drawn_from_the_seed_as_peft_draws_its_own(tiny_models: Models) -> None:
    made = []
    for seed in (0, 0, 1):
        model = load(tiny_models("llama")).model
        add_adapters(model, settings(virtual_tokens=40), seed)
        made.append(adapter_state_dict(model)[FILE_TENSOR])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert made[0].shape == (40, 2 * 2 * 2 * 16), "tokens x layers x keys and values x heads x numbers"
    assert made[0].mean().item() == pytest.approx(0, abs=0.05)
    assert made[0].std().item() == pytest.approx(1, abs=0.05)


PROJECTED = settings(prefix_projection=True, prefix_hidden_size=8)


def test_a_prefix_of_an_mlp_gives_the_same_gradient_packed_and_padded(tiny_models: Models) -> None:
    model = load(tiny_models("mistral")).model
    add_adapters(model, PROJECTED)
    rows = examples(model.config.vocab_size)
    packed, expected = loss_and_gradient(model, rows, packing=True, limit=10_000)
    assert expected.numel() == sum(p.numel() for _, p in trainable_parameters(model))
    assert expected.norm() > 0
    for packing, limit in ((False, 10_000), (True, 40)):
        loss, gradient = loss_and_gradient(model, rows, packing, limit)
        assert loss == pytest.approx(packed, rel=1e-5)
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_the_mlp_computes_what_pefts_does(tiny_models: Models) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8
    )
    model = dense(tiny_models("llama"))
    theirs = get_peft_model(copy.deepcopy(model), config).eval()
    add_adapters(model, PROJECTED)
    ours = dict(trainable_parameters(model))
    with torch.no_grad():
        for mine, name in zip(ours.values(), ["embedding.weight", *_of_transform()], strict=True):
            mine.copy_(theirs.prompt_encoder["default"].get_parameter(name))
        ids = torch.tensor([ROWS[0]])
        assert differ_by(model(input_ids=ids).logits, theirs(input_ids=ids).logits) < 1e-5


def _of_transform() -> list[str]:
    return [f"transform.{number}.{name}" for number in (0, 2) for name in ("weight", "bias")]


def test_the_file_of_a_prefix_of_an_mlp_holds_what_it_makes_and_not_the_mlp(
    tiny_models: Models, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = dense(tiny_models("llama"))
    base, again = copy.deepcopy(model), copy.deepcopy(model)
    add_adapters(model, PROJECTED)
    assert positions_before(model) == P
    directory = written(model, PROJECTED, tmp_path)
    stored = read_adapter(directory)
    assert [*stored.tensors] == [FILE_TENSOR]
    assert stored.differences(PROJECTED) == {}
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(base, directory)
        assert differ_by(theirs(input_ids=ids).logits, expected) < 1e-5
        add_adapters(again, PROJECTED.as_stored)
        load_adapter_state(again, stored.tensors)
        assert differ_by(again(input_ids=ids).logits, expected) < 1e-6
    with pytest.raises(AdapterError, match=r"not the MLP .* Set adapter\.prefix_projection=false"):
        load_adapter_state(model, stored.tensors)


def test_a_projected_prefix_of_peft_is_read(tiny_models: Models, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=8
    )
    model = dense(tiny_models("qwen2"))
    theirs = get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path)
    add_adapters(model, settings())
    load_adapter_state(model, read_adapter(tmp_path).tensors)
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        assert differ_by(model(input_ids=ids).logits, theirs(input_ids=ids).logits) < 1e-5


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_models_whose_attention_takes_no_prefix_are_refused_by_name(tiny_models: Models) -> None:
    with pytest.raises(AdapterError, match="Linear is no model of transformers"):
        add_adapters(nn.Linear(8, 8), settings())
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2))
    with pytest.raises(
        AdapterError, match=r"MambaForCausalLM cannot have a prefix: it has layers (without|that keep) "
    ):
        add_adapters(mamba, settings())
    other: Any = LlamaForCausalLM(LlamaConfig(**SMALL))
    other.config.num_hidden_layers = 3
    with pytest.raises(AdapterError, match="LlamaForCausalLM cannot have a prefix: it has no decoder that is given a"):
        add_adapters(other, settings())
    latent = DeepseekV3Config(
        **SMALL,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        qk_rope_head_dim=8,
        first_k_dense_replace=2,
    )
    one_head = FalconConfig(**SMALL, multi_query=True)
    for config in (latent, one_head):
        model = AutoModelForCausalLM.from_config(config)
        add_adapters(model, settings())
        with pytest.raises(AdapterError, match=r"Model cannot have a prefix: by its config\.json"):
            model(input_ids=torch.tensor([[1, 2]]), use_cache=False)


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        ({"past_key_values": None, "attention_mask": None}, "layer 1 asks for no keys and values before its own"),
        ({"past_key_values": None}, "its forward fails with RuntimeError: The size of tensor"),
    ],
)
def test_a_layer_that_does_not_ask_for_the_prefix_is_refused_before_training(
    replaced: dict[str, None], said: str, tiny_models: Models
) -> None:
    model = load(tiny_models("llama")).model
    attention: Any = model.model.layers[1].self_attn
    whole = attention.forward
    attention.forward = lambda *inputs, **named: whole(*inputs, **{**named, **replaced})
    add_adapters(model, settings())
    with pytest.raises(QLoRATrainerError, match=rf"Llama\w+ cannot have a prefix: .*{said}"):
        examine_forward(model)
