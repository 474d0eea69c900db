"""Promises of the parts of a micro-batch that run at once on a CPU: the same gradient, the same bits again, no harm."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from scarcity import Scarcity, differences, everything, same_end, started
from tiny_runs import final_adapter, quiet
from torch import Tensor

from qlora_kernels.side_by_side import worker_number
from qlora_trainer.common.errors import TrainingError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching import packing
from qlora_trainer.model.modules.decoder_layers import decoder_layers
from qlora_trainer.planning.empty_run import empty_run
from qlora_trainer.planning.step_memory import GRADIENTS, WORKSPACE, persistent_tensors
from qlora_trainer.runs.run import Run
from qlora_trainer.runs.start import resume_run, start_run
from qlora_trainer.training.loop import measure_eval
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.training.recovery import take_step
from qlora_trainer.training.step import accumulate_gradients
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give torch two threads, as a machine with two cores does, and let tiny rows be divided."""
    monkeypatch.setattr(packing, "FEWEST_OF_A_PART", 8)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Four steps of 8 rows, each of them one micro-batch or two."""

    def make(output: str = "run", **changes: dict[str, Any]) -> RunConfig:
        own = {"global_batch_size": 8, "micro_batch_tokens": 400, "max_steps": 4, "save_every": 2}
        training = {**own, **changes.pop("training", {})}
        return tiny_config(output, training=training, **changes)

    return make


def gradient(run: Run) -> Tensor:
    """Compute the flat gradient of the run's first step."""
    accumulate_gradients(run.state, run.state.loader.peek())
    return run.state.groups[0].grad.clone()


@pytest.mark.parametrize("is_packed", slow_but([True, False], True), ids=["packed", "padded"])
@pytest.mark.parametrize("activations", slow_but(["none", "full", "offload", "tiled"], "none"))
def test_parts_that_run_at_once_give_the_gradient_of_the_whole(
    config: Config, activations: str, is_packed: bool
) -> None:
    found, losses = {}, {}
    for workers in (1, 2):
        changes = {"activation_checkpointing": activations, "cpu_workers": workers}
        run = started(config(f"run-{workers}", training=changes, data={"packing": is_packed}))
        assert max(len(pack.parts) for pack in run.state.loader.peek()) == (0 if workers == 1 else 2)
        found[workers] = gradient(run)
        random = torch.get_rng_state()
        losses[workers] = measure_eval(run.state, run.prepared.eval)
        assert torch.equal(torch.get_rng_state(), random)
    # Sums in fp32 in another order; a part that is lost, or counted twice, is half of it.
    assert 0 < (found[1] - found[2]).norm() < 1e-5 * found[1].norm()
    assert losses[2] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_parts_give_every_parameter_of_every_kind_the_gradient_of_the_whole(config: Config, kind: str) -> None:
    found = {}
    for workers in (1, 2):
        run = started(config(f"run-{workers}", adapter={"kind": kind}, training={"cpu_workers": workers}))
        assert run.state.workers == workers
        accumulate_gradients(run.state, run.state.loader.peek())
        found[workers] = [group.grad.clone() for group in run.state.groups]
        assert all(grad.any() for group in run.state.groups for grad in group.other_grads), "each thread has its own"
    for one, two in zip(found[1], found[2], strict=True):
        assert 0 < (one - two).norm() < 1e-5 * one.norm()


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_parts_of_every_kind_resume_bit_for_bit(config: Config, kind: str, tmp_path: Path) -> None:
    whole = start_run(config("whole", adapter={"kind": kind}))
    assert whole.train(quiet)
    parts = start_run(config("parts", adapter={"kind": kind}))
    parts.train(quiet, stop_after=2)
    resumed = resume_run(parts.directory)
    assert resumed.state.workers == 2
    assert resumed.train(quiet)
    first, second = final_adapter(whole.directory), final_adapter(resumed.directory)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "gpt2", "falcon", "mixtral", "qwen3_moe"])
def test_parts_give_the_gradient_of_the_whole_in_every_family(
    config: Config, tiny_models: Callable[[str], Path], family: str
) -> None:
    found = []
    for workers in (1, 2):
        changes = {"cpu_workers": workers, "activation_checkpointing": "full"}
        run = started(config(f"run-{workers}", training=changes, model={"name": str(tiny_models(family))}))
        assert run.state.workers == workers
        found.append(gradient(run))
    assert 0 < (found[0] - found[1]).norm() < 1e-4 * found[0].norm()


@pytest.mark.parametrize("activations", slow_but(["none", "full", "offload", "tiled"], "full"))
def test_a_run_whose_parts_run_at_once_resumes_bit_for_bit(config: Config, activations: str) -> None:
    """With dropout and noise too: each part draws from a generator of its own."""
    training = {"activation_checkpointing": activations, "neftune_noise_alpha": 5.0}
    changes = {"training": training, "adapter": {"dropout": 0.2}}
    whole = start_run(config("whole", **changes))
    whole.train(quiet)
    stopped = start_run(config("stopped", **changes))
    stopped.train(quiet, stop_after=2)
    resumed = resume_run(stopped.directory)
    assert all(len(pack.parts) == 2 for pack in resumed.state.loader.peek())
    resumed.train(quiet)
    assert same_end(whole, resumed)


def test_what_parts_compute_does_not_depend_on_which_thread_is_faster(config: Config) -> None:
    """One of the threads is held up in each layer, the first one and then the other; masks of dropout are the same."""
    run = started(config(adapter={"dropout": 0.2}))
    random, found = torch.get_rng_state(), []
    for slow in (0, 1):
        hooks = [
            layer.register_forward_pre_hook(lambda *_, slow=slow: time.sleep(0.02 * (worker_number() == slow)))
            for layer in decoder_layers(run.state.model)
        ]
        torch.set_rng_state(random)
        found.append(gradient(run))
        for hook in hooks:
            hook.remove()
    assert torch.equal(*found)


def test_gradients_that_autograd_adds_up_keep_to_one_thread(config: Config, tiny_models: Callable[[str], Path]) -> None:
    """Which of two threads would add first is chance: so it is with biases."""
    model = {"name": str(tiny_models("qwen2"))}
    workers = {
        bias: started(config(bias, adapter={"bias": bias}, model=model)).state.workers for bias in ("none", "lora_only")
    }
    assert workers == {"none": 2, "lora_only": 1}


def test_a_model_that_draws_random_numbers_is_refused_and_the_advice_helps(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(config())
    layer = type(decoder_layers(run.state.model)[0])
    plain = layer.forward

    def noisy(*arguments: Any, **named: Any) -> Any:
        torch.rand(1)
        return plain(*arguments, **named)

    monkeypatch.setattr(layer, "forward", noisy)
    adapters = run.state.groups[0].data.clone()
    with pytest.raises(TrainingError, match=r"draws random numbers.*training\.cpu_workers=1"):
        take_step(run.state)
    assert torch.equal(run.state.groups[0].data, adapters)
    assert (run.state.step, run.state.updates) == (0, 0)
    alone = started(config("alone", training={"cpu_workers": 1}))
    take_step(alone.state)
    assert alone.state.updates == 1


def test_memory_that_runs_out_in_one_part_ends_as_where_it_runs_out_in_the_whole(
    config: Config, scarcity: Scarcity
) -> None:
    """The other part has ended by then, and nothing of it is left in the gradients."""
    run = started(config())
    whole = max(pack.input_ids.numel() for pack in run.state.loader.peek())
    largest = max(part.tokens for pack in run.state.loader.peek() for part in pack.parts)
    scarcity.limit = lambda: largest - 1
    take_step(run.state)
    assert scarcity.failures == 1
    assert run.state.loader.micro_batch_tokens < whole
    scarcity.limit = None
    small = started(config("small"))
    small.state.loader.micro_batch_tokens = run.state.loader.micro_batch_tokens
    take_step(small.state)
    assert differences(everything(run.state), everything(small.state)) == []


def test_a_plan_counts_the_workspace_and_the_gradients_of_each_worker(config: Config, tiny_llama: Path) -> None:
    sizes = {}
    for workers in (1, 3):
        on_cpu = config(f"run-{workers}", model={"device": "cpu"}, training={"cpu_workers": workers})
        state, *_ = empty_run(ModelDirectory.open(tiny_llama), on_cpu, torch.float32, Policy("none"))
        kinds = persistent_tensors(state, on_cuda=False)
        unique = {kind: {id(tensor): tensor.nbytes for tensor in kinds[kind]} for kind in (WORKSPACE, GRADIENTS)}
        sizes[workers] = {kind: sum(found.values()) for kind, found in unique.items()}
    assert min(sizes[1].values()) > 0
    assert sizes[3] == {kind: 3 * size for kind, size in sizes[1].items()}
