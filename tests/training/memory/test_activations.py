"""What backward keeps never changes what is trained; each level keeps less on the device than the one before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow_but
from torch import Tensor

from qlora_kernels.host_copy import HostCopy
from qlora_trainer.common.errors import ModelError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.modules.decoder_layers import decoder_layers
from qlora_trainer.planning.empty_run import ASSUMED_CARD, longest_pack
from qlora_trainer.planning.step_memory import HOST, track_steps
from qlora_trainer.runs.start import start_run
from qlora_trainer.training import patches as patched_modules
from qlora_trainer.training.memory.activations import LEVELS, Policy, apply_policy
from qlora_trainer.training.memory.offload import KeptInput
from qlora_trainer.training.state import TrainState
from qlora_trainer.training.step import train_step
from qlora_trainer.weights.model_directory import ModelDirectory

Config = Callable[..., RunConfig]
FAMILIES = ["llama", "mistral", "qwen3", "smollm3", "gemma2", "gemma3", "phi3", "gpt2"]
EXACT = [
    Policy("full"),
    Policy("full", uncheckpointed_layers=2),
    Policy("offload"),
    Policy("offload", offload_every_n_layers=2),
    Policy("offload", offload_every_n_layers=3),
    Policy("offload", uncheckpointed_layers=1, offload_every_n_layers=2),
]


@pytest.fixture
def state(tiny_config: Config, deep_llama: Path) -> TrainState:
    """Five layers, dropout, two micro-batches a step, adapters that already do something."""
    config = tiny_config(
        model={"name": str(deep_llama)},
        adapter={"dropout": 0.2},
        training={"global_batch_size": 6, "micro_batch_tokens": 128, "activation_checkpointing": "none"},
    )
    state = start_run(config).state
    with torch.no_grad():
        for group in state.groups:
            group.data.copy_(torch.randn(group.data.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return state


def gradient(state: TrainState, policy: Policy) -> Tensor:
    """The gradient of the next step's rows under a policy, before the update; nothing of the state moves on."""
    apply_policy(state.model, policy)
    cursor, before = state.loader.state_dict(), state.groups[0].data.detach().clone()
    torch.manual_seed(7)
    state.model.train()
    train_step(state, state.loader.next())
    state.loader.load_state_dict(cursor)
    with torch.no_grad():
        state.groups[0].data.copy_(before)
    return state.groups[0].grad.clone()


@pytest.mark.parametrize("policy", slow_but(EXACT, EXACT[-1]), ids=str)
def test_every_policy_gives_the_same_gradient_bit_for_bit(state: TrainState, policy: Policy) -> None:
    kept = gradient(state, Policy("none"))
    assert kept.abs().max() > 0
    assert torch.equal(gradient(state, policy), kept)


@pytest.mark.parametrize("family", slow_but(FAMILIES, "gpt2", "phi3"))
@pytest.mark.parametrize("policy", [Policy("offload", offload_every_n_layers=2), Policy("tiled")], ids=str)
def test_every_family_has_the_same_gradient_under_every_policy(
    tiny_config: Config,
    tiny_models: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    policy: Policy,
) -> None:
    state = start_run(
        tiny_config(model={"name": str(tiny_models(family))}, training={"activation_checkpointing": "none"})
    ).state
    monkeypatch.setattr(patched_modules, "FEWEST_TILE_TOKENS", 1)
    kept, other = gradient(state, Policy("none")), gradient(state, policy)
    if policy.level == "tiled":  # matrix products of other sizes differ in last bits
        assert (kept - other).norm() <= 1e-5 * kept.norm()
    else:
        assert torch.equal(kept, other)


def test_inputs_that_are_no_layers_output_are_let_go_of_too(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does something between its layers: each input goes to the host by itself, and none stays."""
    kept = gradient(state, Policy("none"))
    copies: list[HostCopy] = []
    made = HostCopy.__init__

    def noting(copy: HostCopy, tensor: Tensor) -> None:
        made(copy, tensor)
        assert all(earlier._original is None for earlier in copies)
        copies.append(copy)

    monkeypatch.setattr(HostCopy, "__init__", noting)
    monkeypatch.setattr(KeptInput, "produced", lambda kept, hidden: False)
    assert torch.equal(gradient(state, Policy("offload", offload_every_n_layers=2)), kept)
    assert len(copies) >= 5


@pytest.mark.slow
def test_each_level_takes_less_of_the_device(tiny_config: Config, deep_llama: Path) -> None:
    config = tiny_config(model={"name": str(deep_llama)}, data={"max_length": 512})
    state = start_run(config).state
    pack = longest_pack(ModelDirectory.open(deep_llama), config, packing=True)
    peaks = []
    for level in LEVELS:
        apply_policy(state.model, Policy(level))
        peaks.append(track_steps(state, pack, ASSUMED_CARD)[0].peak.bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(LEVELS)


@pytest.mark.slow
def test_offloading_every_second_input_takes_half_the_host_memory(tiny_config: Config, deep_llama: Path) -> None:
    config = tiny_config(model={"name": str(deep_llama)}, data={"max_length": 512})
    state = start_run(config).state
    pack = longest_pack(ModelDirectory.open(deep_llama), config, packing=True)
    layer_input = 512 * 64 * 4
    for every, inputs in ((1, 5), (2, 3), (3, 2), (5, 1)):
        apply_policy(state.model, Policy("offload", offload_every_n_layers=every))
        live, _ = track_steps(state, pack, ASSUMED_CARD)
        assert live.host_peak == inputs * layer_input
        assert HOST not in live.peak.by_kind


def test_the_smaller_policies_come_one_by_one_to_an_end() -> None:
    policy: Policy | None = Policy("none")
    levels = []
    while policy is not None:
        levels.append(str(policy))
        policy = policy.with_less_memory()
    assert levels == ["none", "full", "offload", "tiled"]
    assert Policy("full", uncheckpointed_layers=3).with_less_memory() == Policy("full")
    assert Policy("offload", offload_every_n_layers=2).with_less_memory() == Policy("tiled", offload_every_n_layers=2)


def test_a_policy_takes_the_place_of_the_one_before_it(state: TrainState) -> None:
    layers = decoder_layers(state.model)
    originals = [type(layer).forward for layer in layers]
    apply_policy(state.model, Policy("tiled", uncheckpointed_layers=2))
    assert [("forward" in vars(layer)) for layer in layers] == [True, True, True, False, False]
    apply_policy(state.model, Policy("none"))
    assert [layer.forward.__func__ for layer in layers] == originals  # type: ignore[attr-defined]


def test_a_model_that_cannot_be_recomputed_is_refused(state: TrainState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(state.model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"training\.activation_checkpointing=none"):
        apply_policy(state.model, Policy("full"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_inputs_come_back_whole_on_a_gpu() -> None:
    tensors = [torch.randn(1 << 22, device="cuda") for _ in range(4)]
    expected = [tensor.clone() for tensor in tensors]
    copies: list[Any] = []
    for tensor in tensors:
        if copies:
            copies[-1].release()
        copies.append(HostCopy(tensor))
    copies[-1].release()
    del tensor
    tensors.clear()
    torch.randn(1 << 24, device="cuda")  # takes the memory that was given back
    for index in reversed(range(4)):
        if index:
            copies[index - 1].prefetch()
        assert torch.equal(copies[index].take(), expected[index])
