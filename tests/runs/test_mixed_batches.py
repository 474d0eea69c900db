"""A batch whose rows take different adapters has what each row has alone, by ourselves and by PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from stored_adapters import Tokens, store_adapter
from tiny_models import load
from torch import Tensor

from qlora_kernels.nf4 import dequantize_nf4
from qlora_trainer.adapters.several import mixed
from qlora_trainer.adapters.several.mixed import RowsLinear
from qlora_trainer.adapters.trainable import leading_ids
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.model.load import Base
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.runs.adapter_set import AdapterSet
from qlora_trainer.training.generation import generate_answers

Models = Callable[[str], Path]
ATTENTION = {"llama": ["q_proj", "v_proj"], "qwen2": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}
LORA: dict[str, dict[str, Any]] = {
    "all": {"rank": 4},
    "wide": {"rank": 16, "alpha": 8, "use_rslora": True},
    "few": {"rank": 1, "target_modules": "attention"},
    "patterns": {"rank": 3, "layers_to_transform": [1], "rank_pattern": {"layers.1": 3}, "target_modules": "mlp"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "dora": {"kind": "dora", "rank": 4, "target_modules": "attention"},
    "ia3": {"kind": "ia3"},
}
UNMIXABLE: dict[str, dict[str, Any]] = {
    "bottleneck": {"kind": "bottleneck", "bottleneck_size": 8},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "tokens": {"rank": 2, "trainable_tokens": ["<a>", "<b>"]},
}
TOKENS = Tokens({"<a>": 5, "<b>": 40})


def settings_for(family: str, name: str) -> dict[str, Any]:
    settings = {**LORA, **OTHERS, **UNMIXABLE}[name]
    if name == "patterns":
        settings = {**settings, "rank_pattern": {("mlp.c_fc" if family == "gpt2" else "up_proj"): 5}}
    return settings


@pytest.fixture(scope="module")
def sets(tiny_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], AdapterSet]:
    """The set of a family's base with all adapters, made once."""
    made: dict[str, AdapterSet] = {}

    def of(family: str) -> AdapterSet:
        if family not in made:
            base = load(tiny_models(family), device="cpu", compute_dtype="float32")
            made[family] = AdapterSet(base)
            folder = tmp_path_factory.mktemp(family)
            for seed, name in enumerate({**LORA, **OTHERS, **UNMIXABLE}):
                path = store_adapter(folder / name, base, seed, tokenizer=TOKENS, **settings_for(family, name))
                made[family].load_adapter(path, name)
        assert made[family].active is None
        return made[family]

    return of


def ids(rows: int, tokens: int = 9) -> Tensor:
    return torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def logits(model: Any, input_ids: Tensor, **options: Any) -> Tensor:
    return model(input_ids=input_ids, **options).logits


def one_by_one(adapters: AdapterSet, names: list[str | None], input_ids: Tensor) -> Tensor:
    found = []
    for name, row in zip(names, input_ids, strict=True):
        adapters.set_adapter(name)
        found.append(logits(adapters.model, row[None]))
    adapters.set_adapter(None)
    return torch.cat(found)


MIXES: dict[str, list[str | None]] = {
    "LoRA of any ranks": ["all", "wide", None, "few", "patterns", "all"],
    "one adapter among plain rows": [None, "few", None],
    "next to each other": ["wide", "wide", "all", "all", None, None],
    "DoRA": ["dora", "all", None, "dora"],
    "IA3": ["ia3", None, "wide", "ia3"],
    "all kinds": ["ia3", "dora", None, "all", "few", "dora", "patterns", "ia3"],
}


@pytest.mark.parametrize("family", slow_but(["llama", "qwen2", "gpt2"], "llama"))
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_a_mixed_batch_has_the_logits_of_each_row_alone(
    mix: list[str | None], family: str, sets: Callable[[str], AdapterSet]
) -> None:
    adapters, input_ids = sets(family), ids(len(mix))
    expected = one_by_one(adapters, mix, input_ids)
    with adapters.rows(mix):
        found = logits(adapters.model, input_ids)
    size = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-6 * size
    plain = logits(adapters.model, input_ids)
    for row, name in enumerate(mix):
        differs = (expected[row] - plain[row]).abs().max() > 0.01 * size
        assert differs == (name is not None), "the adapter must matter"


def test_rows_of_the_base_have_its_bits_where_nothing_scales(sets: Callable[[str], AdapterSet]) -> None:
    adapters, input_ids = sets("llama"), ids(3)
    plain = logits(adapters.model, input_ids)
    with adapters.rows([None, "all", None]):
        assert torch.equal(logits(adapters.model, input_ids)[::2], plain[::2])


def test_the_bases_product_is_made_once_for_all_rows(
    sets: Callable[[str], AdapterSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def counting(x: Tensor, *arguments: Any) -> Tensor:
        shapes.append(tuple(x.shape[:2]))
        return original(x, *arguments)

    original = mixed.nf4_linear
    monkeypatch.setattr(mixed, "nf4_linear", counting)
    adapters = sets("llama")
    with adapters.rows(["all", "wide", "ia3", "dora", None]):
        layers = sum(isinstance(module, RowsLinear) for module in adapters.model.modules())
        logits(adapters.model, ids(5))
    assert layers == 14
    assert shapes == [(5, 9)] * layers


def test_another_order_of_the_same_adapters_takes_the_same_stacks(
    sets: Callable[[str], AdapterSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, input_ids = sets("llama"), ids(3)
    expected = one_by_one(adapters, ["few", "all", None], input_ids)
    with adapters.rows(["all", "few", "all"]):
        logits(adapters.model, input_ids)
    monkeypatch.setattr(mixed.LoraStack, "of", None)  # no further stack is made
    with adapters.rows(["few", "all", None]):
        found = logits(adapters.model, input_ids)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_16_bits_are_computed_by_rows_too(tiny_models: Models, sets: Callable[[str], AdapterSet]) -> None:
    """Within the rounding of bf16, next to each row alone in bf16."""
    source = sets("llama")
    adapters = AdapterSet(load(tiny_models("llama"), device="cpu", compute_dtype="bfloat16"))
    mix = ["all", None, "ia3", "dora"]
    for name in mix:
        if name is not None:
            adapters.load_adapter(source._sources[name].directory, name)
    input_ids = ids(4)
    expected = one_by_one(adapters, mix, input_ids).float()
    with adapters.rows(mix):
        found = logits(adapters.model, input_ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


def dequantized(base: Base, directory: Path) -> Any:
    """The base as a dense model of plain transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for path, module in base.model.named_modules():
        if isinstance(module, NF4Linear):
            model.get_submodule(path).weight = torch.nn.Parameter(dequantize_nf4(module.nf4_weight, torch.float32))
    return model


@pytest.mark.parametrize("family", slow_but(["llama", "qwen2"], "llama"))
def test_peft_gives_the_rows_of_a_batch_the_same(
    family: str, sets: Callable[[str], AdapterSet], tiny_models: Models
) -> None:
    from peft import PeftModel

    adapters = sets(family)
    mix = ["all", "few", None, "wide", "patterns", "few"]
    first, *rest = dict.fromkeys(name for name in mix if name)
    dense = dequantized(adapters.base, tiny_models(family))
    judge = PeftModel.from_pretrained(dense, adapters._sources[first].directory, adapter_name=first)
    for name in rest:
        judge.load_adapter(adapters._sources[name].directory, adapter_name=name)
    input_ids = ids(len(mix))
    expected = logits(judge.eval(), input_ids, adapter_names=[name or "__base__" for name in mix])
    with adapters.rows(mix):
        found = logits(adapters.model, input_ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_generation_by_rows_gives_each_row_the_answer_that_it_gets_alone(
    sets: Callable[[str], AdapterSet], tiny_models: Models
) -> None:
    from qlora_trainer.weights.model_directory import ModelDirectory

    adapters = sets("llama")
    tokenizer = load_tokenizer(ModelDirectory.open(tiny_models("llama")))
    names = ["all", "few", None, "wide", "all", "ia3"]
    prompts = [PromptTokens([5 + place, 6, 7, 8][: 2 + place % 3], [2]) for place in range(len(names))]
    alone = []
    for name, prompt in zip(names, prompts, strict=True):
        adapters.set_adapter(name)
        alone += generate_answers(adapters.model, tokenizer, [prompt], max_new_tokens=6)
    adapters.set_adapter("wide")
    assert adapters.answers(prompts, names, tokenizer, max_new_tokens=6) == alone
    assert adapters.active == "wide"
    adapters.set_adapter(None)
    assert len(set(alone)) > 3, "adapters must matter"
    assert adapters.answers([], [], tokenizer, max_new_tokens=6) == []

    same_length = [prompt for prompt in prompts if len(prompt.input_ids) == 4]
    places = [place for place, prompt in enumerate(prompts) if prompt in same_length]
    with adapters.rows([names[place] for place in places]):
        output = adapters.model.generate(
            input_ids=torch.tensor([prompt.input_ids for prompt in same_length]),
            attention_mask=torch.ones(len(places), 4, dtype=torch.int64),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=[2],
            pad_token_id=2,
        )
    assert tokenizer.batch_decode(output[:, 4:], skip_special_tokens=True) == [alone[place] for place in places]


def test_prompts_that_would_be_sorted_away_from_their_adapters_are_refused(
    sets: Callable[[str], AdapterSet], tiny_models: Models
) -> None:
    adapters = sets("llama")
    prompts = [PromptTokens([5, 6], [2]), PromptTokens([7], [2])]
    with adapters.rows(["all", None]), pytest.raises(AdapterError, match=r"Call AdapterSet\.answers\(\)"):
        generate_answers(adapters.model, None, prompts, max_new_tokens=2)
    with pytest.raises(AdapterError, match="2 prompts and 1 names"):
        adapters.answers(prompts, ["all"], None, max_new_tokens=2)


@pytest.mark.parametrize("name", UNMIXABLE)
def test_an_adapter_that_cannot_share_a_batch_is_refused_by_its_name(
    name: str, sets: Callable[[str], AdapterSet]
) -> None:
    adapters, input_ids = sets("llama"), ids(2)
    reason = f"it is of kind {name}, and only lora, dora, ia3 can"
    if name == "tokens":
        reason = r"it trained biases of the base, or rows of tokens, which all rows share\. Give it a batch of its own"
    refused = rf"cannot take the adapter '{name}' next to others: {reason}"
    with pytest.raises(AdapterError, match=refused), adapters.rows(["all", name]):
        pass
    prompts = [PromptTokens([5, 6], [2]), PromptTokens([7], [2])]
    with pytest.raises(AdapterError, match=refused):
        adapters.answers(prompts, ["all", name], None, max_new_tokens=2)
    assert adapters.active is None
    plain = logits(adapters.model, input_ids)
    adapters.set_adapter(name)
    leading = torch.tensor(leading_ids(adapters.model), dtype=torch.int64).expand(2, -1)
    with_leading = torch.cat([leading, input_ids], dim=1)
    expected = logits(adapters.model, with_leading)
    adapters.set_adapter(None)
    assert (expected[:, leading.shape[1] :] - plain).abs().max() > 0.01 * plain.abs().max(), "the adapter must matter"
    with adapters.rows([name, name]):
        assert torch.equal(logits(adapters.model, with_leading), expected)


def test_an_adapter_that_trained_biases_cannot_share_a_batch(tiny_models: Models, tmp_path: Path) -> None:
    base = load(tiny_models("qwen2"))
    adapters = AdapterSet(base)
    adapters.load_adapter(store_adapter(tmp_path / "a", base, rank=2), "a")
    adapters.load_adapter(store_adapter(tmp_path / "b", base, rank=2, bias="lora_only"), "b")
    with pytest.raises(AdapterError, match=r"cannot take the adapter 'b' .* it trained biases of the base, or"):
        adapters.rows(["a", "b"]).__enter__()


def test_batches_of_other_rows_and_gradients_are_refused(sets: Callable[[str], AdapterSet]) -> None:
    adapters = sets("llama")
    with adapters.rows(["all", None, "few"]):
        for rows in (1, 2, 6):
            with pytest.raises(AdapterError, match=rf"was given {rows} rows?, and rows\(\) 3 names"):
                logits(adapters.model, ids(rows))
        embedded = adapters.model.get_input_embeddings()(ids(3)).detach().requires_grad_()
        with pytest.raises(AdapterError, match="has no gradients"):
            adapters.model(inputs_embeds=embedded)
    for names, message in (([], "no names"), ("all", "given the text 'all'")):
        with pytest.raises(AdapterError, match=message), adapters.rows(names):
            pass


def test_dropping_an_adapter_frees_what_rows_took_of_it(sets: Callable[[str], AdapterSet], tmp_path: Path) -> None:
    adapters = sets("llama")
    adapters.load_adapter(store_adapter(tmp_path / "more", adapters.base, 9, rank=2), "more")
    with adapters.rows(["more", "all"]):
        logits(adapters.model, ids(2))
    assert adapters._mixed is not None
    adapters.drop_adapter("more")
    assert adapters._mixed is None
