"""Promises of the dtype of a merge: what it cannot hold is refused, or written in bfloat16 where none was asked."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from safetensors.torch import load_file, save_file
from tiny_models import make_model_beyond_float16, make_model_directory
from transformers import AutoModelForCausalLM

from qlora_trainer.common.errors import DtypeRangeError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.merging import merge_run as deployment
from qlora_trainer.merging.merge_run import merge_run, refuse_out_of_range
from qlora_trainer.model.modules.activation_range import ActivationRange
from qlora_trainer.runs.start import start_run

Config = Callable[..., RunConfig]


def quiet(record: dict[str, Any]) -> None:
    """A display that shows nothing."""


def trained_on(base: Path, tiny_config: Config) -> Path:
    run = start_run(tiny_config(model={"name": str(base)}, training={"max_steps": 1}))
    assert run.train(quiet)
    return run.directory


def is_finite_in_its_own_dtype(directory: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    with torch.no_grad():
        return bool(torch.isfinite(model(torch.arange(5, 45)[None]).logits).all())


@pytest.mark.parametrize("where", slow_but(["MLP", "hidden"], "MLP"))
def test_activations_beyond_float16_are_refused_where_it_was_named_and_the_advice_works(
    where: str, tiny_config: Config, tmp_path: Path, qlora: Callable[..., tuple[int, str, str]]
) -> None:
    run_dir = trained_on(make_model_beyond_float16(tmp_path / "base", where), tiny_config)
    code, _, printed = qlora("merge", run_dir, "--output", tmp_path / "named", "--dtype", "float16")
    assert code == 2
    put = "input" if where == "MLP" else "output"
    first = rf"which ends at 65,504, .* the first that is beyond is the {put} of model\.layers\.0\.mlp\.down_proj, \d"
    assert re.search(first, printed)
    assert not (tmp_path / "named").exists()
    (advice,) = re.findall(r"Merge with (--dtype \w+)", printed)
    code, out, _ = qlora("merge", run_dir, "--output", tmp_path / "named", *shlex.split(advice), "--json")
    assert code == 0
    assert json.loads(out)["report"]["dtype"] == "bfloat16"
    assert is_finite_in_its_own_dtype(tmp_path / "named")


def test_where_no_dtype_was_named_it_is_written_in_bfloat16_with_a_warning(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = trained_on(make_model_beyond_float16(tmp_path / "base"), tiny_config)
    written = []
    right = deployment.merge

    def noted(plan: Any, **options: Any) -> Any:
        written.append(plan.dtype)
        return right(plan, **options)

    monkeypatch.setattr(deployment, "merge", noted)
    done = merge_run(run_dir, tmp_path / "merged")
    assert written == [torch.bfloat16], "nothing was written in float16 first"
    assert done.report.dtype == "bfloat16"
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    (warning,) = [warning for warning in done.warnings if "bfloat16" in warning]
    assert "no --dtype was named" in warning
    assert "model.layers.0.mlp.down_proj" in warning
    assert is_finite_in_its_own_dtype(tmp_path / "merged")
    assert done.report.verification is not None
    assert done.report.verification.plain is not None
    assert done.report.verification.plain.dtype == "bfloat16"


@pytest.mark.slow
def test_a_weight_beyond_float16_is_written_in_bfloat16_too_where_none_was_named(
    tiny_config: Config, tmp_path: Path
) -> None:
    """A norm's weight of which nothing comes, as what it multiplies is zero."""
    base = make_model_directory(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 3] = 0.0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[3] = 0.0
    tensors["model.layers.0.input_layernorm.weight"][3] = 70144.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run_dir = trained_on(base, tiny_config)
    with pytest.raises(DtypeRangeError, match=r"input_layernorm\.weight has a value of 70144, too large for float16"):
        merge_run(run_dir, tmp_path / "merged", dtype=torch.float16, base="dequantized")
    assert not (tmp_path / "merged").exists()
    done = merge_run(run_dir, tmp_path / "merged", base="dequantized")
    assert done.report.dtype == "bfloat16"
    assert any("input_layernorm.weight has a value of 70144" in warning for warning in done.warnings)
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == ["merged"]


def test_the_range_of_a_dtype_is_its_own() -> None:
    seen = ActivationRange()
    seen.take("first", torch.tensor([65504.0]))
    refuse_out_of_range(seen, torch.float16)
    seen.take("second", torch.tensor([-65505.0]))
    seen.take("third", torch.tensor([2e9]))
    refuse_out_of_range(seen, torch.bfloat16)
    refuse_out_of_range(seen, torch.float32)
    with pytest.raises(
        DtypeRangeError, match=r"first that is beyond is second, 65,505, and the most third, 2,000,000,000"
    ):
        refuse_out_of_range(seen, torch.float16)
    seen.take("fourth", torch.tensor([float("nan")]))
    refuse_out_of_range(seen, torch.float16)  # fp32 cannot compute it either: a damaged model, found elsewhere
