"""The memory plan: what a training step will need, found by running the step itself on fake tensors.

A fake tensor has a shape, a dtype and a lifetime, but no memory. The model is built from its config.json, with the
dtypes it will have on the card, and goes through the functions that a run calls, up to two calls of `train_step` on
the longest micro-batch. Every storage is followed, so the plan is right for whatever the step does: there is no second
model of memory to keep true. A plan is for a CUDA card, or, where the config says model.device=cpu, for host memory.

What attention takes depends on the card. The one here is asked; where there is none, the plan is for one of sm_80 and
the torch installed, as if that were built for CUDA, and says so.

Not seen by fake tensors, and so stated: the CUDA context, cuBLAS' workspaces, and what operations use inside
(workspaces.py). Left out: loading the base, evaluation and generation, which need less than a step of training, and the
choice of settings.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.card import Card
from qlora_kernels.host_copy import pinned_bytes
from qlora_kernels.registry import kernel_choice
from qlora_kernels.torch_internals import FakeTensorMode
from qlora_kernels.varlen_attention import flash_backward_bytes
from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.common.errors import ConfigError, ModelError
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.data.batching.packing import Example, Pack, make_packs
from qlora_trainer.model.device import compute_dtype_of
from qlora_trainer.model.facts import max_positions
from qlora_trainer.model.modules.cpu_embedding import host_tensors
from qlora_trainer.model.modules.lm_head import QuantizedHead
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.modules.packed_attention import (
    attends_apart,
    attention_taken,
    head_sizes,
    refusals_as_model_error,
)
from qlora_trainer.planning.allocator import CachingAllocator, uses_expandable_segments
from qlora_trainer.planning.fake_tensors import FakeRun
from qlora_trainer.planning.live_bytes import LiveBytes, once_more
from qlora_trainer.planning.skeleton import build_skeleton, fill_skeleton, make_empty
from qlora_trainer.planning.workspaces import cublas_bytes, cublas_setting, workspaces_on_cpu, workspaces_on_cuda
from qlora_trainer.training.activations import Policy, choose_policy
from qlora_trainer.training.managed_memory import paging_refusal_here
from qlora_trainer.training.state import TrainState, build_state, micro_batch_tokens
from qlora_trainer.training.step import train_step

CUDA_CONTEXT_BYTES = 512 * 2**20
"""An allowance for what CUDA itself takes: 300 to 500 MiB on consumer cards. It differs by card, driver and the kernels
loaded: an H200 took 619 MiB, so a plan for such a card is about 107 MiB short."""

ASSUMED_CARD = Card((8, 0), processors=128)  # where there is none: the first that bf16 is fast on, an RTX 4090's size
PAGED_ELEMENTS = 100_000  # bitsandbytes pages state of this size and more

BASE, HEAD, DENSE = "base in NF4", "embeddings and head", "norms, biases, other dense"
ADAPTERS, GRADIENTS, STATE, PAGED = "adapters", "gradients", "optimizer state", "optimizer state, paged (resident)"
WORKSPACE, ACTIVATIONS, INSIDE = "dequantization workspace", "activations and loss", "inside one operation (by formula)"
HOST = "host memory"
SLACK, CUBLAS, CONTEXT = "allocator slack", "cuBLAS workspaces (allowance)", "CUDA context (allowance)"


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What one setting needs on a card, or in host memory where it runs on a CPU, in bytes."""

    max_length: int  # tokens of the longest row
    micro_batch_tokens: int
    policy: Policy  # what backward keeps
    components: dict[str, int]  # by name, at the fullest moment; they sum to `total`
    operation: str  # at which that moment comes
    allocated: int  # alive in torch's allocator at that moment, as torch.cuda.max_memory_allocated counts
    reserved: int  # by torch's allocator; on a CPU what is alive
    host: int  # bytes of host memory for what is offloaded and for an embedding kept there, in no component
    base_parameters: int  # numbers of the base, ties once, and the adapters'
    adapter_parameters: int
    card: str  # which is planned for, and whether it was assumed; empty for a CPU
    attention: str  # how documents are attended to there

    @property
    def total(self) -> int:
        """All that the card must hold."""
        return sum(self.components.values())

    @property
    def elsewhere(self) -> dict[str, int]:
        """The same training otherwise, by formula, activations as here: 2 bytes a base weight for 16-bit LoRA; for full
        fine-tuning 16 (weight and gradient in 16 bits; fp32 weight and two moments), without adapters."""
        adapters = sum(self.components.get(name, 0) for name in (ADAPTERS, GRADIENTS, STATE, PAGED))
        base = sum(self.components.get(name, 0) for name in (BASE, HEAD, DENSE))
        rest = self.total - base - adapters - self.components.get(WORKSPACE, 0)
        return {
            "16-bit LoRA": 2 * self.base_parameters + adapters + rest,
            "full fine-tuning": 16 * self.base_parameters + rest,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "activation_checkpointing": str(self.policy),
            "total": self.total,
            "elsewhere": self.elsewhere,
        }


def plan_memory(directory: Path, config: RunConfig, layers: int | None = None) -> MemoryPlan:
    """What `config` needs on a CUDA card, or of host memory where its model.device is cpu.

    Args:
        directory: holds the base's config.json.
        layers: plan a base cut to so many layers.

    Raises:
        ModelError: the base cannot be built or trained here.
    """
    card = planned_card(config)
    policy, dtype = choose_policy(config.training, torch.device("cuda" if card else "cpu")), planned_dtype(config, card)
    state, pack, fake = empty_run(directory, config, dtype, policy, layers, card)
    with fake:
        live, persistent = track_steps(state, pack, card, steps=1)
    base = sum(p.numel() for p in (*state.model.parameters(), *host_tensors(state.model)) if not p.requires_grad)
    base += sum(m.out_features * m.in_features for m in state.model.modules() if isinstance(m, NF4Linear))
    base += sum(math.prod(m.shape) for m in state.model.modules() if isinstance(m, QuantizedHead))
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
        components=components,
        operation=live.peak.operation,
        allocated=allocated + cublas,
        reserved=reserved + cublas,
        host=live.host_peak,
        base_parameters=base,
        adapter_parameters=adapters,
        card=_card_in_words(card),
        attention=attention_taken(state.model, card, dtype, state.loader.packing),
    )


def planned_card(config: RunConfig) -> Card | None:
    """The card that a plan is for: the one here, else an assumed one; None for a plan of host memory.

    Raises:
        ConfigError: QLORA_KERNELS holds an unknown word.
    """
    try:
        kernel_choice()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.model.device == "cpu":
        return None
    return dataclasses.replace(card_here(), is_deterministic=config.training.deterministic)


def card_here() -> Card:
    """The CUDA card that a run would use, or the one that is assumed where there is none."""
    return Card.of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else ASSUMED_CARD


def _card_in_words(card: Card | None) -> str:
    if card is None:
        return ""
    major, minor = card.capability
    said = f"compute capability {major}.{minor}, {card.processors} multiprocessors"
    if torch.cuda.is_available():
        return said
    return f"assumed, as there is none here: {said}, torch {torch.__version__.split('+')[0]} built for CUDA"


def planned_dtype(config: RunConfig, card: Card | None) -> torch.dtype:
    """What a run computes in on the card, or for None on a CPU."""
    return compute_dtype_of(config.model.compute_dtype, card.capability if card else None)


def longest_row(directory: Path, config: RunConfig) -> int:
    """The longest row that the run can meet, in tokens."""
    return min(config.data.max_length, max_positions(directory) or config.data.max_length)


def empty_run(
    directory: Path,
    config: RunConfig,
    dtype: torch.dtype,
    policy: Policy,
    layers: int | None = None,
    card: Card | None = None,
) -> tuple[TrainState, Pack, FakeRun]:
    """A run before its first step and its longest micro-batch, by the functions that a run calls, on fake tensors.

    Args:
        card: within the FakeRun, attention goes as on this card; None: as on a CPU.
    """
    fake = FakeRun(card)
    model = build_skeleton(directory, layers, dtype)
    with fake:
        fill_skeleton(model, config.model, dtype)
        add_adapters(model, config.adapter, config.training.seed)
        state = build_state(model, config, [Example([1], [1])] * config.training.global_batch_size, dtype, policy)
    state.total_steps = max(state.total_steps, 2)  # the plan takes two
    documents = _most_costly_documents(head_sizes(model.config.get_text_config()), directory, config, dtype, card)
    pack = longest_pack(directory, config, state.loader.packing, documents)
    return state, _as_fake(pack, fake.mode), fake


def keeps_apart(directory: Path) -> bool | None:
    """Whether the attention of a base keeps packed rows apart, as far as fake tensors show: that it goes through our
    function, not that it computes the same, which a run tries on the real model. None: the base cannot be tried."""
    try:
        model = build_skeleton(directory)
        with FakeRun(), refusals_as_model_error(model):
            make_empty(model)
            return attends_apart(model, model.config.get_text_config().vocab_size)
    except ModelError:
        return None  # a run says why


def longest_pack(directory: Path, config: RunConfig, packing: bool, documents: int = 2) -> Pack:
    """The largest micro-batch: rows of full length, every token trained.

    Args:
        documents: where rows are packed and a step has so many, the last row leaves a token to each of the others.
            By default to one, as attention takes more for two documents than for one, and no more for three.
    """
    length = longest_row(directory, config)
    limit = min(max(micro_batch_tokens(config), length), length * config.training.global_batch_size)
    lengths = [length] * (limit // length)
    if packing:  # padded rows all take as much as the longest
        lengths += [limit % length] * (limit % length > 0)
        others = max(min(documents, config.training.global_batch_size) - len(lengths), 0)
        others = min(others, lengths[-1] - 1)
        lengths[-1] -= others
        lengths += [1] * others
    (pack,) = make_packs([Example([1] * n, [1] * n) for n in lengths], limit, packing)
    return dataclasses.replace(pack, labels=pack.input_ids.clone(), label_tokens=pack.tokens)


def _as_fake(pack: Pack, mode: FakeTensorMode) -> Pack:
    """Without memory, but for the documents' bounds, which the host reads."""
    ids, labels, positions = (mode.from_tensor(tensor) for tensor in (pack.input_ids, pack.labels, pack.position_ids))
    return dataclasses.replace(pack, input_ids=ids, labels=labels, position_ids=positions)


def _most_costly_documents(
    heads: tuple[int, int, int] | None,  # as head_sizes gives them
    directory: Path,
    config: RunConfig,
    dtype: torch.dtype,
    card: Card | None,
) -> int:
    """In how many documents the longest pack takes most memory, of those it can have: at most a step's rows.

    Flash attention's backward pads each, and where it is deterministic has fewer sums the more there are.
    """
    if card is None or heads is None or card.flash_refusal(dtype, heads[2]) is not None:
        return 2
    query_heads, key_heads, head_dim = heads
    length, processors = longest_row(directory, config), card.processors_summed_over(dtype)
    tokens = min(max(micro_batch_tokens(config), length), length * config.training.global_batch_size)

    def inside(documents: int) -> int:
        return flash_backward_bytes(tokens, query_heads, key_heads, head_dim, dtype.itemsize, documents, processors)

    return max(-(-tokens // length), config.training.global_batch_size, key=inside)


def track_steps(
    state: TrainState, pack: Pack, card: Card | None = None, steps: int = 2
) -> tuple[LiveBytes, dict[str, list[int]]]:
    """Take optimizer steps and count the last, real or fake: (what was seen, persistent blocks by kind).

    Every step takes the same memory, as optimizer state exists before the first.

    Args:
        card: count as this card would: large optimizer state pages, attention's backward needs space inside, and host
            memory is apart. None: as a CPU.
    """
    live = LiveBytes(
        kinds={torch.ops.qlora_kernels.copy_to_host.default: HOST},
        workspaces=workspaces_on_cuda(card) if card else workspaces_on_cpu(),
        other=ACTIVATIONS,
        inside=INSIDE,
        host=HOST if card else "",  # to a CPU's step, host memory is memory as any other
        host_rounding=pinned_bytes,
    )
    persistent = {
        kind: live.watch(tensors, kind) for kind, tensors in persistent_tensors(state, card is not None).items()
    }
    live.watch([pack.input_ids, pack.labels, pack.position_ids], ACTIVATIONS)
    state.model.train()
    with live:
        for _ in range(steps):
            live.restart_peak()
            train_step(state, [pack])
    return live, persistent


def persistent_tensors(state: TrainState, on_cuda: bool) -> dict[str, list[Tensor]]:
    """What lives from step to step, by kind. The adapters' parameters are views of their groups' buffers."""
    model = state.model
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    pages = on_cuda and state.optimizer.is_paged and not paging_refusal_here()
    moments = [
        (value, pages and key in ("state1", "state2") and value.numel() >= PAGED_ELEMENTS)
        for values in state.optimizer.optimizer.state.values()
        for key, value in values.items()
        if isinstance(value, Tensor)
    ]
    return {
        BASE: [buffer for layer in layers for buffer in layer.buffers()],
        WORKSPACE: [layer.workspace for layer in layers if layer.workspace is not None],
        HOST: list(host_tensors(model)),
        HEAD: [t for m in embeddings if isinstance(m, nn.Module) for t in (*m.parameters(), *m.buffers())],
        ADAPTERS: [group.data for group in state.groups],
        GRADIENTS: [group.grad for group in state.groups],
        STATE: [moment for moment, is_paged in moments if not is_paged],
        PAGED: [moment for moment, is_paged in moments if is_paged],
        DENSE: [*model.parameters(), *model.buffers()],  # what was not named above
    }
