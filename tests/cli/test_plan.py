"""qlora plan says by what a micro-batch was chosen, or why it is one longest row."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import a_card_is_here

from qlora_trainer.cli.plan import describe
from qlora_trainer.model.load_plan import RECORD_NAME
from qlora_trainer.planning import fit as fitting
from qlora_trainer.planning.memory_plan import MemoryPlan, plan_memory
from qlora_trainer.planning.speed.candidates import Pace
from qlora_trainer.planning.speed.cards import card_named
from qlora_trainer.planning.speed.rates import rates_of_card
from qlora_trainer.planning.speed.rows import full_rows
from qlora_trainer.weights.model_directory import ModelDirectory

Qlora = Callable[..., tuple[int, str, str]]
FULL = ("--no-search", "training.activation_checkpointing=full")


def shown(out: str) -> str:
    """What is printed, without the table's lines."""
    return " ".join(out.replace("│", " ").split())


@pytest.fixture
def a_plan(tiny_config: Any, tiny_llama: Path) -> MemoryPlan:
    """A plan for a card, whose time was not estimated."""
    config = tiny_config(model={"device": "auto"}, training={"activation_checkpointing": "full"})
    return plan_memory(ModelDirectory.open(tiny_llama), config)


@pytest.fixture
def paces(monkeypatch: pytest.MonkeyPatch, a_plan: MemoryPlan) -> list[Pace | None]:
    """The device and rows that are planned for; every plan is the same one."""
    found: list[Pace | None] = []

    def planned(directory: ModelDirectory, config: Any, budget: Any, progress: Any, pace: Pace | None) -> MemoryPlan:
        found.append(pace)
        return a_plan

    monkeypatch.setattr(fitting, "fastest_plan", planned)
    return found


def test_without_a_card_or_memory_a_micro_batch_is_one_longest_row_and_that_is_said(
    qlora: Qlora, tiny_llama: Path, a_plan: MemoryPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, reported = qlora("plan", "--model", tiny_llama, "--max-length", 64, *FULL)
    assert code == 0, reported
    assert "one longest row, as no GPU is known: --gpu names one, such as 'RTX 4090'" in shown(out)
    own = dataclasses.replace(a_plan, micro_batch_tokens=2 * a_plan.max_length)
    assert "micro-batches" not in dict(describe(own, None)), "the user's own size is kept"


def test_a_card_of_unknown_properties_is_planned_for_with_a_word(
    qlora: Qlora, tiny_llama: Path, paces: list[Pace | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_card_is_here(monkeypatch, (8, 6), processors=0)
    code, out, reported = qlora("plan", "--model", tiny_llama, "--max-length", 64, "--gpu-memory", "8GB", *FULL)
    assert code == 0, reported
    assert "This GPU is not in the table of cards, and by what CUDA says of it" in shown(out)
    assert "multi_processor_count 0" in shown(out)
    (pace,) = paces
    assert pace is not None
    assert not pace.rates.is_known


def test_what_does_not_fit_a_known_card_is_not_said_to_have_none(a_plan: MemoryPlan) -> None:
    known = Pace(rates_of_card(card_named("4090")), full_rows(64, 1, packing=True))
    assert "micro-batches" not in dict(describe(a_plan, None, pace=known))
    assert "note" not in dict(describe(a_plan, None, pace=known))
    unknown = dataclasses.replace(known, rates=dataclasses.replace(known.rates, is_known=False, note="No figures."))
    assert dict(describe(a_plan, None, pace=unknown))["note"] == "No figures."


@pytest.mark.parametrize("by", ["config", "override", "config of another model"])
def test_rows_that_are_named_are_counted(
    qlora: Qlora, config_file: Path, rows: Path, tiny_llama: Path, paces: list[Pace | None], by: str
) -> None:
    by_name: dict[str, list[object]] = {
        "config": [config_file],
        "override": ["--model", tiny_llama, f"data.train={rows}", "data.eval=0"],
        "config of another model": [config_file, "--model", tiny_llama],
    }
    words = by_name[by]
    code, _, reported = qlora("plan", *words, "model.device=auto", "--gpu", "4090", *FULL)
    assert code == 0, reported
    (pace,) = paces
    assert pace is not None
    assert pace.steps.count == (2 if by == "override" else 8), "steps of 16 rows, and those that the config says"


def test_a_card_by_name_is_no_host(qlora: Qlora, tiny_llama: Path) -> None:
    code, _, reported = qlora("plan", "--model", tiny_llama, "--gpu", "4090", "model.device=cpu")
    assert code == 2
    assert "--gpu names a GPU, and model.device=cpu plans host memory" in reported


@pytest.mark.parametrize("by", ["rows", "no rows"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("adapter.trainable_tokens=[<no-such-token>]", "names '<no-such-token>', which is no token"),
        ("adapter.new_tokens=[<|im_end|>]", "names '<|im_end|>', which the tokenizer of"),
        ("adapter.init=pissa", "adapter.init=pissa begins on a 4-bit copy of the base that was made for it"),
    ],
)
def test_what_training_refuses_of_tokens_and_starts_is_refused_before_anything_is_planned(
    qlora: Qlora, config_file: Path, tiny_llama: Path, paces: list[Pace | None], setting: str, message: str, by: str
) -> None:
    source: list[object] = [config_file] if by == "rows" else ["--model", tiny_llama]
    code, _, refused = qlora("plan", *source, setting, *FULL)
    assert code == 2
    assert message in refused
    assert not paces
    if by == "rows":
        code, _, refused_by_train = qlora("train", config_file, setting)
        assert code == 2
        assert shown(refused) == shown(refused_by_train)


def test_a_plan_on_a_copy_without_its_start_is_refused(
    qlora: Qlora, tiny_llama: Path, tmp_path: Path, paces: list[Pace | None]
) -> None:
    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    (copy / RECORD_NAME).write_text(json.dumps({"start": {"init": "pissa", "rank": 4}}))
    code, _, refused = qlora("plan", "--model", copy, *FULL)
    assert code == 2
    assert "is what a start of pissa left of a base, and is whole only with it. Set adapter.init=pissa" in refused
    assert not paces
    code, _, reported = qlora("plan", "--model", copy, "adapter.init=pissa", "--gpu", "4090", *FULL)
    assert code == 0, reported


def test_tokens_of_a_model_without_a_tokenizer_are_planned(
    qlora: Qlora, tiny_llama: Path, tmp_path: Path, paces: list[Pace | None]
) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_llama / "config.json", tmp_path / "bare")
    tokens = "adapter.new_tokens=[<a>]"
    code, _, reported = qlora("plan", "--model", tmp_path / "bare", "--gpu", "4090", tokens, *FULL)
    assert code == 0, reported
    assert len(paces) == 1
