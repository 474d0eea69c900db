"""Promises of a run that starts from an adapter: on the base of its training and with its settings, or not at all."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import scale_tensor
from tiny_runs import no_load

from qlora_trainer.common.errors import AdapterError, FileMissingError
from qlora_trainer.config.load import load_config, save_config
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.runs import start as runs
from qlora_trainer.runs.start import start_run

Config = Callable[..., RunConfig]


def test_a_new_run_from_our_adapter_is_refused_on_another_base(
    tiny_config: Config, finished: Path, own_base: Path
) -> None:
    scale_tensor(own_base, "model.norm.weight", 1.5)
    for source in (finished / "adapter", finished / "checkpoints" / "step-000002"):
        config = tiny_config("second", model={"name": str(own_base)}, adapter={"init_from": str(source)})
        with pytest.raises(AdapterError, match=r"trained on another base .* such as model\.norm\.weight"):
            start_run(config)
        assert not Path(config.training.output_dir).exists()


@pytest.mark.slow
def test_a_new_run_from_anothers_adapter_says_which_base_it_names(tiny_config: Config, finished: Path) -> None:
    foreign = finished / "adapter"
    (foreign / "base.json").unlink()
    (foreign / "trainer_state.json").write_text("{}")  # other trainers write one too
    run = start_run(tiny_config("same", adapter={"init_from": str(foreign)}))
    assert not [warning for warning in run.warnings if "was made for" in warning]
    path = foreign / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "someone/else"}))
    run = start_run(tiny_config("other", adapter={"init_from": str(foreign)}))
    assert [warning for warning in run.warnings if "was made for someone/else" in warning]


@pytest.mark.parametrize(
    ("trained", "wanted", "advice"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, {}, ["adapter.target_modules=[q_proj, v_proj]"]),
        (
            {},
            {"target_modules": ["q_proj"]},
            ["adapter.target_modules=[down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj]"],
        ),
        ({"bias": "lora_only"}, {}, ["adapter.bias=lora_only"]),
        ({"use_rslora": True}, {}, ["adapter.alpha=16.0"]),
    ],
)
def test_an_adapter_of_other_settings_is_refused_before_the_base_is_loaded_with_the_settings_to_type(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: dict, wanted: dict, advice: list[str]
) -> None:
    first = start_run(tiny_config("first", adapter=trained))
    source = first.directory / "checkpoints" / "step-000000"
    config = tiny_config("second", adapter={"init_from": str(source), **wanted})
    with monkeypatch.context() as patched:
        patched.setattr(runs, "load_base", no_load)
        with pytest.raises(AdapterError) as refused:
            start_run(config)
    typed = shlex.split(str(refused.value).partition("To start from it, set ")[2].removesuffix("."))
    assert typed == advice
    save_config(config, tmp_path / "second.yaml")
    assert start_run(load_config(tmp_path / "second.yaml", typed)).directory == tmp_path / "second"


def test_a_missing_adapter_is_reported_before_the_base_is_looked_for(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "resolve_model", no_load)
    with pytest.raises(FileMissingError, match="nowhere"):
        start_run(tiny_config(adapter={"init_from": str(tmp_path / "nowhere")}))
