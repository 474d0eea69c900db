"""Promises of the verification: a spoiled file, a wrong tensor or a logit that is no number fails the merge."""

import functools
import math
from pathlib import Path

import pytest
import torch
from merge_runs import LLAMA, Run, check_logits, make_base, merge_to, reference, train, verifier
from spying import noting
from tiny_models import change_tensors
from torch import Tensor
from transformers import LlamaConfig, Phi3Config, PretrainedConfig, Qwen2Config

from qlora_trainer.common.errors import MergeError
from qlora_trainer.merging import fold as merging
from qlora_trainer.merging.verify import Verification, choose_base
from qlora_trainer.weights.model_directory import ModelDirectory


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**LLAMA, tie_word_embeddings=False),
        Qwen2Config(**LLAMA, tie_word_embeddings=True),
        Phi3Config(**LLAMA, pad_token_id=0),
    ],
    ids=lambda config: config.model_type,
)
def test_plain_transformers_loads_the_merge_and_gives_the_trained_logits(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    run = train(make_base(tmp_path / "base", config))
    merge_to(run.inputs, tmp_path / "exact", dtype=torch.float32)
    check_logits(run, tmp_path / "exact", kl=1e-10)
    report = merge_to(run.inputs, tmp_path / "merged", verify=verifier(run))
    assert report.verification is not None
    assert report.verification.difference.kl < 1e-5


LAST = "model.layers.1.self_attn.v_proj.weight"


SPOILED = {
    "missing": (lambda tensors: tensors.pop(LAST), "v_proj.weight is missing"),
    "unexpected": (lambda tensors: tensors.update(extra=torch.ones(2)), "extra is not expected"),
    "nan": (lambda tensors: tensors[LAST].view(-1)[7].fill_(math.nan), "v_proj.weight holds values that are not fin"),
    "dtype": (lambda tensors: tensors.update({LAST: tensors[LAST].float()}), "v_proj.weight is torch.float32"),
    "shape": (lambda tensors: tensors.update({LAST: tensors[LAST].T.contiguous()}), r"v_proj.weight is .*\(64, 32\)"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_file_fails_the_verification(
    tmp_path: Path, llama: Run, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    change, message = SPOILED[kind]
    spoiling = noting(merging.verify_files, lambda work, *_: change_tensors(work, change))
    monkeypatch.setattr(merging, "verify_files", spoiling)
    with pytest.raises(MergeError, match=message):
        merge_to(llama.inputs, tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_one_wrong_tensor_in_sound_files_fails_the_verification(tmp_path: Path, llama: Run) -> None:
    """All bytes are fine, but one layer of 14 lost its adapter: only the logits show it."""

    def lose_an_adapter(tensors: dict[str, Tensor]) -> None:
        lora_A, lora_B = (
            llama.inputs.adapter.tensors[f"base_model.model.{LAST.removesuffix('.weight')}.lora_{factor}.weight"]
            for factor in "AB"
        )
        tensors[LAST] -= (2.0 * (lora_B @ lora_A)).half()

    def verify(written: ModelDirectory) -> Verification:
        change_tensors(written.path, lose_an_adapter)
        return verifier(llama)(written)

    with pytest.raises(MergeError, match=r"not those of the trained one: beyond .* KL .* \(at most 5\.0e-09\)"):
        merge_to(llama.inputs, tmp_path / "merged", verify=verify)
    assert not any(tmp_path.iterdir())


def test_a_logit_that_is_nan_never_passes(tmp_path: Path, llama: Run) -> None:
    merge_to(llama.inputs, tmp_path / "merged")
    made = reference(llama)
    check = functools.partial(verifier(llama), ModelDirectory.open(tmp_path / "merged"), reference=made)
    assert check().difference.kl < 1e-5
    made.values[60, 3] = math.nan
    with pytest.raises(MergeError, match="logits are not those"):
        check()
    made.values[60, 3] = 0.0
    with pytest.raises(MergeError, match="logits are not those"):
        check(rounded=type(made)(torch.full_like(made.values, math.nan)))


def test_auto_takes_the_lower_eval_loss_and_says_both() -> None:
    assert choose_base(2.0, 1.5).base == "original"
    assert choose_base(1.5, 2.0).base == "dequantized"
    assert choose_base(1.5, 1.5).base == "dequantized"
    assert choose_base(None, 1.5).base == "dequantized"
    assert choose_base(2.0, math.nan).base == "dequantized"
    choice = choose_base(2.0, 1.5)
    assert choice.eval_loss == {"dequantized": 2.0, "original": 1.5}
    assert "2.0000" in choice.reason
    assert "1.5000" in choice.reason
