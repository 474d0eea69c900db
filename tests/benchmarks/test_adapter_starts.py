"""The comparison of starts runs through, keeps what it measured, and its intervals are Student's."""

import sys
from pathlib import Path

import pytest

from benchmarks import adapter_starts
from benchmarks.adapter_starts import arguments, best_rates, mean_and_interval, table


def test_intervals_are_students() -> None:
    """Of 1, 2, 3: deviation 1, and t of 2 degrees of freedom is 4.303."""
    mean, half = mean_and_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5)
    assert mean_and_interval([1.5]) == (1.5, float("inf"))


def test_a_start_is_compared_with_kaimings_run_of_the_same_rows_and_seed() -> None:
    options = arguments().parse_args(["--starts", "kaiming", "pissa", "--data", "a", "b", "--seeds", "0", "1"])
    options.rates = [0.1, 0.2]
    losses = {("kaiming", data, seed, rate): 1.0 + seed for data in "ab" for seed in (0, 1) for rate in (0.1, 0.2)}
    losses |= {
        ("pissa", data, seed, rate): 1.1 + seed - rate for data in "ab" for seed in (0, 1) for rate in (0.1, 0.2)
    }
    assert best_rates(losses, options.starts, options.rates) == {"kaiming": 0.1, "pissa": 0.2}
    _, kaiming, pissa = table(losses, options).splitlines()
    assert "+" not in kaiming
    assert pissa.split()[:2] == ["pissa", "0.2"]
    assert pissa.count("-0.1000 ± 0.0000") == 3  # whatever the seed makes of both


@pytest.mark.slow
def test_a_trial_runs_through_and_what_was_measured_is_not_run_again(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(tiny_llama), "--steps", "2", "--seeds", "0", "1", "--data", "snips_json", "--rows", "24"]
    words += ["--starts", "kaiming", "loftq", "--rank", "4", "--results", str(tmp_path / "results")]
    words += ["--folder", str(Path(__file__).parents[1] / "data" / "rows")]
    monkeypatch.setattr(sys, "argv", ["adapter_starts", *words])
    adapter_starts.main()
    first = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in first] == ["start", "kaiming", "loftq"]
    assert len((tmp_path / "results").read_text().splitlines()) == 4
    monkeypatch.setattr(adapter_starts, "eval_loss_of", lambda config: pytest.fail("it is run again"))
    adapter_starts.main()
    assert capsys.readouterr().out.splitlines()[-3:] == first
