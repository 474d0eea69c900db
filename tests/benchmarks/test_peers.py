"""Agreement with peft + bitsandbytes: the same losses, and adapters that each reads from the other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_runs import quiet
from transformers import AutoModelForCausalLM

from benchmarks import contenders
from benchmarks.peft_parity import compare
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.load import load_dense_model
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import open_trained
from qlora_trainer.weights.model_directory import ModelDirectory


@pytest.mark.slow
def test_losses_equal_those_of_peft_and_bitsandbytes(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    pairs = compare(tiny_llama, rows, steps=20, batch_size=3, work=tmp_path)
    assert len(pairs) == 20
    assert pairs[-1][1] < pairs[0][1]
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_contenders_of_the_cpu_benchmark_learn_the_same_from_the_same_rows(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    job = contenders.Job(str(tiny_llama), str(rows), steps=3, batch_size=4, rank=4, work=str(tmp_path))
    mine, theirs = contenders.ours(job, "none"), contenders.hand_written_loop(job)
    assert mine.losses[0] == pytest.approx(theirs.losses[0], rel=1e-6)
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-4), "Adam makes much of a first gradient's last bits"
    assert mine.tokens == theirs.tokens == mine.computed_tokens
    assert all(padded > useful for padded, useful in zip(theirs.computed_tokens, theirs.tokens, strict=True))
    assert mine.peak_bytes > 0


def test_peft_loads_our_adapter_with_the_same_logits(
    tiny_config: Callable[..., RunConfig], tiny_llama: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = start_run(tiny_config(adapter={"use_rslora": True}, optimizer={"learning_rate": 2e-2}))
    run.train(quiet)
    trained = open_trained(run.directory)
    dense = load_dense_model(ModelDirectory.open(tiny_llama), torch.device("cpu"))
    # PEFT's side computes on the very weights ours has: NF4, dequantized.
    from qlora_kernels.nf4 import dequantize_nf4

    with torch.no_grad():
        for path in run.adapted:
            weight = dequantize_nf4(trained.base.model.get_submodule(path).base.nf4_weight, torch.float32)
            dense.get_submodule(path).weight.copy_(weight)
    recwarn.clear()
    theirs = PeftModel.from_pretrained(dense, run.directory / "adapter").eval()
    assert [str(w.message) for w in recwarn if "adapter" in str(w.message).lower()] == []
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, trained.base.model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_run_starts_from_pefts_adapter(
    tiny_config: Callable[..., RunConfig], tiny_llama: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    run = start_run(
        tiny_config(adapter={"target_modules": ["q_proj", "v_proj"], "init_from": str(tmp_path / "theirs"), "rank": 4})
    )
    mine = run.base.model.get_submodule("model.layers.1.self_attn.v_proj")
    other = model.base_model.model.model.layers[1].self_attn.v_proj
    assert torch.equal(mine.lora_A.weight, other.lora_A["default"].weight)
    assert torch.equal(mine.lora_B.weight, other.lora_B["default"].weight)
    assert mine.scaling == other.scaling["default"]


@pytest.mark.slow
def test_an_adapter_made_with_other_settings_is_refused_with_the_settings_it_needs(
    tiny_config: Callable[..., RunConfig],
) -> None:
    from qlora_trainer.common.errors import AdapterError

    first = start_run(tiny_config("first"))
    first.train(quiet)
    with pytest.raises(AdapterError, match=r"set 'adapter\.alpha=8\.0'"):
        start_run(tiny_config("second", adapter={"init_from": str(first.directory / "adapter"), "alpha": 16}))
