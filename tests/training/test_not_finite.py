"""Promises of training in a dtype that the model's values leave: the run ends at once, with the place and the way."""

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from tiny_models import make_model_beyond_float16

from qlora_trainer.common.errors import TrainingError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs.metrics import read_metrics
from qlora_trainer.runs.start import start_run

Config = Callable[..., RunConfig]


def quiet(record: dict[str, Any]) -> None:
    """A display that shows nothing."""


@pytest.mark.parametrize("where", slow_but(["MLP", "hidden"], "MLP"))
def test_a_first_loss_that_is_not_finite_ends_a_float16_run_and_the_advice_works(
    where: str, tiny_config: Config, tmp_path: Path
) -> None:
    base = str(make_model_beyond_float16(tmp_path / "base", where))
    run = start_run(tiny_config(model={"name": base, "compute_dtype": "float16"}))
    assert not any("attention cannot keep" in warning or "logits in a way" in warning for warning in run.warnings)
    assert any("are not finite in float16" in warning for warning in run.warnings)
    run.answer_samples("before")
    with pytest.raises(TrainingError, match=r"loss of step 1 is nan.*float16, which ends at 65,504") as refused:
        run.train(quiet)
    assert "model.layers.0.mlp" in str(refused.value)
    assert run.state.updates == 0
    assert read_metrics(run.directory / "metrics.jsonl") == []

    advice = re.findall(r"model\.compute_dtype=\w+ 'training\.output_dir=[^']+'(?=[,.](?:\s|$))", str(refused.value))
    assert len(advice) == 2
    for settings in advice:
        given = dict(word.split("=", 1) for word in shlex.split(settings))
        anew = start_run(tiny_config(model={"name": base}).replace({**given, "training.max_steps": 1}))
        losses: list[dict[str, Any]] = []
        assert anew.train(losses.append)
        assert math.isfinite(losses[0]["loss"])


@pytest.mark.parametrize("dtype", slow_but(["float32", "float16"], "float16"))
def test_later_losses_that_are_not_finite_end_the_run_after_a_few_skipped_steps(
    dtype: str, tiny_config: Config
) -> None:
    """Also in float16, where a gradient that overflows may be skipped more often: no scale mends a loss."""
    run = start_run(tiny_config(model={"compute_dtype": dtype}))
    embedding = run.state.model.get_input_embeddings().weight

    def spoil(record: dict[str, Any]) -> None:
        with torch.no_grad():
            embedding[5:] = float("nan")

    with pytest.raises(TrainingError, match=r"loss of step 6 is nan, so nothing was updated in 5 steps in a row"):
        run.train(spoil)
    assert run.state.updates == 1


def test_a_base_that_gives_no_finite_loss_in_fp32_is_reported_at_the_first_step(tiny_config: Config) -> None:
    run = start_run(tiny_config())
    with torch.no_grad():
        run.state.model.get_input_embeddings().weight.fill_(float("inf"))
    with pytest.raises(
        TrainingError, match=r"step 1 .* float32, .* in the output of model\.embed_tokens.*base's weights"
    ):
        run.train(quiet)
