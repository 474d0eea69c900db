"""What cannot be merged is refused by name, as early as it can be known, and nothing is left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cards import pretend_free_memory
from marks import slow_but
from safetensors.torch import load_file, save_file
from tiny_models import make_model_directory
from tiny_runs import quiet

from qlora_trainer.common.errors import (
    CheckpointError,
    DiskError,
    InsufficientMemoryError,
    MergeError,
    OutputExistsError,
)
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.merging import fold as merging
from qlora_trainer.merging import measure as merge_measurement
from qlora_trainer.merging import merge_run as deployment
from qlora_trainer.merging.merge_run import merge_run
from qlora_trainer.merging.verify import check_original
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import read_trained
from qlora_trainer.weights import side_files as model_files

Config = Callable[..., RunConfig]


@pytest.mark.slow
def test_an_adapter_much_worse_on_the_original_base_is_not_merged_into_it(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for trained, original in [(2.0, 2.2), (1e-4, 0.01), (None, 9.0), (2.0, None)]:
        check_original(trained, original)
    for trained, original in [(2.0, 2.21), (1e-4, 0.0102), (2.0, float("nan"))]:
        with pytest.raises(MergeError, match="--base dequantized"):
            check_original(trained, original)
    losses = iter([2.0, 2.3])
    monkeypatch.setattr(merge_measurement, "eval_loss", lambda *args: next(losses))
    with pytest.raises(MergeError, match=r"loss of 2\.3000, and of 2\.0000 .* more than 10% worse"):
        merge_run(run_dir, tmp_path / "merged", base="original")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_too_little_memory_to_verify_is_reported_before_anything_is_written(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_free_memory(monkeypatch, lambda device: 2**29)
    monkeypatch.setattr(deployment, "merge", lambda *args, **kwargs: pytest.fail("the merge was begun"))
    with pytest.raises(InsufficientMemoryError, match="Comparing logits"):
        merge_run(run_dir, tmp_path / "merged", base="dequantized")
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "measure_trained", lambda *args: pytest.fail("a pass over all weights was begun"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pass")
def test_a_full_disk_is_reported_before_any_pass_over_the_weights(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_files.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
    with pytest.raises(DiskError, match="GiB free"):
        merge_run(run_dir, tmp_path / "merged")


@pytest.mark.usefixtures("no_pass")
def test_a_changed_embedding_is_refused_before_any_pass_over_the_weights(run_dir: Path, tmp_path: Path) -> None:
    base = Path(read_trained(run_dir).config.model.name)
    shutil.copytree(base, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.embed_tokens.weight"][3, 5] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight in .*other holds other values"):
        merge_run(run_dir, tmp_path / "merged", model=str(tmp_path / "other"))


@pytest.mark.parametrize("where", slow_but(["merge", "verify_merge"], "merge"))
def test_memory_that_runs_out_in_a_merge_is_reported_as_such(
    where: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(deployment, where, full)
    with pytest.raises(InsufficientMemoryError, match=r"^Merging .* ran out of memory: .* nothing was written\.$"):
        merge_run(run_dir, tmp_path / "merged", base="dequantized")
    assert not (tmp_path / "merged").exists()


def test_one_spoilt_tensor_is_caught_and_nothing_is_left(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The value is spoilt when the files have been checked: only the comparison of logits can see it."""
    right = merging.verify_files

    def spoil(directory: Path, *args: Any) -> None:
        right(directory, *args)
        path = directory / "model.safetensors"
        tensors = load_file(path)
        weight = tensors["model.layers.1.self_attn.v_proj.weight"]
        weight[3] = -weight[3]
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(merging, "verify_files", spoil)
    with pytest.raises(MergeError, match="logits are not those of the trained one"):
        merge_run(run_dir, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []


def test_an_output_that_is_taken_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        merge_run(run_dir, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_an_adapter_is_refused_on_another_base(tiny_config: Config, tmp_path: Path) -> None:
    own = make_model_directory(tmp_path / "own")
    run = start_run(tiny_config(model={"name": str(own)}))
    run.train(quiet)
    (own / "model.safetensors").unlink()
    make_model_directory(own, seed=9)
    with pytest.raises(CheckpointError, match="not the one this adapter was trained on"):
        merge_run(run.directory, tmp_path / "merged")


def test_another_model_of_the_same_shape_is_no_copy_of_the_base(run_dir: Path, tmp_path: Path) -> None:
    other = make_model_directory(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match=r"not the one this adapter was trained on: \S+\.weight in"):
        merge_run(run_dir, tmp_path / "merged", model=str(other))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"other is not the one .* rms_norm_eps"):
        merge_run(run_dir, tmp_path / "merged", model=str(other))
