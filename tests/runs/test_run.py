"""Promises of a run: it goes on bit for bit from its first moment on, and writes samples and an adapter whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from tiny_runs import edit_config, final_adapter, no_load, quiet

from qlora_trainer.adapters.peft_format import read_adapter
from qlora_trainer.common.atomic import new_directory
from qlora_trainer.common.errors import CheckpointError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.directory import read_samples
from qlora_trainer.runs.report.summary import write_run_report
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.weights.nf4 import load_bitsandbytes

Config = Callable[..., RunConfig]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", slow_but(["paged_adamw_32bit", "paged_adamw_8bit"], "paged_adamw_32bit"))
def test_bf16_adapters_resume_bit_for_bit(tiny_config: Config, optimizer: str) -> None:
    settings = {"adapter": {"dtype": "bfloat16", "rank": 16}, "optimizer": {"name": optimizer, "learning_rate": 5e-3}}
    whole = start_run(tiny_config("whole", **settings))
    losses: list[float] = []
    assert whole.train(lambda record: losses.append(record["loss"]))
    assert losses[-1] < losses[0]
    parts = start_run(tiny_config("parts", **settings))
    assert not parts.train(quiet, stop_after=3)
    assert resume_run(parts.directory).train(quiet)
    expected, found = final_adapter(whole.directory), final_adapter(parts.directory)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
def test_a_mixed_run_resumes_bit_for_bit_and_only_in_the_same_mixture(tiny_config: Config, rows: Path) -> None:
    second = rows.with_name("second.jsonl")
    second.write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))
    sources: Any = [{"path": str(rows), "weight": 0.5}, {"path": str(second), "weight": 0.5}]
    mixed = {"train": sources, "eval": 0.0}
    run = start_run(tiny_config("straight", data=mixed))
    assert run.state.loader.epoch_rows == run.prepared.report.epoch_examples == 8
    run.train(quiet)
    start_run(tiny_config("stopped", data=mixed)).train(quiet, stop_after=5)
    directory = Path(tiny_config("stopped").training.output_dir)
    resume_run(directory).train(quiet)
    straight = final_adapter(Path(tiny_config("straight").training.output_dir))
    for name, tensor in final_adapter(directory).items():
        assert torch.equal(tensor, straight[name]), name
    edit_config(directory, "data", train=[{**sources[0], "weight": 0.9}, {**sources[1], "weight": 0.5}])
    with pytest.raises(CheckpointError, match="data of this run changed"):
        resume_run(directory)


@pytest.mark.slow
def test_a_run_that_died_in_its_first_step_resumes_as_if_it_had_not(tiny_config: Config) -> None:
    whole = start_run(tiny_config("whole", adapter={"dropout": 0.2}))
    whole.answer_samples("before")
    assert whole.train(quiet)
    dead = start_run(tiny_config("dead", adapter={"dropout": 0.2}))
    torch.manual_seed(12345)  # what a new process would hold
    resumed = resume_run(dead.directory)
    assert resumed.state.step == 0
    assert resumed.train(quiet)
    expected, found = final_adapter(whole.directory), final_adapter(dead.directory)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
def test_the_first_checkpoint_is_deleted_like_any_other(tiny_config: Config) -> None:
    run = start_run(tiny_config(checkpoint={"keep": 2}))
    assert [path.name for path in (run.directory / "checkpoints").iterdir()] == ["step-000000"]
    run.train(quiet)
    assert {path.name for path in (run.directory / "checkpoints").iterdir()} == {"step-000004", "step-000008"}


def write_half(final: Path) -> None:
    with new_directory(final, replaces=True) as work:
        (work / "adapter_config.json").write_text("half")
        raise ZeroDivisionError


def test_the_final_adapter_is_replaced_whole_or_not_at_all(finished: Path) -> None:
    final = finished / "adapter"
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    of_turns = {"generation_config.json", "chat_template.jinja"}
    assert before.keys() == {"adapter_config.json", "adapter_model.safetensors", "base.json"} | of_turns
    with pytest.raises(ZeroDivisionError):
        write_half(final)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    (final / "leftover").write_text("")
    assert resume_run(finished).train(quiet)
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    assert [path.name for path in finished.iterdir() if path.name.startswith(".")] == []
    assert read_adapter(final).paths


@pytest.mark.slow
@pytest.mark.parametrize("samples", slow_but([1, 3], 1))
def test_another_number_of_samples_on_resume_keeps_the_answers_that_match(tiny_config: Config, samples: int) -> None:
    run = start_run(tiny_config(training={"max_steps": 1}))
    run.answer_samples("before")
    before = [sample["before"] for sample in read_samples(run.directory)]
    resumed = resume_run(run.directory, [f"evaluation.samples={samples}"])
    resumed.train(quiet)
    resumed.answer_samples("after")
    kept = read_samples(run.directory)
    assert len(kept) == samples
    assert [sample["before"] for sample in kept] == [*before, None][:samples]
    assert all(sample["after"] is not None for sample in kept)
    assert write_run_report(resumed).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("packing", slow_but([True, False], True))
def test_a_sample_is_asked_by_no_more_tokens_than_a_row_of_training_has(
    tiny_config: Config, rows: Path, packing: bool
) -> None:
    """Also of rows that are cut: by whole turns, or at the end of a completion."""
    messages = [{"role": role, "content": "fox"} for role in ("user", "assistant") * 30]
    long: list[dict[str, Any]] = [{"messages": messages}, {"prompt": "fox " * 9, "completion": "dog " * 900}]
    for row in long:
        rows.write_text(4 * (json.dumps(row) + "\n"))
        data = {"eval": 0, "max_length": 64, "packing": packing}
        run = start_run(tiny_config("-".join(row), data=data, training={"global_batch_size": 2, "max_steps": 1}))
        asked: list[int] = []
        run.base.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, x, seen=asked: seen.append(x[0].shape[1])
        )
        run.answer_samples("before")
        assert 1 < max(asked) <= 64


def test_a_released_run_leaves_no_paged_buffer_of_its_own(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    manager = load_bitsandbytes().functional.GlobalPageManager.get_instance()
    others = torch.zeros(3)
    state = run.state.optimizer.optimizer.state[run.state.groups[0].data]
    manager.paged_tensors += [state["state1"], others, state["state2"]]  # as on CUDA; nothing is paged on a CPU
    try:
        run.release()
        assert len(manager.paged_tensors) == 1
        assert manager.paged_tensors[0] is others
    finally:
        manager.paged_tensors.clear()


def test_damaged_samples_end_a_resumption_before_the_base_is_loaded_and_may_be_deleted(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "load_base", no_load)
    samples = finished / "samples.json"
    of_another_kind = {"prompt": ["p"], "reference": "r", "before": None, "after": None}
    for content in ("{", '["text"]', '[{"prompt": "p", "reference": "r"}]', json.dumps([of_another_kind])):
        samples.write_text(content)
        with pytest.raises(CheckpointError, match=r"samples\.json.*Restore or delete it"):
            resume_run(finished)
    samples.unlink()
    with pytest.raises(AssertionError, match="the base was loaded"):
        resume_run(finished)
