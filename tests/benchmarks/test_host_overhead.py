"""What a processor does for each layer stays little: fewer operations and calls than what users would write instead."""

from pathlib import Path

import pytest

from benchmarks.host_overhead import Counts, count_forward, count_ours, count_peer, tiny_directory
from qlora_trainer.planning.speed.rates import LAYER_OPERATIONS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counts]:
    directory = tiny_directory(tmp_path_factory.mktemp("models"), layers=2)
    return {
        "kept": count_ours(directory, 2, "none").less(count_ours(directory, 1, "none"), 1),
        "ours": count_ours(directory, 2, "full").less(count_ours(directory, 1, "full"), 1),
        "peft": count_peer(directory, 2, is_plain=False).less(count_peer(directory, 1, is_plain=False), 1),
        "dense": count_peer(directory, 2, is_plain=True).less(count_peer(directory, 1, is_plain=True), 1),
    }


def test_a_recomputed_layer_sends_little_more_than_a_third_of_the_operations_of_peft_and_two_thirds_of_a_dense_one(
    layer: dict[str, Counts],
) -> None:
    ours, peft, dense = (layer[name].operations.total() for name in ("ours", "peft", "dense"))
    assert 0 < ours <= 0.37 * peft
    assert ours <= 2 / 3 * dense


def test_a_recomputed_layer_makes_less_than_half_the_calls_of_peft(layer: dict[str, Counts]) -> None:
    ours, peft = layer["ours"].calls.total(), layer["peft"].calls.total()
    assert 0 < ours <= 0.45 * peft


def test_a_layers_graph_has_less_than_half_the_nodes_that_it_had_and_a_quarter_of_a_dense_ones(
    layer: dict[str, Counts],
) -> None:
    """It had 39 at commit 1173730 (decision 0046)."""
    ours, dense = layer["ours"].nodes.total(), layer["dense"].nodes.total()
    assert 0 < ours <= 39 // 2
    assert ours <= dense / 4
    # A node for q, k and v, for gate and up, and for o: what is counted is the graph of the step.
    assert layer["ours"].nodes["_NF4LinearsBackward"] == 3
    assert layer["ours"].nodes["_GatedNF4LinearBackward"] == 1
    assert layer["ours"].nodes["_FlashAttentionBackward"] == 1


def test_the_counts_of_the_documentation_and_of_the_formula_of_time_are_those_counted(
    layer: dict[str, Counts],
) -> None:
    """Calls differ by a few from one version of Python to another."""
    path = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    table = path.read_text("utf-8").partition("## Work of the processor")[2].partition("\n## ")[0]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:5]] for cells in map(_cells, table.splitlines())}
    for name, counts in (("`none`", layer["kept"]), ("`full`", layer["ours"])):
        operations, calls, nodes = (int(cell.replace(",", "")) for cell in rows[name])
        assert (operations, nodes) == (counts.operations.total(), counts.nodes.total())
        assert calls == pytest.approx(counts.calls.total(), rel=0.05)
    assert tuple(layer[name].operations.total() for name in ("kept", "ours")) == LAYER_OPERATIONS


def _cells(line: str) -> list[str]:
    return [*line.split("|"), "", "", "", ""]


def test_what_is_counted_is_what_is_called(tmp_path: Path) -> None:
    """A product more in a layer is an operation more, and as many calls of ours as it is."""
    from benchmarks.host_overhead import counted

    counts = Counts()

    def three() -> None:
        for _ in range(3):
            inner()

    def inner() -> None:
        import torch

        torch.ones(2).add_(1.0)

    with counted(counts):
        three()
    assert counts.operations["aten.add_.Tensor"] == 3
    assert sum(times for name, times in counts.calls.items() if name.endswith(".inner")) == 3


def test_a_token_of_an_answer_asks_of_the_host_what_a_forward_of_training_does(tmp_path: Path) -> None:
    """By which a run's hours are estimated."""
    directory = tiny_directory(tmp_path, layers=2)
    token, forward = (
        count_forward(directory, 2, is_answer).less(count_forward(directory, 1, is_answer), 1)
        for is_answer in (True, False)
    )
    assert token.operations.total() == pytest.approx(forward.operations.total(), rel=0.2)
    assert token.calls.total() == pytest.approx(forward.calls.total(), rel=0.2)
