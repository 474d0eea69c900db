"""Plan what a training step will need in memory, by running the step itself on fake tensors.

A fake tensor has a shape, a dtype and a lifetime, but no memory. The model is built from its config.json, with the
dtypes it will have on the card, and goes through the functions that a run calls, up to two calls of `train_step` on the
longest micro-batch. Every storage is followed, so the plan is right for whatever the step does: there is no second
model of memory to keep true. A plan is for a CUDA card, or, where the config says model.device=cpu, for host memory.

What attention takes depends on the card. The one here is asked; where there is none, the plan is for one of sm_80 and
the torch installed, as if that were built for CUDA, and says so.

Fake tensors do not show, and the plan adds, the CUDA context, cuBLAS' workspaces, and what operations use inside
(workspaces.py). Left out: loading the base, evaluation and generation, which need less than a step of training, and the
choice of settings.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from qlora_kernels.card import Card
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.modules.packed_attention import attention_taken
from qlora_trainer.planning.allocator import CachingAllocator, uses_expandable_segments
from qlora_trainer.planning.empty_run import empty_run, longest_row, planned_card, planned_dtype
from qlora_trainer.planning.live_bytes import once_more
from qlora_trainer.planning.other_ways import Parts, base_parameters, other_ways
from qlora_trainer.planning.step_memory import (
    ACTIVATIONS,
    ADAPTERS,
    BASE,
    DENSE,
    GRADIENTS,
    HEAD,
    HOST,
    INSIDE,
    PAGED,
    STATE,
    WORKSPACE,
    track_steps,
)
from qlora_trainer.planning.workspaces import cublas_bytes, cublas_setting
from qlora_trainer.training.memory.activations import Policy, choose_policy
from qlora_trainer.weights.model_directory import ModelDirectory

if TYPE_CHECKING:
    from qlora_trainer.planning.speed.choice import Speed

CUDA_CONTEXT_BYTES = 512 * 2**20
"""An allowance for what CUDA itself takes: 300 to 500 MiB on consumer cards. It differs by card, driver and the kernels
loaded: an H200 took 619 MiB, so a plan for such a card is about 107 MiB short."""

SLACK, CUBLAS, CONTEXT = "allocator slack", "cuBLAS workspaces (allowance)", "CUDA context (allowance)"


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Say what one setting needs on a card, or in host memory where it runs on a CPU, in bytes."""

    max_length: int  # tokens of the longest row
    micro_batch_tokens: int
    policy: Policy  # what backward keeps
    options: dict[str, str]  # the memory-efficient options, by key of the config
    components: dict[str, int]  # by name, at the fullest moment; they sum to `total`
    operation: str  # at which that moment comes
    allocated: int  # alive in torch's allocator at that moment, as torch.cuda.max_memory_allocated counts
    reserved: int  # by torch's allocator; on a CPU what is alive
    host: int  # bytes of host memory for what is offloaded and for an embedding kept there, in no component
    base_parameters: int  # numbers of the base, ties once, and the adapters'
    adapter_parameters: int
    card: str  # which is planned for, and whether it was assumed; empty for a CPU
    attention: str  # how documents are attended to there
    speed: "Speed | None" = dataclasses.field(default=None, compare=False)  # None: the time of a step was not estimated

    @property
    def total(self) -> int:
        """Sum up all that the card must hold.

        Returns:
            Bytes.
        """
        return sum(self.components.values())

    @property
    def elsewhere(self) -> dict[str, Parts]:
        """Compute what the same training would take in other ways (other_ways.py).

        Returns:
            Bytes by the way of training and part.
        """
        return other_ways(self.components, self.base_parameters)

    def to_json(self) -> dict[str, Any]:
        """Write the plan as JSON types; docs/reference/json.md lists the keys.

        Returns:
            Values by name.
        """
        return {
            **dataclasses.asdict(self),
            "activation_checkpointing": str(self.policy),
            "total": self.total,
            "elsewhere": self.elsewhere,
        }


@dataclasses.dataclass(frozen=True)
class Budget:
    """Hold the bytes that a run may take."""

    card: int  # or, for a run on a CPU, host memory
    host: int  # for what is offloaded to it
    reserve: int = 0  # bytes of the card that are left free as long as anything fits so

    def holds(self, plan: MemoryPlan) -> bool:
        """Return True if a plan fits.

        Args:
            plan: of a run.

        Returns:
            True if it does.
        """
        return plan.total <= self.card and plan.host <= self.host


def plan_memory(directory: ModelDirectory, config: RunConfig, layers: int | None = None) -> MemoryPlan:
    """Plan what `config` needs on a CUDA card, or of host memory where its model.device is cpu.

    A base that cannot be built or trained here is refused by a ModelError.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        layers: plan a base cut to so many layers.

    Returns:
        The plan.
    """
    card = planned_card(config)
    policy, dtype = choose_policy(config.training, torch.device("cuda" if card else "cpu")), planned_dtype(config, card)
    state, pack, fake = empty_run(directory, config, dtype, policy, layers, card)
    with fake:
        live, persistent = track_steps(state, pack, card, steps=1)
    adapters = sum(p.numel() for group in state.groups for p in group.parameters.values())
    kinds = dict(live.peak.by_kind)
    order = (BASE, HEAD, DENSE, ADAPTERS, GRADIENTS, STATE, PAGED, ACTIVATIONS, WORKSPACE, INSIDE)
    components = {name: kinds.pop(name, 0) for name in (*order, *([] if card else [HOST]))}
    assert not kinds, f"memory of unknown kinds {kinds}"
    reserved = allocated = live.peak.bytes - components[PAGED]
    cublas = 0
    if card:
        steps = [*live.trace, *once_more(live.trace, live.began)]  # the second meets what the first has left in pieces
        reserved = CachingAllocator(uses_expandable_segments()).play(steps, without=persistent[PAGED]).reserved
        cublas = cublas_bytes(card, cublas_setting(config.training.deterministic))
    components |= {SLACK: reserved - allocated, CUBLAS: cublas, CONTEXT: CUDA_CONTEXT_BYTES if card else 0}
    return MemoryPlan(
        max_length=longest_row(directory, config),
        micro_batch_tokens=pack.tokens,
        policy=policy,
        options=config.memory_options(),
        components=components,
        operation=live.peak.operation,
        allocated=allocated + cublas,
        reserved=reserved + cublas,
        host=live.host_peak,
        base_parameters=base_parameters(state.model),
        adapter_parameters=adapters,
        card=_card_in_words(card),
        attention=attention_taken(state.model, card, dtype, state.loader.packing),
    )


def _card_in_words(card: Card | None) -> str:
    if card is None:
        return ""
    major, minor = card.capability
    said = f"compute capability {major}.{minor}, {card.processors} multiprocessors"
    if torch.cuda.is_available():
        return said
    return f"assumed, as there is none here: {said}, torch {torch.__version__.split('+')[0]} built for CUDA"
