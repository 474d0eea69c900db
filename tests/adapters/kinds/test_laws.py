"""The laws of training hold for every kind of adapter: a kind joins them by an entry in kind_cases.py."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kind_cases import CASES, KindCase
from packed_losses import examples, loss_and_gradient
from tiny_models import load
from tiny_runs import final_adapter, quiet
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.peft_format import read_adapter, write_adapter
from qlora_trainer.adapters.trainable import leading_ids, trainable_parameters
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.forward import examine_forward
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.training.evaluation import eval_loss, eval_prompts
from qlora_trainer.training.generation import generate_answers
from qlora_trainer.training.memory.activations import LEVELS, Policy, apply_policy
from qlora_trainer.training.patches import patch_model
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
Models = Callable[[str], Path]
FAMILIES = ["llama", "gpt2"]  # rotary positions, and trained ones

each_kind = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
OF_PEFT = {name: case for name, case in CASES.items() if case.peft_config}
each_kind_of_peft = pytest.mark.parametrize("case", OF_PEFT.values(), ids=OF_PEFT)
# Whole runs of one kind that adapts layers and of one that is put before rows are quick; LoRA's are in tests/training.
_QUICK = ("dora", "prefix")
_RUNS = [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name not in _QUICK)) for name, case in CASES.items()]
each_kinds_run = pytest.mark.parametrize("case", _RUNS)
each_family = pytest.mark.parametrize("family", FAMILIES)


def away_from_its_start(model: Any) -> None:
    """Give what trains values at which every part of an adapter has a gradient."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@each_family
@each_kind
def test_the_gradient_is_the_same_packed_padded_and_alone(case: KindCase, family: str, tiny_models: Models) -> None:
    model = load(tiny_models(family)).model
    add_adapters(model, case.config, tokenizer=case.tokenizer)
    away_from_its_start(model)
    leading = leading_ids(model)
    rows = [row.after(leading) for row in examples(model.config.vocab_size)]
    packed, expected = loss_and_gradient(model, rows, packing=True, limit=10_000)
    assert expected.norm() > 0
    for packing, limit in ((False, 10_000), (True, 1), (True, 40)):
        loss, gradient = loss_and_gradient(model, rows, packing, limit)
        assert loss == pytest.approx(packed, rel=1e-5)
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


@each_family
@each_kinds_run
def test_the_gradient_is_the_same_whatever_backward_keeps(case: KindCase, family: str, tiny_models: Models) -> None:
    model = load(tiny_models(family)).model
    add_adapters(model, case.config, tokenizer=case.tokenizer)
    away_from_its_start(model)
    patch_model(model)
    model.train()
    rows = [row.after(leading_ids(model)) for row in examples(model.config.vocab_size)]
    found = {}
    for level in LEVELS:
        apply_policy(model, Policy(level))
        found[level] = loss_and_gradient(model, rows, packing=False, limit=60)
    loss, gradient = found["none"]
    assert gradient.norm() > 0
    for level in LEVELS[1:]:
        assert found[level][0] == pytest.approx(loss, rel=1e-6)
        assert (found[level][1] - gradient).norm() < 1e-6 * gradient.norm()


@each_kinds_run
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(case: KindCase, tiny_config: Config) -> None:
    whole = start_run(tiny_config("whole", adapter=case.settings))
    began = adapter_state_dict(whole.base.model)
    assert whole.train(quiet)
    parts = start_run(tiny_config("parts", adapter=case.settings))
    assert not parts.train(quiet, stop_after=3)
    assert resume_run(parts.directory).train(quiet)
    expected, found = final_adapter(whole.directory), final_adapter(parts.directory)
    assert expected.keys() == found.keys() == began.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not any(torch.equal(tensor, expected[name]) for name, tensor in began.items()), "all of it trains"


@each_kinds_run
def test_the_base_does_not_change_in_training(case: KindCase, tiny_config: Config) -> None:
    run = start_run(tiny_config(adapter=case.settings))
    model = run.base.model
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    assert run.train(quiet)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in before.items())
    assert {id(p) for _, p in trainable_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}


@each_family
@each_kinds_run
def test_the_plan_counts_what_a_run_trains(
    case: KindCase, family: str, tiny_config: Config, tiny_models: Models
) -> None:
    directory = tiny_models(family)
    config = tiny_config(adapter=case.settings, model={"name": str(directory)})
    plan = plan_memory(ModelDirectory.open(directory), config)
    run = start_run(config)
    trained = adapter_state_dict(run.base.model)
    assert plan.adapter_parameters == sum(tensor.numel() for tensor in trained.values())
    assert plan.components["adapters"] == sum(group.data.nbytes for group in run.state.groups)
    assert plan.base_parameters == sum(info.numel for info in run.base.directory.tensors.values())


@pytest.mark.slow
@each_kind
def test_an_opened_run_evaluates_and_answers_as_its_model_in_memory(case: KindCase, tiny_config: Config) -> None:
    run = start_run(tiny_config(adapter=case.settings, training={"max_steps": 2}))
    away_from_its_start(run.base.model)
    assert run.train(quiet)
    opened = open_trained(run.directory)
    fresh = load(run.base.directory.path).model
    add_adapters(fresh, case.config, tokenizer=opened.renderer.tokenizer)

    def measured(model: Any) -> tuple[float, list[str]]:
        """The eval loss, and the answers to four prompts of the eval rows."""
        loss = eval_loss(model, run.prepared.eval, examine_forward(model), 128)
        prompts = [one.tokens for one in eval_prompts(opened.renderer, run.prepared.eval)]
        return loss, generate_answers(model, opened.renderer.tokenizer, prompts, max_new_tokens=8)

    loss, answers = measured(run.base.model)
    found, given = measured(opened.base.model)
    assert found == pytest.approx(loss, rel=1e-6)
    assert given == answers
    without, others = measured(fresh.eval())
    assert abs(without - loss) > 1e-3 * loss, "the adapter must matter"
    assert others != answers
    assert evaluate_trained(opened)["eval_loss"] == pytest.approx(loss, rel=1e-6)


def plain_model(family: str) -> Any:
    """A tiny dense model in fp32, as any user of transformers has it."""
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=32)).eval()
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(24).reshape(2, 12)


@torch.no_grad()
def our_logits(model: Any) -> Tensor:
    """Logits of two rows, after the tokens that each row begins with."""
    leading = torch.tensor(leading_ids(model), dtype=torch.int64).expand(len(IDS), -1)
    return model(input_ids=torch.cat([leading, IDS], dim=1)).logits


@torch.no_grad()
def peft_logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def write(model: Any, case: KindCase, paths: list[str], directory: Path) -> None:
    tensors = adapter_state_dict(model)
    named = {"base_model_name_or_path": "tiny", "revision": None}
    config = adapter_kind(case.config).file_config(case.config, model, tensors, paths, named)
    write_adapter(directory, tensors, config)


@each_family
@each_kind_of_peft
def test_peft_computes_the_same_by_our_files(case: KindCase, family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = plain_model(family)
    base = copy.deepcopy(model)
    paths = add_adapters(model, case.config, tokenizer=case.tokenizer)
    away_from_its_start(model)
    write(model, case, paths, tmp_path)
    expected = our_logits(model)
    scale = expected.abs().max().item()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(peft_logits(loaded), expected, rtol=0, atol=1e-5 * scale)
    with loaded.disable_adapter():
        rows = expected[:, -IDS.shape[1] :]
        assert (peft_logits(loaded) - rows).abs().max() > 0.01 * scale, "the adapter must matter"


@each_family
@each_kind_of_peft
def test_we_compute_the_same_by_pefts_files(case: KindCase, family: str, tmp_path: Path) -> None:
    from peft import get_peft_model

    assert case.peft_config is not None
    theirs = get_peft_model(plain_model(family), case.peft_config(family)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    stored = read_adapter(tmp_path)
    assert stored.differences(case.config) == {}
    model = plain_model(family)
    add_adapters(model, case.config, seed=3, tokenizer=case.tokenizer)
    load_adapter_state(model, stored.tensors)
    expected = peft_logits(theirs)
    torch.testing.assert_close(our_logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
