"""Promises of a run that trains a prefix: positions, answers, exact resume through an MLP, and what is refused.

The laws that it shares with other kinds are in tests/adapters/kinds/test_laws.py.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from safetensors.torch import load_file
from tiny_runs import edit_config, final_adapter, no_load, quiet
from torch import Tensor

from qlora_kernels.card import Card
from qlora_trainer.adapters.inject import adapter_state_dict
from qlora_trainer.adapters.prefix import FILE_TENSOR
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.errors import AdapterError, CheckpointError, ConfigError, MergeError
from qlora_trainer.config.load import load_config, save_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.merging import merge_run as merging
from qlora_trainer.planning.empty_run import ASSUMED_CARD, empty_run
from qlora_trainer.planning.memory_plan import longest_row, plan_memory
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.training.generation import generate_answers, stream_answer
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
P = 5
PROJECTED = {"kind": "prefix", "virtual_tokens": P, "prefix_projection": True, "prefix_hidden_size": 8}


def prefix_config(tiny_config: Config, output: str = "run", adapter: Any = None, **changes: Any) -> RunConfig:
    adapter = {"kind": "prefix", "virtual_tokens": P, **(adapter or {})}
    return tiny_config(output, **{"training": {"max_steps": 2}, "adapter": adapter, **changes})


def trained_values(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable_parameters(model)}


@pytest.fixture
def prefixed(tiny_config: Config) -> Path:
    """A finished run with a prefix, on values that matter to answers."""
    run = start_run(prefix_config(tiny_config, "prefixed", optimizer={"learning_rate": 0.3}))
    assert run.train(quiet)
    return run.directory


@pytest.mark.slow
def test_a_prefix_takes_positions_of_the_model_and_no_tokens_of_rows(
    tiny_config: Config, tiny_models: Callable[[str], Path], rows: Path
) -> None:
    rows.write_text(4 * (json.dumps({"prompt": "the", "completion": "fox " * 600}) + "\n"))
    data = {"max_length": 1024, "eval": 0}
    directory = ModelDirectory.open(tiny_models("llama"))
    assert directory.facts.positions == 512
    config = prefix_config(tiny_config, data=data)
    run = start_run(config)
    assert set(run.prepared.train.lengths.tolist()) == {512 - P} == {longest_row(directory, config)}
    config = prefix_config(tiny_config, "short", data={**data, "max_length": 32})
    assert longest_row(directory, config) == 32
    with pytest.raises(ConfigError, match="virtual_tokens is 512, and the model has 512 positions"):
        start_run(prefix_config(tiny_config, "none", adapter={"virtual_tokens": 512}, data=data))


@pytest.mark.parametrize("family", slow_but(["llama", "mistral"], "mistral"))
def test_answers_are_those_of_the_forward_with_the_prefix_in_any_batch(
    tiny_config: Config, tiny_models: Callable[[str], Path], family: str
) -> None:
    """With mistral's window of 6, padding on the left would move the prefix out of a shorter prompt's sight."""
    run = start_run(prefix_config(tiny_config, model={"name": str(tiny_models(family))}))
    model: Any = run.base.model
    tokenizer: Any = run.renderer.tokenizer
    ids_of = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21], [30, 31], [40, 41, 42]]
    prompts = [PromptTokens(ids, [tokenizer.eos_token_id]) for ids in ids_of]
    expected = []
    model.eval()
    for prompt in prompts:
        ids = list(prompt.input_ids)
        begin = len(ids)
        with torch.no_grad():
            while len(ids) < begin + 6 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[begin:], skip_special_tokens=True))
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=6) == expected
    assert ["".join(stream_answer(model, tokenizer, one, max_new_tokens=6)) for one in prompts] == expected


def test_a_run_through_an_mlp_resumes_bit_for_bit_and_ships_the_prefix(tiny_config: Config) -> None:
    changes = {"adapter": PROJECTED, "training": {"max_steps": 6, "save_every": 3}}
    whole = start_run(tiny_config("whole", **changes))
    began = trained_values(whole.base.model)
    assert whole.train(quiet)
    parts = start_run(tiny_config("parts", **changes))
    assert not parts.train(quiet, stop_after=3)
    resumed = resume_run(parts.directory)
    assert resumed.train(quiet)
    expected, found = trained_values(whole.base.model), trained_values(resumed.base.model)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not any(torch.equal(tensor, began[name]) for name, tensor in expected.items()), "all of it trains"
    shipped = final_adapter(parts.directory)
    assert [*shipped] == [FILE_TENSOR]
    assert torch.equal(shipped[FILE_TENSOR], adapter_state_dict(whole.base.model)[FILE_TENSOR])
    written = json.loads((parts.directory / "adapter" / "adapter_config.json").read_text())
    assert written["prefix_projection"] is False
    state = load_file(parts.directory / "checkpoints/step-000003/trainer_state.safetensors")
    assert {name for name in state if name.startswith("adapter.")} == {f"adapter.{name}" for name in began}
    trained = open_trained(parts.directory)
    assert torch.equal(adapter_state_dict(trained.base.model)[FILE_TENSOR], shipped[FILE_TENSOR])
    assert evaluate_trained(trained, answers=1)["eval_loss"] > 0


@pytest.mark.slow
def test_the_plan_counts_the_mlp(tiny_config: Config, tiny_llama: Path) -> None:
    config = tiny_config(adapter=PROJECTED)
    plan = plan_memory(ModelDirectory.open(tiny_llama), config)
    keys = 2 * 2 * 2 * 16  # layers x keys and values x heads x numbers
    assert plan.adapter_parameters == P * 32 + (32 * 8 + 8) + (8 * keys + keys)
    run = start_run(config)
    assert plan.components["adapters"] == sum(group.data.nbytes for group in run.state.groups)
    assert {group.name: group.weight_decay for group in run.state.groups}.keys() == {"matrix", "bias"}
    decaying = next(group for group in run.state.groups if group.name == "matrix")
    assert all(name.endswith(".weight") for name in decaying.parameters)


@pytest.mark.parametrize("card", slow_but([None, ASSUMED_CARD], None), ids=["CPU", "card"])
def test_a_plan_has_as_many_documents_as_a_step_has_rows_since_each_has_a_prefix(
    tiny_config: Config, tiny_llama: Path, card: Card | None
) -> None:
    config = prefix_config(tiny_config, training={"global_batch_size": 6, "max_steps": 1})
    dtype = torch.bfloat16 if card else torch.float32
    _, pack, _ = empty_run(ModelDirectory.open(tiny_llama), config, dtype, Policy("none"), card=card)
    assert pack.cu_seqlens is not None
    assert len(pack.cu_seqlens) - 1 == 6


def test_a_prefix_has_no_weight_decay_and_is_trained_by_one_thread(tiny_config: Config) -> None:
    run = start_run(prefix_config(tiny_config, optimizer={"weight_decay": 0.1}, training={"cpu_workers": 2}))
    assert [(group.name, group.weight_decay) for group in run.state.groups] == [("bias", 0.0)]
    assert run.state.workers == 1


def test_a_merge_is_refused_before_anything_is_loaded_and_names_the_adapter_to_deploy(
    prefixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "read_trained", no_load)
    monkeypatch.setattr(merging, "resolve_model", no_load)
    with pytest.raises(MergeError, match=r"does not merge: 5 keys and values before each row") as refused:
        merging.merge_run(prefixed, tmp_path / "merged")
    assert Path(str(refused.value).rpartition(": ")[2]) == prefixed / "adapter"


@pytest.mark.slow
def test_commands_train_evaluate_and_answer_with_a_prefix(
    tiny_config: Config, tmp_path: Path, qlora: Callable[..., tuple[int, str, str]]
) -> None:
    save_config(prefix_config(tiny_config), tmp_path / "prefix.yaml")
    code, _, said = qlora("train", tmp_path / "prefix.yaml")
    assert code == 0
    said = re.sub(r"[│\s]+", " ", said)
    assert "5 keys and values before each row, 640 numbers in float32" in said
    assert "merges no: it is deployed as a PEFT adapter" in said
    for of_config in (["plan"], ["inspect", "--row", 0]):
        assert qlora(of_config[0], tmp_path / "prefix.yaml", *of_config[1:])[0] == 0
    for of_run in (["evaluate"], ["generate", "--prompt", "the fox"]):
        assert qlora(of_run[0], tmp_path / "run", *of_run[1:])[0] == 0


def test_a_run_starts_from_a_prefix_by_the_settings_that_it_is_refused_with(
    prefixed: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(prefixed / "adapter")
    save_config(tiny_config("second", adapter={"init_from": source, "rank": 16, "alpha": 32}), tmp_path / "second.yaml")
    with monkeypatch.context() as patched:
        patched.setattr(runs, "load_base", no_load)
        with pytest.raises(AdapterError) as refused:
            start_run(load_config(tmp_path / "second.yaml"))
    typed = shlex.split(str(refused.value).partition("To start from it, set ")[2].removesuffix("."))
    assert typed == ["adapter.kind=prefix", "adapter.virtual_tokens=5"]
    run = start_run(load_config(tmp_path / "second.yaml", typed))
    assert torch.equal(adapter_state_dict(run.base.model)[FILE_TENSOR], final_adapter(prefixed)[FILE_TENSOR])
    edit_config(prefixed, "adapter", virtual_tokens=6)
    with pytest.raises(CheckpointError, match=r"adapter\.virtual_tokens: 5 → 6"):
        resume_run(prefixed)
