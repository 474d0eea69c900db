"""Try of each kind of adapter what only a GPU can show: its step, its plan, its resuming, and rows that share a batch.

The laws that need no GPU are in tests/adapters/kinds/test_laws.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import (
    assert_plan_is_what_torch_reserves,
    assert_resumed_is_uninterrupted,
    needs_cuda,
    wide_model,
    write_long_rows,
)
from kind_cases import CASES, KindCase
from stored_adapters import SIZE, store_adapter
from tiny_models import load
from tiny_runs import gradients_of_one_step

from qlora_trainer.adapters.trainable import trainable_parameters
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.types import PromptTokens
from qlora_trainer.runs.adapter_set import AdapterSet
from qlora_trainer.runs.start import start_run
from qlora_trainer.training.generation import generate_answers, stream_answer

pytestmark = needs_cuda

Config = Callable[..., RunConfig]
each_kind = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MIXED: list[str | None] = ["lora", None, "dora", "ia3", "lora", None]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide_model(tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_rows(tmp_path_factory.mktemp("rows") / "long.jsonl")


@each_kind
def test_a_step_on_cuda_has_the_loss_and_the_gradient_of_a_cpu(case: KindCase, tiny_config: Config) -> None:
    """In fp32, of packed rows, with every kernel, and away from an adapter's start, where parts have no gradient."""
    found = {}
    for device in ("cpu", "cuda"):
        model = {"device": device, "compute_dtype": "float32"}
        found[device] = gradients_of_one_step(tiny_config(device, model=model, adapter=case.settings))
    (expected_loss, expected), (loss, gradients) = found["cpu"], found["cuda"]
    assert loss == pytest.approx(expected_loss, rel=2e-4)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.norm() > 0
        assert (gradient.cpu() - wanted).norm() <= 2e-4 * wanted.norm()


@each_kind
def test_a_plan_of_each_kind_is_what_torch_reserves(
    case: KindCase, tiny_config: Config, wide: Path, long_rows: Path
) -> None:
    """Two steps of two rows of 2,048 tokens, each a micro-batch, with all that backward needs kept."""
    config = tiny_config(
        model={"name": str(wide), "device": "cuda"},
        adapter=case.settings,
        data={"train": str(long_rows), "eval": 0.0, "max_length": 2048},
        training={
            "global_batch_size": 2,
            "max_steps": 2,
            "activation_checkpointing": "none",
            "micro_batch_tokens": 2048,
        },
    )
    run = assert_plan_is_what_torch_reserves(config, case.settings["kind"])
    assert run.state.policy.level == "none"
    run.release()


@each_kind
def test_a_deterministic_run_of_each_kind_resumed_on_cuda_is_the_uninterrupted_one(
    case: KindCase, tiny_config: Config, wide: Path, long_rows: Path
) -> None:
    """By rows as long as the model's positions, whose gradients flash attention adds in any order otherwise."""
    changes = {
        "model": {"name": str(wide), "device": "cuda"},
        "data": {"train": str(long_rows), "eval": 0.0, "max_length": 2048},
        "adapter": case.settings,
        "training": {
            "activation_checkpointing": "full",
            "global_batch_size": 2,
            "max_steps": 5,
            "deterministic": True,
        },
    }
    whole, *parts = assert_resumed_is_uninterrupted(tiny_config, changes)
    assert max(whole.prepared.train.lengths) == case.config.positions_of_rows(2048)
    for run in (whole, *parts):
        run.release()


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_rows_of_a_batch_on_cuda_take_the_adapters_that_they_have_alone(
    dtype: str, allowed: float, tiny_llama: Path, tmp_path: Path
) -> None:
    adapters = AdapterSet(load(tiny_llama, device="cuda", compute_dtype=dtype))
    on_cpu = load(tiny_llama, device="cpu", compute_dtype="float32")
    for seed, kind in enumerate(dict.fromkeys(name for name in MIXED if name)):
        adapters.load_adapter(store_adapter(tmp_path / kind, on_cpu, seed, **CASES[kind].settings), kind)
    input_ids = torch.randint(3, 60, (len(MIXED), 9), generator=torch.Generator().manual_seed(0)).cuda()
    alone = []
    with torch.no_grad():
        plain = adapters.model(input_ids=input_ids).logits.float()
        for name, row in zip(MIXED, input_ids, strict=True):
            adapters.set_adapter(name)
            alone.append(adapters.model(input_ids=row[None]).logits)
        adapters.set_adapter(None)
        with adapters.rows(MIXED):
            found = adapters.model(input_ids=input_ids).logits.float()
    expected = torch.cat(alone).float()
    assert found.device.type == "cuda"
    for row, name in enumerate(MIXED):
        size = expected[row].norm()
        assert (found[row] - expected[row]).norm() <= allowed * size
        if name is not None:
            assert (expected[row] - plain[row]).norm() > 3 * allowed * size, "the adapter must matter"


def test_answers_on_cuda_with_a_prefix_are_those_of_the_forward(tiny_config: Config) -> None:
    """In fp32, by the cache and in a batch of prompts of other lengths, next to whole forwards without a cache."""
    model_settings = {"device": "cuda", "compute_dtype": "float32"}
    run = start_run(tiny_config(model=model_settings, adapter=CASES["prefix"].settings))
    model: Any = run.base.model.eval()
    tokenizer: Any = run.renderer.tokenizer
    stop = tokenizer.eos_token_id
    prompts = [PromptTokens(ids, [stop]) for ids in ([5, 6, 7, 8, 9, 10, 11, 12], [20, 21], [40, 41, 42])]

    @torch.no_grad()
    def by_whole_forwards() -> list[str]:
        answers = []
        for prompt in prompts:
            ids = list(prompt.input_ids)
            begin = len(ids)
            while len(ids) < begin + 6 and ids[-1] != stop:
                logits = model(torch.tensor([ids], device="cuda"), use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
            answers.append(tokenizer.decode(ids[begin:], skip_special_tokens=True))
        return answers

    before = by_whole_forwards()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_((10 * SIZE * torch.randn(parameter.shape, generator=generator)).to(parameter.device))
    expected = by_whole_forwards()
    assert expected != before, "the prefix must matter"
    assert generate_answers(model, tokenizer, prompts, max_new_tokens=6) == expected
    assert ["".join(stream_answer(model, tokenizer, one, max_new_tokens=6)) for one in prompts] == expected
