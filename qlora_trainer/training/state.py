"""Hold everything that training changes in one object, and save and restore it.

A run stopped and resumed does the same arithmetic as one that was not, because whatever a step reads and changes
(adapters, optimizer, loss scale, random state, position in the data, memory settings) is in `TrainState.state_dict`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.adapters.inject import lora_layers
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.adapters.trainable import adapter_modules, leading_ids
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.loader import Examples, StepLoader, micro_batch_tokens
from qlora_trainer.data.batching.mixing import Mixture
from qlora_trainer.model.forward import ForwardPlan, examine_forward
from qlora_trainer.model.modules.embedding_noise import EmbeddingNoise
from qlora_trainer.training.determinism import repeats_side_by_side
from qlora_trainer.training.flat import FlatGroup, PreparedAdapters, group_trainable
from qlora_trainer.training.loss_scale import GradScale
from qlora_trainer.training.memory.activations import LEVELS, Policy, apply_policy
from qlora_trainer.training.optimizer import Optimizer, build_optimizer
from qlora_trainer.training.patches import PatchReport, patch_model
from qlora_trainer.training.rng import restore_rng, rng_state

Smaller = Callable[[Policy, int, list[int]], "tuple[Policy, int] | None"]
"""(policy, most tokens of a micro-batch, tokens of the rows that ran out of memory) -> what to go on with, by plan."""

POLICY_SETTINGS = ("activation_checkpointing", "uncheckpointed_layers", "offload_every_n_layers")


@dataclasses.dataclass
class TrainState:
    """Hold all that changes while training, and what the step needs to change it."""

    model: Any
    adapted: list[LoRALinear]
    groups: list[FlatGroup]
    prepared: PreparedAdapters
    optimizer: Optimizer
    grad_scale: GradScale
    loader: StepLoader
    forward: ForwardPlan
    noise: EmbeddingNoise
    config: RunConfig
    total_steps: int
    policy: Policy  # in force on the model; with loader.micro_batch_tokens, what a micro-batch's memory depends on
    patches: PatchReport
    workers: int = 1  # threads that run the model at once, each on a part of a micro-batch
    step: int = 0  # optimizer steps taken or skipped
    updates: int = 0  # optimizer steps taken; the schedule follows these
    skipped_in_a_row: int = 0  # steps without an update because the gradient was not finite
    smaller: Smaller | None = None  # where the run was planned; not part of state_dict, as the run gives it again
    warnings: list[str] = dataclasses.field(default_factory=list)  # for the next record; not part of state_dict
    ran_out_of_memory: bool = False  # in this process, where torch's allocator may be broken since

    @property
    def device(self) -> torch.device:
        """Return the device of the adapters.

        Returns:
            The device.
        """
        return self.groups[0].data.device

    def set_memory(self, micro_batch_tokens: int, policy: Policy) -> None:
        """Take other micro-batches and another policy from here on.

        Where the model cannot train under the policy, ModelError is raised and nothing was changed.

        Args:
            micro_batch_tokens: the most tokens of one forward pass.
            policy: what backward keeps.
        """
        if policy != self.policy:
            apply_policy(self.model, policy, self.workers)
        self.loader.micro_batch_tokens, self.policy = micro_batch_tokens, policy

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return optimizer, loss scale, data cursor and random state. Adapters are saved apart.

        Returns:
            Tensors by name, and JSON.
        """
        tensors, optimizer = self.optimizer.state_dict()
        random_tensors, random_json = rng_state()
        return {**{f"optimizer.{k}": v for k, v in tensors.items()}, **random_tensors}, {
            "step": self.step,
            "updates": self.updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "total_steps": self.total_steps,
            "optimizer": optimizer,
            "grad_scale": self.grad_scale.state_dict(),
            "loader": self.loader.state_dict(),
            "memory": {
                "micro_batch_tokens": self.loader.micro_batch_tokens,
                "policy": dataclasses.asdict(self.policy),
                "settings": memory_settings(self.config),
            },
            "random": random_json,
        }

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, the random state last.

        State of another run is refused by a CheckpointError.

        Args:
            tensors: of a checkpoint.
            state: its JSON.
        """
        prefix = "optimizer."
        optimizer_tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        self.optimizer.load_state_dict(optimizer_tensors, state["optimizer"])
        self.grad_scale.load_state_dict(state["grad_scale"])
        self.loader.load_state_dict(state["loader"])
        self._load_memory(state["memory"])
        self.step = state["step"]
        self.updates = state["updates"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        restore_rng(tensors, state["random"])

    def _load_memory(self, saved: dict[str, Any]) -> None:
        """Keep lowered what was lowered when memory ran out, but for a setting that the user has changed since."""
        limit, policy = self.loader.micro_batch_tokens, self.policy
        same_limit, same_policy = _unchanged(self.config, saved)
        if same_limit:
            limit = min(limit, saved["micro_batch_tokens"])
        if same_policy:
            before = Policy(**saved["policy"])
            policy = max(policy, before, key=lambda p: (LEVELS.index(p.level), -p.uncheckpointed_layers))
        self.set_memory(limit, policy)


def build_state(
    model: Any,
    config: RunConfig,
    train: Examples,
    compute_dtype: torch.dtype,
    policy: Policy,
    mixture: Mixture | None = None,
    workers: int = 1,
) -> TrainState:
    """Build a run's state before its first step: flat groups of adapters, their optimizer, the order of the rows.

    Args:
        model: with its adapters; it is patched, and the policy is set on it.
        config: of the run.
        train: the training rows.
        compute_dtype: fp16 has its loss scaled.
        policy: what backward keeps.
        mixture: of several sources, or None.
        workers: most threads that may run the model at once; one, where this model cannot be run so.

    Returns:
        The state.
    """
    patches = patch_model(model)
    workers = workers if repeats_side_by_side(model) else 1
    apply_policy(model, policy, workers)
    forward = examine_forward(model, config.data.max_length)
    adapted = list(lora_layers(model).values())
    groups = group_trainable(model, config.optimizer, workers)
    leading = leading_ids(model)
    assert train[0].input_ids[: len(leading)] == leading, "each row begins with the model's virtual tokens"
    loader = StepLoader(
        train,
        global_batch_size=config.training.global_batch_size,
        micro_batch_tokens=micro_batch_tokens(config),
        packing=config.data.packing and forward.can_pack,
        seed=config.training.seed,
        mixture=mixture,
        workers=workers,
    )
    return TrainState(
        model=model,
        adapted=adapted,
        groups=groups,
        prepared=PreparedAdapters(adapted, groups, model.config.dtype, adapter_modules(model).values()),
        optimizer=build_optimizer(config.optimizer, groups),
        grad_scale=GradScale(enabled=compute_dtype == torch.float16),
        loader=loader,
        forward=forward,
        noise=EmbeddingNoise(model, config.training.neftune_noise_alpha),
        config=config,
        total_steps=total_steps(config, loader),
        policy=policy,
        patches=patches,
        workers=workers,
    )


def total_steps(config: RunConfig, loader: StepLoader) -> int:
    """Count the optimizer steps of a run.

    Args:
        config: of the run.
        loader: of its rows.

    Returns:
        Steps.
    """
    return config.training.max_steps or config.training.epochs * loader.steps_per_epoch


def memory_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings, as the user wrote them, that decide a micro-batch's memory.

    Args:
        config: of the run.

    Returns:
        Values by the names of fields of TrainingConfig.
    """
    return {name: getattr(config.training, name) for name in ("micro_batch_tokens", *POLICY_SETTINGS)}


def _unchanged(config: RunConfig, saved: Mapping[str, Any]) -> tuple[bool, bool]:
    """Say if micro-batch and policy are as the user wrote them when a checkpoint was made: (bool, bool)."""
    then, now = saved["settings"], memory_settings(config)
    same_policy = all(then[name] == now[name] for name in POLICY_SETTINGS)
    return then["micro_batch_tokens"] == now["micro_batch_tokens"], same_policy


def as_saved(config: RunConfig, saved: Mapping[str, Any], longest_row: int) -> RunConfig:
    """Return the config with the choice in force in a checkpoint, but for a setting that the user has changed since.

    Args:
        config: of the run.
        saved: `memory` of the checkpoint's `TrainState.state_dict`.
        longest_row: tokens of the longest row that the run can meet.

    Returns:
        The config.
    """
    same_limit, same_policy = _unchanged(config, saved)
    if same_policy:
        config = with_policy(config, Policy(**saved["policy"]))
    return with_micro_batch(config, saved["micro_batch_tokens"], longest_row) if same_limit else config


def with_policy(config: RunConfig, policy: Policy) -> RunConfig:
    """Return the config with another policy of what backward keeps.

    Args:
        config: of the run.
        policy: instead of the config's.

    Returns:
        The config.
    """
    return config.replace({f"training.{name}": value for name, value in policy.as_settings().items()})


def with_micro_batch(config: RunConfig, tokens: int, longest_row: int) -> RunConfig:
    """Limit micro-batches to so many tokens, or to the longest row where that is longer, as it is a micro-batch alone.

    Args:
        config: of the run.
        tokens: of one micro-batch.
        longest_row: tokens of the longest row that the run can meet: data.max_length, or the model's positions.

    Returns:
        The config.
    """
    tokens = max(tokens, longest_row)
    longest = min(config.data.max_length, tokens)  # a config's micro-batch holds a row of data.max_length
    return config.replace({"training.micro_batch_tokens": tokens, "data.max_length": longest})
