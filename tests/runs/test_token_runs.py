"""Promises of a run with new tokens: data, resume, evaluation, answers, files and the merged model all know them.

The laws that rows of tokens share with other adapters are in tests/adapters/kinds/test_laws.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import change_tensors, make_model_directory
from tiny_runs import edit_config, final_adapter, no_load, quiet
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer.adapters.inject import adapter_state_dict, add_adapters, load_adapter_state
from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.peft_format import read_adapter, write_adapter
from qlora_trainer.adapters.tokens.new_tokens import run_tokenizer, tokenizer_files_with
from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.common.errors import AdapterError, CheckpointError
from qlora_trainer.config.load import save_config
from qlora_trainer.config.schema import AdapterConfig, RunConfig
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.planning.memory_plan import plan_memory
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.training.generation import generate_answers
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
Models = Callable[[str], Path]
NEW = ["<gene>", "<protein>", "<cell>", "<virus>"]
ADAPTER = {"new_tokens": NEW, "trainable_tokens": ["<|im_start|>"]}
ROWS = "token_adapter.trainable_tokens_delta"


@pytest.fixture(scope="session")
def short_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Tiny models of fewer rows than the new tokens need: two of them have rows, two get new ones."""
    made: dict[str, Path] = {}

    def directory(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("short") / family
            made[family] = make_model_directory(path, family, vocab_size=401)
        return made[family]

    return directory


@pytest.fixture
def token_config(tiny_config: Config, tmp_path: Path) -> Config:
    """A config whose rows have the new tokens in them."""
    rows = tmp_path / "genes.jsonl"
    lines = []
    for index in range(20):
        asked = f"the {NEW[index % 4]} and {NEW[(index + 1) % 4]} jumps over {'a lazy dog ' * (index % 5)}"
        answer = f"{NEW[index % 4]} quick{NEW[(index + 2) % 4]}"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    rows.write_text("\n".join(lines) + "\n")

    def config(output: str = "run", **changes: Any) -> RunConfig:
        adapter = {**ADAPTER, **changes.pop("adapter", {})}
        data = {"train": str(rows), **changes.pop("data", {})}
        return tiny_config(output, adapter=adapter, data=data, **changes)

    return config


def ids_of(config: RunConfig) -> tuple[int, list[int]]:
    """(rows of the base's embedding, ids of the new tokens)."""
    directory = ModelDirectory.open(Path(config.model.name))
    tokenizer = run_tokenizer(directory, config.adapter)
    return directory.facts.vocabulary or 0, [tokenizer.convert_tokens_to_ids(token) for token in NEW]


@pytest.mark.slow
def test_rows_hold_new_tokens_and_a_cache_without_them_is_not_taken(token_config: Config) -> None:
    plain = start_run(token_config("plain", adapter={"new_tokens": [], "trainable_tokens": []}))
    run = start_run(token_config())
    _, new = ids_of(run.config)
    held = {token for index in range(len(run.prepared.train)) for token in run.prepared.train[index].input_ids}
    assert {*new} <= held
    assert run.prepared.train.lengths.sum() < plain.prepared.train.lengths.sum()
    trained = [run.prepared.train[index].labels for index in range(len(run.prepared.train))]
    assert {*new} <= {label for labels in trained for label in labels}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma3", "gpt2"])
def test_a_run_with_new_tokens_resumes_exactly_answers_with_them_and_merges(
    family: str, token_config: Config, short_models: Models, tmp_path: Path
) -> None:
    settings = {"model": {"name": str(short_models(family))}, "optimizer": {"learning_rate": 2e-2}}
    whole = start_run(token_config("whole", **settings))
    rows, new = ids_of(whole.config)
    assert new[0] < rows < new[-1], "some rows are there, and some are new"
    assert whole.train(quiet)
    parts = start_run(token_config("parts", **settings))
    assert not parts.train(quiet, stop_after=3)
    assert resume_run(parts.directory).train(quiet)
    expected, found = final_adapter(whole.directory), final_adapter(parts.directory)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert sum(ROWS in name for name in expected) == (2 if family == "llama" else 1)

    for place in (whole.directory / "adapter", whole.directory / "checkpoints" / "step-000008"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert [tokenizer.convert_tokens_to_ids(token) for token in NEW] == new

    trained = open_trained(whole.directory)
    assert evaluate_trained(trained, answers=1)["eval_loss"] > 0
    prompt = PromptTokens([5, new[0], 9], stop_token_ids=[2])
    assert len(generate_answers(trained.base.model, trained.renderer.tokenizer, [prompt], max_new_tokens=3)) == 1

    done = merge_run(whole.directory, tmp_path / "merged", base="dequantized")
    assert done.report.verification is not None
    assert done.report.verification.plain is not None
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == max(rows, new[-1] + 1)
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert [tokenizer.convert_tokens_to_ids(token) for token in NEW] == new
    name = next(name for name in expected if ROWS in name and "lm_head" not in name)
    ids = read_adapter(whole.directory / "adapter").config.token_ids
    table = merged.get_input_embeddings().weight
    assert torch.equal(table[list(ids)], expected[name].half().float())
    row = torch.tensor([[5, *new, 44, *ids, 9]])
    with torch.no_grad():
        ours, theirs = trained.base.model(input_ids=row).logits.float(), merged(row).logits
    assert ours.shape == theirs.shape
    assert float((ours - theirs).norm() / ours.norm()) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("family", "lm_head"), [("llama", "8bit"), ("llama_tied", "4bit")])
def test_rows_train_next_to_a_quantized_head_and_an_embedding_on_the_host(
    family: str, lm_head: str, token_config: Config, short_models: Models, tmp_path: Path
) -> None:
    name = str(short_models(family))
    settings = {"name": name, "lm_head": lm_head, "embeddings": "cpu"}
    run = start_run(token_config(model=settings, optimizer={"learning_rate": 2e-2}))
    began = adapter_state_dict(run.base.model)
    assert run.train(quiet)
    ended = adapter_state_dict(run.base.model)
    assert not any(torch.equal(ended[key], tensor) for key, tensor in began.items() if ROWS in key)
    assert plan_memory(ModelDirectory.open(Path(name)), run.config).adapter_parameters == sum(
        tensor.numel() for tensor in ended.values()
    )
    assert evaluate_trained(open_trained(run.directory))["eval_loss"] > 0
    merged = merge_run(run.directory, tmp_path / "merged", base="dequantized").report.verification
    assert merged is not None
    assert merged.plain is not None


@pytest.mark.slow
def test_a_tied_matrix_that_is_stored_twice_is_merged_twice(token_config: Config, tmp_path: Path) -> None:
    base = make_model_directory(tmp_path / "base", "llama_tied", vocab_size=401)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    change_tensors(base, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    run = start_run(token_config(model={"name": str(base)}, optimizer={"learning_rate": 2e-2}))
    assert run.train(quiet)
    merge_run(run.directory, tmp_path / "merged", base="dequantized")
    written = ModelDirectory.open(tmp_path / "merged").tensors
    assert written[embedding].shape[0] == 403
    assert torch.equal(written[embedding].read(), written[head].read())


@pytest.mark.slow
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_rows_of_tokens_merge_into_a_base_that_was_grown_by_no_token(
    base: Any, token_config: Config, tmp_path: Path
) -> None:
    """Rows that exist are replaced, and neither config.json nor the tokenizer changes."""
    run = start_run(token_config(adapter={"new_tokens": []}, optimizer={"learning_rate": 2e-2}))
    assert run.train(quiet)
    done = merge_run(run.directory, tmp_path / "merged", base=base)
    assert not [change for change in done.report.changes if "tokenizer" in change]
    source, written = (ModelDirectory.open(path) for path in (Path(run.config.model.name), tmp_path / "merged"))
    assert written.config_json["vocab_size"] == source.config_json["vocab_size"]
    (token,) = read_adapter(run.directory / "adapter").config.token_ids
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = source.tensors[name].read().float(), written.tensors[name].read().float()
        changed = (before.half().float() != after).any(dim=1).nonzero()[:, 0].tolist()
        assert changed == [token]


@pytest.mark.slow
def test_commands_know_new_tokens(
    token_config: Config, tmp_path: Path, qlora: Callable[..., tuple[int, str, str]]
) -> None:
    config = token_config(training={"max_steps": 1})
    save_config(config, tmp_path / "tokens.yaml")
    _, new = ids_of(config)
    code, row, _ = qlora("inspect", tmp_path / "tokens.yaml", "--row", 0, "--json")
    assert code == 0
    assert {*new} & {*json.loads(row)["row"]["input_ids"]}
    assert qlora("plan", tmp_path / "tokens.yaml")[0] == 0
    code, _, said = qlora("train", tmp_path / "tokens.yaml")
    assert code == 0
    assert "and the rows of 5 tokens" in said
    code, answer, _ = qlora("generate", config.training.output_dir, "--prompt", "the <gene> and <cell>")
    assert code == 0
    assert answer


@pytest.mark.slow
def test_the_plan_counts_rows_of_new_tokens_as_the_run_does(token_config: Config, tiny_llama: Path) -> None:
    config = token_config()
    plan, run = plan_memory(ModelDirectory.open(tiny_llama), config), start_run(config)
    trained = adapter_state_dict(run.base.model)
    assert plan.adapter_parameters == sum(tensor.numel() for tensor in trained.values())
    assert plan.components["adapters"] == sum(group.data.nbytes for group in run.state.groups)


@pytest.mark.parametrize("adapter", [{"new_tokens": ["Ġthe"]}, {"trainable_tokens": ["<gene>"]}])
def test_tokens_that_cannot_train_are_refused_before_the_base_is_loaded(
    token_config: Config, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any]
) -> None:
    monkeypatch.setattr(runs, "load_base", no_load)
    with pytest.raises(AdapterError, match=r"adapter\.(new|trainable)_tokens names"):
        start_run(token_config(adapter={"new_tokens": [], "trainable_tokens": [], **adapter}))


@pytest.mark.slow
def test_an_adapter_is_not_taken_for_other_tokens_than_its_own(token_config: Config) -> None:
    run = start_run(token_config(training={"max_steps": 1}))
    assert run.train(quiet)
    source = {"init_from": str(run.directory / "adapter")}
    with pytest.raises(AdapterError, match=r"The adapter has rows of the tokens .*, and the settings train"):
        start_run(token_config("other", adapter={"trainable_tokens": ["<|im_end|>"], **source}))
    assert start_run(token_config("same", adapter=source))
    edit_config(run.directory, "adapter", trainable_tokens=["<|im_end|>"])
    with pytest.raises(CheckpointError, match=r"adapter\.trainable_tokens: \['<\|im_start\|>'\]"):
        resume_run(run.directory)
    with pytest.raises(AdapterError, match=r"Set adapter\.trainable_tokens and adapter\.new_tokens"):
        open_trained(run.directory)


def moved(model: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, count: int) -> Tensor:
    return model(input_ids=ids).logits[..., :count]


@pytest.mark.parametrize(("family", "kind"), [("llama", "lora"), ("llama_tied", "dora"), ("gemma3", "lora")])
def test_peft_computes_the_same_with_the_tokenizer_that_is_next_to_the_adapter(
    family: str, kind: Any, short_models: Models, tmp_path: Path
) -> None:
    from peft import PeftModel

    directory = ModelDirectory.open(short_models(family))
    settings = AdapterConfig(kind=kind, rank=4, **ADAPTER)
    ours = AutoModelForCausalLM.from_pretrained(directory.path, dtype=torch.float32).eval()
    paths = add_adapters(ours, settings, tokenizer=run_tokenizer(directory, settings))
    moved(ours)
    tensors = adapter_state_dict(ours)
    named = {"base_model_name_or_path": str(directory.path), "revision": None}
    write_adapter(tmp_path, tensors, adapter_kind(settings).file_config(settings, ours, tensors, paths, named))
    for name, text in tokenizer_files_with(directory, NEW).items():
        (tmp_path / name).write_text(text)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(directory.path, dtype=torch.float32).eval()
    base.resize_token_embeddings(len(tokenizer))
    theirs = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.tensor([[*tokenizer("a <gene> and<virus><cell> the <protein> fox <|im_start|>")["input_ids"]]])
    expected = logits_of(ours, ids, len(tokenizer))
    found = logits_of(theirs, ids, len(tokenizer))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_we_compute_the_same_by_pefts_file_with_new_tokens(family: str, short_models: Models, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    directory = ModelDirectory.open(short_models(family))
    settings = AdapterConfig(rank=4, alpha=8.0, target_modules="mlp", new_tokens=NEW)
    tokenizer = run_tokenizer(directory, settings)
    new = [tokenizer.convert_tokens_to_ids(token) for token in reversed(NEW)]
    base = AutoModelForCausalLM.from_pretrained(directory.path, dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["gate_proj", "up_proj", "down_proj"],
        trainable_token_indices=new if family == "llama_tied" else {"embed_tokens": new, "lm_head": new},
    )
    theirs = get_peft_model(base, config).eval()
    moved(theirs)
    theirs.save_pretrained(tmp_path / "whole")
    with pytest.raises(AdapterError, match="save_embedding_layers=False"):
        read_adapter(tmp_path / "whole")
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    stored = read_adapter(tmp_path)
    assert stored.differences(settings) == {}
    assert stored.config.token_ids == tuple(sorted(new))
    ours = AutoModelForCausalLM.from_pretrained(directory.path, dtype=torch.float32).eval()
    add_adapters(ours, settings, tokenizer=tokenizer)
    load_adapter_state(ours, stored.tensors)
    assert dict(trainable_parameters(ours)).keys() == stored.tensors.keys()
    ids = torch.tensor([[5, *new, 44, 9]])
    expected = logits_of(theirs, ids, len(tokenizer))
    found = logits_of(ours, ids, len(tokenizer))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
