"""A card that torch has no code for is refused with the ways out; what is missing is said before training."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cards import CUDA_13, pretend

from qlora_kernels import registry
from qlora_trainer.cli import doctor_machine
from qlora_trainer.common.errors import ConfigError, ModelError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model import device
from qlora_trainer.model.device import choose_device, kernel_warnings, kernels_in_words, unusable
from qlora_trainer.runs.start import resume_run, start_run

CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (CUDA_13, (7, 5), True),
        (CUDA_13, (8, 9), True),  # by the code for 8.6
        (CUDA_13, (12, 1), True),
        (CUDA_13, (7, 0), False),
        (CUDA_13, (6, 1), False),
        (CUDA_13, (11, 0), False),  # between two majors
        (CUDA_12_6, (6, 1), True),
        (CUDA_12_6, (12, 0), False),
        ([*CUDA_12_6, "compute_90"], (12, 0), True),  # the driver compiles PTX for later cards
        ([*CUDA_12_6, "sm_90a", "compute_90"], (10, 3), True),
        (CUDA_12_6, (5, 2), False),  # torch has code, bitsandbytes has not
        ([], (3, 5), True),  # no list to go by
        (["gfx1100"], (11, 0), True),  # AMD's
    ],
)
def test_card_runs_where_torch_has_code_for_it(
    architectures: list[str], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, architectures, capability)
    assert (unusable(0)[0] == "") == runs


def test_training_on_a_card_too_old_for_torch_is_refused_with_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pretend(monkeypatch, CUDA_13, (6, 1), (8, 6))
    for wanted in ("cuda", "auto"):
        with pytest.raises(ModelError) as refusal:
            device.choose_device(wanted)
        reported = str(refusal.value)
        assert "GPU 0 (Card 0, compute capability 6.1) cannot be used: torch" in reported
        assert "sm_75, sm_80, sm_86, sm_90, sm_100, sm_120 only" in reported
        assert "a torch built for CUDA 12.6" in reported
        assert "CUDA_VISIBLE_DEVICES=1 takes Card 1, compute capability 8.6" in reported
        assert ("CUDA_VISIBLE_DEVICES= in front of the command takes the CPU" in reported) == (wanted == "auto")
        assert ("add model.device=cpu to the command" in reported) == (wanted == "cuda")


@pytest.mark.parametrize(
    ("visible", "advice"),
    [
        (None, "CUDA_VISIBLE_DEVICES=1 takes"),
        ("2,5", "CUDA_VISIBLE_DEVICES=5 takes"),
        ("GPU-8932f937, GPU-1a2b3c4d", "CUDA_VISIBLE_DEVICES=GPU-1a2b3c4d takes"),
    ],
)
def test_another_card_is_named_as_the_environment_names_it(
    visible: str | None, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts from 0 among the cards that are visible."""
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pretend(monkeypatch, CUDA_13, (6, 1), (8, 6))
    with pytest.raises(ModelError, match=advice):
        device.choose_device("auto")


def test_a_config_that_asks_for_cuda_without_a_card_says_where_to_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for(monkeypatch, None)
    with pytest.raises(ModelError, match=r"sees no CUDA device .* add model\.device=cpu to the command"):
        device.choose_device("cuda")
    assert device.choose_device("cpu").type == "cpu", "the advice works"


def test_ways_out_of_the_refusal_are_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, CUDA_13, (6, 1))
    assert device.choose_device("cpu") == torch.device("cpu")
    pretend(monkeypatch, CUDA_13, (8, 6))  # as CUDA_VISIBLE_DEVICES=1 would show the other card
    assert device.choose_device("auto").type == "cuda"
    pretend(monkeypatch, CUDA_12_6, (6, 1))  # as the other build of torch says
    assert device.choose_device("auto").type == "cuda"


def test_card_newer_than_torch_is_refused_with_a_newer_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, CUDA_12_6, (12, 0))
    with pytest.raises(ModelError, match="Install a newer torch"):
        device.choose_device("auto")


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def built_for(monkeypatch: pytest.MonkeyPatch, cuda: str | None) -> None:
    """A torch built for this CUDA, or for a CPU, that sees no card."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


no_driver = pytest.mark.skipif(has_driver(), reason="this machine has an NVIDIA driver")


@no_driver
def test_a_run_that_takes_the_cpu_for_want_of_a_driver_says_so_until_the_cpu_is_meant(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    built_for(monkeypatch, "13.0")
    run = start_run(tiny_config(model={"device": "auto"}))
    (warning,) = [warning for warning in run.warnings if "takes the CPU" in warning]
    for words in ("built for CUDA 13.0", "libcuda.so.1", "Install the NVIDIA driver", "--gpus all", "model.device=cpu"):
        assert words in warning
    meant = resume_run(run.directory, ["model.device=cpu"])
    assert not [warning for warning in meant.warnings if "takes the CPU" in warning]


def test_a_torch_built_for_a_cpu_misses_no_card(
    tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    built_for(monkeypatch, None)
    run = start_run(tiny_config(model={"device": "auto"}))
    assert not [warning for warning in run.warnings if "takes the CPU" in warning]
    monkeypatch.setattr("shutil.which", lambda name: None)
    (finding,) = doctor_machine.cards()
    assert (finding.detail, finding.advice) == ("none found; everything runs on the CPU, slowly", "")


@no_driver
@pytest.mark.parametrize(("program", "status"), [(None, "note"), ("/usr/bin/nvidia-smi", "problem")])
def test_doctor_names_a_driver_that_cannot_be_loaded(
    program: str | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_for(monkeypatch, "13.0")
    monkeypatch.setattr("shutil.which", lambda name: program)
    (finding,) = doctor_machine.cards()
    assert finding.status == status
    assert "built for CUDA 13.0" in finding.detail
    assert "libcuda.so.1" in finding.detail
    assert finding.advice == "Install the NVIDIA driver; in a container, start it with --gpus all."


@pytest.mark.parametrize(
    ("visible", "found", "advice"),
    [("", "CUDA_VISIBLE_DEVICES=''", "Unset CUDA_VISIBLE_DEVICES."), (None, "sees no card", "nvidia-smi says whether")],
)
def test_a_driver_that_shows_no_card_and_one_that_is_missing_get_their_own_messages(
    visible: str | None, found: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_for(monkeypatch, "13.0")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    (finding,) = doctor_machine.cards()
    assert finding.status == "problem"
    assert found in finding.detail
    assert "cannot be loaded" not in finding.detail
    assert finding.advice.startswith(advice)


@pytest.mark.usefixtures("without_compiler")
def test_kernels_that_are_missing_are_said_once_with_what_brings_them() -> None:
    (reported,) = kernel_warnings("cpu")
    assert reported.startswith(
        "Plain torch takes the place of faster kernels for dequantize_nf4, quantize_nf4: there is no"
    )
    assert "install g++" in reported


@pytest.mark.usefixtures("without_compiler")
def test_a_run_counts_fast_kernels_and_names_those_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = sum(version == "fast" for version in registry.implementations("cpu").values())
    assert kernels_in_words("cpu") == f"{fast} fast, plain torch for dequantize_nf4, quantize_nf4"
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    assert kernels_in_words("cpu").startswith("0 fast, plain torch for ")


@pytest.mark.usefixtures("without_compiler")
def test_kernels_that_are_demanded_and_missing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "fast")
    with pytest.raises(ConfigError, match=r"QLORA_KERNELS=fast, but: .*install g\+\+.* Or unset QLORA_KERNELS\."):
        kernel_warnings("cpu")


def test_unknown_choice_of_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "triton")
    with pytest.raises(ConfigError, match="QLORA_KERNELS is 'triton'; it can be auto, reference, fast"):
        kernel_warnings("cpu")


def test_an_unknown_word_for_the_kernels_is_a_problem_of_the_settings(
    config_file: Path, qlora: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever loads a model chooses a device first: evaluate, generate and merge as well."""
    monkeypatch.setenv("QLORA_KERNELS", "quick")
    with pytest.raises(ConfigError, match="QLORA_KERNELS is 'quick'; it can be auto, reference, fast"):
        choose_device("cpu")
    code, _, error = qlora("train", config_file)
    assert code == 2
    assert "QLORA_KERNELS is 'quick'; it can be auto, reference, fast" in error
