"""Promises of a run that trains virtual tokens: rows and prompts begin with them, and it says that it does not merge.

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
from tiny_runs import edit_config, final_adapter, no_load, quiet

from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.adapters.trainable import leading_ids
from qlora_trainer.common.errors import AdapterError, CheckpointError, DataError, MergeError
from qlora_trainer.config.load import load_config, save_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.types import Example, PromptTokens
from qlora_trainer.merging import merge_run as merging
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained
from qlora_trainer.training.determinism import repeats_side_by_side
from qlora_trainer.training.generation import generate_answers, stream_answer

Config = Callable[..., RunConfig]
P = 5


def prompt_config(tiny_config: Config, output: str = "run", virtual_tokens: int = P, **changes: Any) -> RunConfig:
    adapter = {"kind": "prompt", "virtual_tokens": virtual_tokens}
    return tiny_config(output, **{"training": {"max_steps": 2}, "adapter": adapter, **changes})


@pytest.fixture
def prompted(tiny_config: Config) -> Path:
    """A finished run with virtual tokens, on values that matter to answers."""
    run = start_run(prompt_config(tiny_config, "prompted", optimizer={"learning_rate": 1.0}))
    assert run.train(quiet)
    return run.directory


def test_rows_begin_with_virtual_tokens_and_learn_what_they_learn_without(tiny_config: Config) -> None:
    data = {"max_length": 512}
    plain = start_run(tiny_config("plain", data=data))
    run = start_run(prompt_config(tiny_config, data=data))
    first = run.base.model.config.vocab_size
    assert leading_ids(run.base.model) == list(range(first, first + P))
    for ours, theirs in ((run.prepared.train, plain.prepared.train), (run.prepared.eval, plain.prepared.eval)):
        assert len(ours) == len(theirs) > 0
        assert ours.lengths.tolist() == [len(ours[i].input_ids) for i in range(len(ours))]
        assert ours.trained_counts.tolist() == [ours[i].trained_tokens for i in range(len(ours))]
        for index in range(len(ours)):
            assert ours[index].input_ids == [*range(first, first + P), *theirs[index].input_ids]
            assert ours[index].labels == [-100] * P + theirs[index].labels
    assert run.prepared.report.train.trained_tokens == plain.prepared.report.train.trained_tokens


def test_a_row_whose_first_token_has_a_label_learns_no_more_after_virtual_tokens() -> None:
    row = Example([7, 8, 9], [7, 8, 9])
    assert row.after([]) is row
    assert row.after([20, 21]) == Example([20, 21, 7, 8, 9], [-100, -100, -100, 8, 9])
    assert row.after([20, 21]).trained_tokens == row.trained_tokens == 2


def test_virtual_tokens_count_in_max_length(tiny_config: Config, rows: Path) -> None:
    rows.write_text(4 * (json.dumps({"prompt": "the", "completion": "fox " * 40}) + "\n"))
    data = {"max_length": 32, "eval": 0}
    run = start_run(prompt_config(tiny_config, data=data))
    assert set(run.prepared.train.lengths.tolist()) == {32}
    assert len(run.prepared.train[0].input_ids) == 32
    with pytest.raises(DataError, match=r"tokens, with 5 virtual ones, more than 32\. Raise data\.max_length"):
        start_run(prompt_config(tiny_config, "long", data={**data, "too_long": "error"}))


def test_virtual_tokens_that_fill_the_models_positions_are_refused(tiny_config: Config) -> None:
    config = prompt_config(tiny_config, virtual_tokens=512, data={"max_length": 1024})
    with pytest.raises(DataError, match="Rows may have 512 tokens, and 512 virtual tokens are before each"):
        start_run(config)


def test_virtual_tokens_have_no_weight_decay_and_are_trained_by_one_thread(tiny_config: Config) -> None:
    run = start_run(prompt_config(tiny_config, optimizer={"weight_decay": 0.1}, training={"cpu_workers": 2}))
    assert [(group.name, group.weight_decay) for group in run.state.groups] == [("bias", 0.0)]
    assert run.state.workers == 1
    assert not repeats_side_by_side(run.base.model)


def test_what_a_step_takes_begins_with_virtual_tokens_as_does_each_prompt(prompted: Path) -> None:
    trained = open_trained(prompted)
    model, seen = trained.base.model, []
    leading = leading_ids(model)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].tolist()))
    evaluate_trained(trained, answers=2)
    prompts = [batch for batch in seen if len(batch[0]) > 1 and leading[0] in batch[0]]
    assert len(prompts) >= 2, "the packs of the eval loss, and the prompts of the answers"
    for batch in prompts:
        for row in batch:
            where = row.index(leading[0])
            assert row[where : where + P] == leading
            assert row.count(leading[0]) == 1 or len(batch) == 1, "several rows of a pack, or one row"


def test_answers_are_those_of_the_forward_with_virtual_tokens_in_any_batch(prompted: Path) -> None:
    trained = open_trained(prompted)
    model: Any = trained.base.model
    tokenizer: Any = trained.renderer.tokenizer
    prompts = [PromptTokens(ids, [tokenizer.eos_token_id]) for ids in ([5, 6, 7, 8, 9], [20, 21], [30, 31, 32])]
    expected = []
    for prompt in prompts:
        ids = [*leading_ids(model), *prompt.input_ids]
        begin = len(ids)
        with torch.no_grad():
            while len(ids) < begin + 6 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(tokenizer.decode(ids[begin:], skip_special_tokens=True))
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=6) == expected
    assert ["".join(stream_answer(model, tokenizer, one, max_new_tokens=6)) for one in prompts] == expected


def test_a_merge_is_refused_before_anything_is_loaded_and_names_the_adapter_to_deploy(
    prompted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "read_trained", no_load)
    monkeypatch.setattr(merging, "resolve_model", no_load)
    with pytest.raises(MergeError, match=r"does not merge: 5 virtual tokens before each row") as refused:
        merging.merge_run(prompted, tmp_path / "merged")
    named = Path(str(refused.value).rpartition(": ")[2])
    assert named == prompted / "adapter"
    assert read_adapter(named).config.kind == "prompt"


def test_commands_say_that_it_does_not_merge_and_show_virtual_tokens(
    tiny_config: Config, config_file: Path, tmp_path: Path, qlora: Callable[..., tuple[int, str, str]]
) -> None:
    save_config(prompt_config(tiny_config), tmp_path / "prompt.yaml")
    code, printed, said = qlora("train", tmp_path / "prompt.yaml")
    assert code == 0
    said = re.sub(r"[│\s]+", " ", said)  # a value of a table goes over several lines
    assert "5 virtual tokens before each row, 320 numbers in float32" in said
    assert "merges no: it is deployed as a PEFT adapter" in said
    assert "Merges:  no: it is deployed as a PEFT adapter" in printed
    assert "qlora merge" not in printed + said
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "5 virtual tokens before each row" in report
    code, printed, _ = qlora("plan", tmp_path / "prompt.yaml")
    assert (code, "no: it is deployed as a PEFT adapter" in printed) == (0, True)
    code, printed, _ = qlora("plan", config_file)
    assert (code, "merges" in printed, "PEFT adapter" in printed) == (0, True, False)
    code, _, said = qlora("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 2
    assert f"Deploy it as a PEFT adapter, next to its base: {tmp_path / 'run' / 'adapter'}" in said
    code, printed, _ = qlora("inspect", tmp_path / "prompt.yaml", "--row", 0)
    assert (code, "(5 of them virtual)" in printed) == (0, True)
    code, printed, _ = qlora("inspect", tmp_path / "prompt.yaml", "--row", 0, "--json")
    row = json.loads(printed)["row"]
    assert row["virtual_tokens"] == P
    assert row["tokens"] == len(row["input_ids"]) == len(row["trained"])
    for command in (["evaluate"], ["generate", "--prompt", "the fox"]):
        assert qlora(command[0], tmp_path / "run", *command[1:])[0] == 0


@pytest.mark.parametrize("rank", [8, 16])
def test_a_rank_on_the_command_line_is_refused(
    tiny_config: Config, tmp_path: Path, qlora: Callable[..., tuple[int, str, str]], rank: int
) -> None:
    save_config(prompt_config(tiny_config), tmp_path / "prompt.yaml")
    code, _, said = qlora("train", tmp_path / "prompt.yaml", "--rank", rank)
    assert code == 2
    assert "rank has no effect with adapter.kind=prompt; leave it out" in said
    assert "alpha" not in said


def test_a_run_is_not_resumed_as_another_kind(prompted: Path) -> None:
    edit_config(prompted, "adapter", kind="lora")
    edit_config(prompted, "adapter", virtual_tokens=20)
    with pytest.raises(CheckpointError, match=r"adapter\.kind: prompt → lora"):
        resume_run(prompted)
    edit_config(prompted, "adapter", kind="prompt", virtual_tokens=6)
    with pytest.raises(CheckpointError, match=r"adapter\.virtual_tokens: 5 → 6"):
        resume_run(prompted)


def test_a_run_starts_from_a_prompt_by_the_settings_that_it_is_refused_with(
    prompted: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(prompted / "adapter")
    save_config(tiny_config("second", adapter={"init_from": source, "rank": 16, "alpha": 32}), tmp_path / "second.yaml")
    with monkeypatch.context() as patched:
        patched.setattr(runs, "load_base", no_load)
        with pytest.raises(AdapterError) as refused:
            start_run(load_config(tmp_path / "second.yaml"))
    typed = shlex.split(str(refused.value).partition("To start from it, set ")[2].removesuffix("."))
    assert typed == ["adapter.kind=prompt", "adapter.virtual_tokens=5"]
    run = start_run(load_config(tmp_path / "second.yaml", typed))
    began = read_adapter(run.directory / "checkpoints" / "step-000000").tensors
    assert torch.equal(began["prompt_embeddings"], final_adapter(prompted)["prompt_embeddings"])


def test_a_prompt_is_no_start_of_another_kind_and_a_text_begins_a_run(
    finished: Path, tiny_config: Config, tmp_path: Path
) -> None:
    config = prompt_config(tiny_config, "second")
    with pytest.raises(AdapterError, match=r"To start from it, set 'adapter\.kind=lora' 'adapter\.rank=4'\."):
        start_run(config.replace({"adapter.init_from": str(finished / "adapter")}))
    run = start_run(config.replace({"adapter.prompt_init_text": "the quick brown fox"}))
    stored = json.loads((run.directory / "checkpoints/step-000000/adapter_config.json").read_text())
    assert stored["prompt_tuning_init"] == "TEXT"
    assert stored["prompt_tuning_init_text"] == "the quick brown fox"
    assert stored["tokenizer_name_or_path"] == config.model.name
    assert run.train(quiet)
    assert open_trained(run.directory).adapter.config.kind == "prompt"
