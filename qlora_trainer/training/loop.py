"""The training loop: one optimizer step, and the loop that repeats it, logs, evaluates and saves.

A step is a set of rows: its loss is the summed loss of all their label tokens divided by their number, so the
gradient is the same in one micro-batch or many, packed or padded. Everything that a resumed run needs is in TrainState
and its state_dict; a run stopped and resumed does the same arithmetic as one that was not.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_trainer.adapters.inject import adapters_cast, trainable_parameters
from qlora_trainer.common.errors import InsufficientMemoryError, MicroBatchError, TrainingError, is_out_of_memory
from qlora_trainer.common.process_memory import peak_resident_bytes
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.loader import Examples, StepLoader
from qlora_trainer.data.batching.mixing import Mixture
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.data.preparation.prepare import ExampleSet
from qlora_trainer.model.forward import ForwardPlan, attention_for, examine_forward, loss_sum
from qlora_trainer.runs.checkpoint import restore_rng, rng_state
from qlora_trainer.training.activations import LEVELS, Policy, apply_policy
from qlora_trainer.training.evaluation import heldout_loss
from qlora_trainer.training.flat import FlatGroup, clip_, flatten_parameters, grad_norm
from qlora_trainer.training.optimizer import GradScale, Optimizer, build_optimizer, learning_rate
from qlora_trainer.training.patches import LeanReport, make_lean
from qlora_trainer.training.signals import stop_requests

MOST_SKIPPED_IN_A_ROW = 5
MOST_SKIPPED_WITH_SCALING = 16  # each halves the loss scale, which starts at 2^16
POLICY_SETTINGS = ("activations", "kept_layers", "offload_every")


@dataclasses.dataclass
class TrainState:
    """All that changes while training, and what the step needs to change it."""

    model: Any
    groups: list[FlatGroup]
    optimizer: Optimizer
    grad_scale: GradScale
    loader: StepLoader
    forward: ForwardPlan
    config: RunConfig
    total_steps: int
    policy: Policy  # in force on the model; with loader.micro_batch_tokens, what a micro-batch's memory depends on
    lean: LeanReport
    step: int = 0  # optimizer steps taken or skipped
    updates: int = 0  # optimizer steps taken; the schedule follows these
    skipped_in_a_row: int = 0  # steps without an update because the gradient was not finite
    notices: list[str] = dataclasses.field(default_factory=list)  # for the next record; not part of state_dict
    ran_out_of_memory: bool = False  # in this process, where torch's allocator may be broken since

    @property
    def device(self) -> torch.device:
        return self.groups[0].data.device

    def set_memory(self, micro_batch_tokens: int, policy: Policy) -> None:
        """Take other micro-batches and another policy from here on.

        Raises:
            ModelError: the model cannot train under the policy; nothing was changed.
        """
        if policy != self.policy:
            apply_policy(self.model, policy)
        self.loader.micro_batch_tokens, self.policy = micro_batch_tokens, policy

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Optimizer, loss scale, data cursor and random state: (tensors, JSON). Adapters are saved apart."""
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
        """Restore what `state_dict` gave; the random state last. CheckpointError where it belongs to another run."""
        prefix = "optimizer."
        optimizer_tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        self.optimizer.load_state_dict(optimizer_tensors, state["optimizer"])
        self.grad_scale.load_state_dict(state["grad_scale"])
        self.loader.load_state_dict(state["loader"])
        if "memory" in state:  # checkpoints of earlier versions have none
            self._load_memory(state["memory"])
        self.step = state["step"]
        self.updates = state["updates"]
        self.skipped_in_a_row = state["skipped_in_a_row"]
        restore_rng(tensors, state["random"])

    def _load_memory(self, saved: dict[str, Any]) -> None:
        """What was lowered when memory ran out stays lowered, but for a setting that the user has changed since."""
        limit, policy = self.loader.micro_batch_tokens, self.policy
        same_limit, same_policy = _unchanged(self.config, saved)
        if same_limit:
            limit = min(limit, saved["micro_batch_tokens"])
        if same_policy:
            before = Policy(**saved["policy"])
            policy = max(policy, before, key=lambda p: (LEVELS.index(p.level), -p.kept_layers))
        self.set_memory(limit, policy)


def build_state(
    model: Any,
    config: RunConfig,
    train: Examples,
    compute_dtype: torch.dtype,
    policy: Policy,
    mixture: Mixture | None = None,
) -> TrainState:
    """Adapters into flat groups, an optimizer over them, and the order of the rows. `model` has its adapters."""
    lean = make_lean(model)
    apply_policy(model, policy)
    forward = examine_forward(model, config.data.max_length)
    trainable = list(trainable_parameters(model))
    weights = [(name, p) for name, p in trainable if not name.endswith(".bias")]
    biases = [(name, p) for name, p in trainable if name.endswith(".bias")]
    groups = [flatten_parameters(weights, name="lora", weight_decay=config.optimizer.weight_decay)]
    if biases:
        groups.append(flatten_parameters(biases, name="bias", weight_decay=0.0))
    loader = StepLoader(
        train,
        batch_size=config.training.batch_size,
        micro_batch_tokens=micro_batch_tokens(config),
        packing=config.data.packing and forward.can_pack,
        seed=config.training.seed,
        mixture=mixture,
    )
    return TrainState(
        model=model,
        groups=groups,
        optimizer=build_optimizer(config.optimizer, groups),
        grad_scale=GradScale(enabled=compute_dtype == torch.float16),
        loader=loader,
        forward=forward,
        config=config,
        total_steps=config.training.max_steps or config.training.epochs * loader.steps_per_epoch,
        policy=policy,
        lean=lean,
    )


def micro_batch_tokens(config: RunConfig) -> int:
    """Most tokens of one forward pass; auto is the longest row allowed."""
    limit = config.training.micro_batch_tokens
    return config.data.max_length if limit == "auto" else limit


def memory_settings(config: RunConfig) -> dict[str, Any]:
    """The settings, as the user wrote them, that decide a micro-batch's memory."""
    return {name: getattr(config.training, name) for name in ("micro_batch_tokens", *POLICY_SETTINGS)}


def _unchanged(config: RunConfig, saved: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the micro-batch and the policy are as the user wrote them when a checkpoint was made."""
    then, now = saved["settings"], memory_settings(config)
    same_policy = all(then[name] == now[name] for name in POLICY_SETTINGS)
    return then["micro_batch_tokens"] == now["micro_batch_tokens"], same_policy


def as_lowered(config: RunConfig, saved: Mapping[str, Any]) -> RunConfig:
    """The config with what a checkpoint's run had lowered, but for a setting that the user has changed since.

    Where the policy is left open (auto), it stays so.
    """
    lowered: dict[str, object] = {}
    same_limit, same_policy = _unchanged(config, saved)
    if same_limit:
        lowered["micro_batch_tokens"] = saved["micro_batch_tokens"]
    if same_policy and config.training.activations != "auto":
        lowered |= Policy(**saved["policy"]).as_settings()
    return config.model_copy(update={"training": config.training.model_copy(update=lowered)})


def train_step(state: TrainState, packs: list[Pack]) -> dict[str, float]:
    """Forward and backward over the micro-batches of one optimizer step, then clip and update.

    A step whose gradient is not finite, or that has no label tokens, updates nothing and does not advance the schedule.

    Raises:
        MicroBatchError: memory ran out; all but the gradients and the random state is as before the step.
    """
    label_tokens = sum(pack.label_tokens for pack in packs)
    rate = learning_rate(state.config.optimizer, state.updates, state.total_steps)
    loss, norm = accumulate_gradients(state, packs)
    finite = bool(torch.isfinite(norm))
    if finite and label_tokens:
        clip_(state.groups, state.config.optimizer.max_grad_norm, norm)
        state.optimizer.step(rate)
        state.updates += 1
    state.grad_scale.update(found_non_finite=not finite)
    state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
    state.step += 1
    return {
        "loss": float(loss),
        "learning_rate": rate,
        "grad_norm": float(norm),
        "tokens": sum(pack.tokens for pack in packs),
        "label_tokens": label_tokens,
    }


def accumulate_gradients(state: TrainState, packs: list[Pack]) -> tuple[Tensor, Tensor]:
    """The loss of all packs together and the norm of its gradient, which is left in the groups: ((), ())."""
    label_tokens = sum(pack.label_tokens for pack in packs)
    state.optimizer.zero_grad()
    loss = torch.zeros((), device=state.device)
    with adapters_cast(state.model, state.groups, state.model.config.dtype):
        for pack in packs:
            if pack.label_tokens:
                # Summed over the step's label tokens, not averaged a micro-batch: they hold different numbers of them.
                loss += add_gradient(state, pack, label_tokens)
    state.grad_scale.unscale_(state.groups)
    return loss, grad_norm(state.groups)


def add_gradient(state: TrainState, pack: Pack, label_tokens: int) -> Tensor:
    """Forward and backward of one micro-batch; returns its part of the loss, ().

    Raises:
        MicroBatchError: memory ran out.
    """
    try:
        on_device = pack.to(state.device)
        with attention_for(state.model, on_device):
            part = loss_sum(state.model, on_device, state.forward.loss_path) / label_tokens
            state.grad_scale.scale(part).backward()
        return part.detach()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MicroBatchError(pack.row_lengths, error) from error


def train(
    state: TrainState,
    heldout: ExampleSet,
    *,
    take_step: Callable[[TrainState], dict[str, float]],
    on_step: Callable[[dict[str, Any]], None],
    save: Callable[[], object],
    stop_after: int | None = None,
) -> bool:
    """Train to the end, or until asked to stop; returns whether the end was reached.

    `on_step` gets each step's metrics; `save` writes a checkpoint. Either way a checkpoint of the last step is saved.

    Args:
        take_step: takes the loader's next step and moves its cursor on; recovery.take_step.
        stop_after: stop at this step, as an interruption would.

    Raises:
        TrainingError: the gradient was not finite in several steps in a row.
        InsufficientMemoryError: a step does not fit; a checkpoint of the one before is saved.
    """
    training = state.config.training
    state.model.train()
    with stop_requests() as stop_requested:
        while state.step < state.total_steps:
            started = time.perf_counter()
            try:
                metrics = take_step(state)
            except InsufficientMemoryError:
                save()
                raise
            seconds = time.perf_counter() - started
            check_finite(state, metrics)
            record = {
                "step": state.step,
                "epoch": state.step / state.loader.steps_per_epoch,
                **metrics,
                "tokens_per_second": metrics["tokens"] / seconds,
                "peak_memory_bytes": peak_memory_bytes(state.device),
                "micro_batch_tokens": state.loader.micro_batch_tokens,
                "activations": str(state.policy),
            }
            is_last = state.step == state.total_steps
            if state.notices:
                record["recovered"] = " ".join(state.notices)
                state.notices.clear()
            if len(heldout) and (state.step % training.evaluate_every == 0 or is_last):
                record["heldout_loss"] = measure_heldout(state, heldout)
            on_step(record)
            stopping = stop_requested() or state.step == stop_after
            if state.step % training.save_every == 0 or is_last or stopping:
                save()
            if stopping:
                return is_last
    return True


def measure_heldout(state: TrainState, heldout: ExampleSet) -> float:
    """Mean loss of the held-out label tokens, by the training forward without dropout."""
    return heldout_loss(state.model, heldout, state.forward, state.loader.micro_batch_tokens)


def check_finite(state: TrainState, metrics: dict[str, float]) -> None:
    """TrainingError after several steps in a row without a finite gradient."""
    most = MOST_SKIPPED_WITH_SCALING if state.grad_scale.enabled else MOST_SKIPPED_IN_A_ROW
    if state.skipped_in_a_row >= most:
        raise TrainingError(
            f"The gradient was not finite in {state.skipped_in_a_row} steps in a row (step {state.step}, loss "
            f"{metrics['loss']}); nothing was updated in them. Lower optimizer.learning_rate, or compute in bfloat16 "
            "or float32 (model.compute_dtype). The last checkpoint is sound."
        )


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of torch's allocator on CUDA; on a CPU the process's peak resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()
