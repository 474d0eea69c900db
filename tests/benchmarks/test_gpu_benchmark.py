"""benchmarks/gpu.py walks all of its code without a GPU: on fake tensors, and its contenders on a CPU."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import gpu, kernels
from benchmarks.contenders import ON_GPU, Result


@pytest.mark.slow
def test_dry_run_tells_every_kernel_and_plans_whom_it_can(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", str(tiny_llama), "--dry-run"])
    assert gpu.main() == 0
    output = capsys.readouterr().out
    assert output.startswith("Dry run: nothing below was measured.")
    for name in gpu.works():
        assert name in output
    for name in ("ours", "hand-written loop"):
        assert f"\n{name} " in output.partition("planned")[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "--dry-run" in capsys.readouterr().err


def test_results_are_reported_with_rates_that_leave_the_first_step_out(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result([2.0, 1.0, 0.5], [9.0, 1.0, 1.0], [9.0, 1.0, 1.0], [10, 30, 50], [10, 40, 60], 3 * 2**30, "so")
    gpu.print_training({"ours": result, "Unsloth": None})
    ours, settings, failed = capsys.readouterr().out.splitlines()[1:]
    assert ours.split() == ["ours", "40", "50", "3.00", "2.000", "1.000", "0.500"]
    assert settings.strip() == "so"
    assert failed.split() == ["Unsloth", "failed"]


def test_who_is_not_installed_is_left_out_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    names = gpu.contenders([])
    assert set(names) <= set(ON_GPU)
    assert ("Unsloth" in names) != ("Unsloth is left out" in capsys.readouterr().out)
    assert gpu.contenders(["hand-written loop", "Unsloth"]) == ["ours"]


def test_a_kernels_share_of_the_card_is_that_of_its_bound() -> None:
    roofs = gpu.Roofs("a card", bandwidth=100.0, flops=1000.0)
    assert gpu.Line("moves", seconds=2.0, bytes=100).share(roofs) == 0.5
    assert gpu.Line("multiplies", seconds=4.0, flops=1000).share(roofs) == 0.25


class Card:
    """Play a card's clock and queue: notes what happens in which order, and sleeps some launches long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, awake_until: int = 0, cache: int = 2**20) -> None:
        self.log: list[object] = []
        self.cycles = 0
        card = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                card.log.append("record")

            def query(self) -> bool:
                card.log.append("query")
                return card.cycles < awake_until

            def synchronize(self) -> None:
                card.log.append("wait")

            def elapsed_time(self, end: "Event") -> float:
                return 6.0

        def sleep(cycles: int) -> None:
            self.log.append("sleep")
            self.cycles = cycles

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("synchronize"))
        properties = type("Properties", (), {"L2_cache_size": cache})()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_launching_is_hidden_the_card_sleeps_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(monkeypatch)
    calls = [lambda: card.log.append("one"), lambda: card.log.append("two"), lambda: card.log.append("three")]
    assert gpu.median_seconds(lambda: calls) == pytest.approx(2e-3)  # 6 ms for three calls
    warming_up = 3 * gpu.WARM_UP
    a_round = ["synchronize", "sleep", "record", "one", "two", "three", "record", "query", "wait"]
    assert card.log[:warming_up] == ["one", "two", "three"] * gpu.WARM_UP
    assert card.log[warming_up:] == a_round * gpu.ROUNDS


def test_where_the_card_woke_too_early_the_calls_are_made_anew_behind_a_longer_sleep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card(monkeypatch, awake_until=gpu.SLEEPS[2])
    made: list[int] = []

    def prepared() -> gpu.Calls:
        made.append(card.cycles)
        return [lambda: None]

    gpu.median_seconds(prepared)
    assert len(made) == gpu.WARM_UP + 3 * gpu.ROUNDS
    assert card.cycles == gpu.SLEEPS[2]


def test_launching_that_cannot_be_hidden_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Card(monkeypatch, awake_until=10**12)
    with pytest.warns(UserWarning, match="launching is in the time"):
        gpu.median_seconds(lambda: [lambda: None])


@pytest.mark.parametrize("gradients", [0, 1])
def test_calls_take_inputs_in_turn_that_no_cache_holds(monkeypatch: pytest.MonkeyPatch, gradients: int) -> None:
    numbers = 64 * 1024  # 256 KiB, a quarter of the stand-in's cache
    card = Card(monkeypatch, cache=2**20)

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        pointer = x.data_ptr()
        card.log.append(pointer)
        if x.requires_grad:
            y.register_hook(lambda grad: card.log.append(-pointer))
        return y

    gpu.seconds_of(kernels_work(function, numbers, gradients), "cpu")
    begin = len(card.log) - 1 - card.log[::-1].index("sleep")
    timed = [entry for entry in card.log[begin:] if isinstance(entry, int)]
    assert len(timed) == len(set(timed)) == 9  # eight others fill the cache twice
    assert all((entry < 0) == bool(gradients) for entry in timed)


def kernels_work(function: Callable[..., torch.Tensor], numbers: int, gradients: int) -> kernels.Work:
    return kernels.Work(function, [((numbers,), torch.float32)], gradients)


@pytest.mark.parametrize(
    ("cache", "size", "copies"),
    [
        (72 * 10**6, 22 * 10**6, 8),  # a 4090 and the weight of one product: the seven others are 154 MB
        (60 * 10**6, 120 * 10**6, 2),
        (60 * 10**6, 10**9, 2),
        (60 * 10**6, 1000, gpu.MOST_COPIES),
        (0, 1000, 1),
    ],
)
def test_copies_are_as_many_as_fill_the_cache_twice(cache: int, size: int, copies: int) -> None:
    assert gpu.copies_beyond(cache, size) == copies
