"""The configs for 8 to 24 GB fit, name a model that needs no login, and have their plans in docs/benchmarks.md."""

from pathlib import Path

import pytest

from benchmarks.config_table import HEADER, MODELS, SIZES, table_row
from qlora_trainer.common.units import parse_bytes
from qlora_trainer.config.load import load_config
from qlora_trainer.planning.memory_plan import SLACK, plan_memory
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.training.state import with_policy
from qlora_trainer.weights.model_directory import ModelDirectory

ROOT = Path(__file__).parents[2]
FIGURES = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
LOGINS = ("meta-llama/", "google/gemma", "CohereLabs/")  # whose models the hub gives after a login


@pytest.mark.parametrize("size", SIZES)
def test_the_page_of_figures_has_a_row_for_each_config(size: int) -> None:
    config = load_config(ROOT / "configs" / f"{size}gb.yaml")
    assert HEADER in FIGURES
    (row,) = [line for line in FIGURES if line.startswith(f"| `{size}gb.yaml` |")]
    assert f"| {config.data.max_length:,} tokens | {config.adapter.rank} |" in row
    assert config.model.name in MODELS


def test_no_example_names_a_model_that_needs_a_login() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "configs").iterdir()]
    named = {page.name: [name for name in LOGINS if name in page.read_text(encoding="utf-8")] for page in pages}
    assert {page: names for page, names in named.items() if names} == {}


@pytest.mark.slow
def test_the_row_of_the_smallest_card_is_its_plan() -> None:
    """Planned whole, as it has the least to spare; in decimal gigabytes, of which a card has a little more."""
    assert table_row(8) in FIGURES


@pytest.mark.slow
@pytest.mark.parametrize("size", [12, 16, 24])
def test_the_larger_configs_fit_their_cards(size: int) -> None:
    """By two models of a few layers, along the line that live bytes are of like layers."""
    settings = load_config(ROOT / "configs" / f"{size}gb.yaml")
    directory = ModelDirectory.open(ROOT / "benchmarks" / "models" / MODELS[settings.model.name])
    fewer, more = (plan_memory(directory, with_policy(settings, Policy("full")), layers) for layers in (2, 3))
    without_slack = [plan.total - plan.components[SLACK] for plan in (fewer, more)]
    layers = len(directory.facts.layer_kinds)
    whole = without_slack[0] + (layers - 2) * (without_slack[1] - without_slack[0])
    assert whole + more.components[SLACK] <= parse_bytes(f"{size}GB")
    assert fewer.micro_batch_tokens == settings.data.max_length
