"""The memory plan: what a training step will need, found by running the step itself on fake tensors.

A fake tensor has a shape, a dtype and a lifetime, but no memory. The model is built from its config.json, with the
dtypes it will have on the card, and goes through the functions that a run calls, up to two calls of `train_step` on
the longest micro-batch. Every storage is followed, so the plan is right for whatever the step does: there is no second
model of memory to keep true. A plan is for a CUDA card, or, where the config says model.device=cpu, for host memory.

Not seen by fake tensors, and so stated: the CUDA context, cuBLAS' workspace, and what flash attention's backward uses
inside. Left out: loading the base, evaluation and generation, which need less than a step of training, and the choice
of settings.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qlora_kernels import rms_norm, rotary
from qlora_kernels.blockwise_attention import workspace_bytes
from qlora_kernels.host_copy import pinned_bytes
from qlora_kernels.varlen_attention import flash_backward_bytes
from qlora_trainer.activations import Policy, choose_policy
from qlora_trainer.adapters.inject import add_adapters
from qlora_trainer.attention import attends_apart, refusals_as_model_error
from qlora_trainer.caching_allocator import CachingAllocator, uses_expandable_segments
from qlora_trainer.data.packing import Example, Pack, make_packs
from qlora_trainer.errors import ModelError
from qlora_trainer.fake_run import FakeRun
from qlora_trainer.host_embeddings import host_tensors
from qlora_trainer.managed_memory import paging_refusal_here
from qlora_trainer.memory_tracking import LiveBytes, Workspace, once_more
from qlora_trainer.model_source import max_positions
from qlora_trainer.output_head import QuantizedHead
from qlora_trainer.quantization import NF4Linear
from qlora_trainer.settings import RunConfig
from qlora_trainer.skeleton import build_skeleton, fill_skeleton, make_empty
from qlora_trainer.training import TrainState, build_state, micro_batch_tokens, train_step

CUDA_CONTEXT_BYTES = 512 * 2**20  # an allowance: 300 to 500 MiB, by card and driver
CUBLAS_WORKSPACE_BYTES = 32 * 2**20  # an allowance: torch's default on Hopper; older cards take 8 MiB
PAGED_ELEMENTS = 100_000  # bitsandbytes pages state of this size and more

BASE, HEAD, DENSE = "base in NF4", "embeddings and head", "norms, biases, other dense"
ADAPTERS, GRADIENTS, STATE, PAGED = "adapters", "gradients", "optimizer state", "optimizer state, paged (resident)"
WORKSPACE, ACTIVATIONS, INSIDE = "dequantisation workspace", "activations and loss", "inside one operation (by formula)"
HOST = "host memory"
SLACK, CUBLAS, CONTEXT = "allocator slack", "cuBLAS workspace (allowance)", "CUDA context (allowance)"


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
            "activations": str(self.policy),
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
    on_cuda = config.model.device != "cpu"
    policy = choose_policy(config.training, torch.device("cuda" if on_cuda else "cpu"))
    state, pack, fake = empty_run(directory, config, compute_dtype(config), policy, layers)
    with fake:
        live, persistent = track_steps(state, pack, on_cuda, steps=1)
    base = sum(p.numel() for p in (*state.model.parameters(), *host_tensors(state.model)) if not p.requires_grad)
    base += sum(m.out_features * m.in_features for m in state.model.modules() if isinstance(m, NF4Linear))
    base += sum(math.prod(m.shape) for m in state.model.modules() if isinstance(m, QuantizedHead))
    adapters = sum(p.numel() for group in state.groups for p in group.parameters.values())
    kinds = dict(live.peak.by_kind)
    order = (BASE, HEAD, DENSE, ADAPTERS, GRADIENTS, STATE, PAGED, ACTIVATIONS, WORKSPACE, INSIDE)
    components = {name: kinds.pop(name, 0) for name in (*order, *([] if on_cuda else [HOST]))}
    assert not kinds, f"memory of unknown kinds {kinds}"
    reserved = allocated = live.peak.bytes - components[PAGED]
    if on_cuda:
        steps = [*live.trace, *once_more(live.trace, live.began)]  # the second meets what the first has left in pieces
        reserved = CachingAllocator(uses_expandable_segments()).play(steps, without=persistent[PAGED]).reserved
    allowances = (CUBLAS_WORKSPACE_BYTES, CUDA_CONTEXT_BYTES) if on_cuda else (0, 0)
    components |= {SLACK: reserved - allocated, CUBLAS: allowances[0], CONTEXT: allowances[1]}
    return MemoryPlan(
        max_length=longest_row(directory, config),
        micro_batch_tokens=pack.tokens,
        policy=policy,
        components=components,
        operation=live.peak.operation,
        allocated=allocated,
        reserved=reserved,
        host=live.host_peak,
        base_parameters=base,
        adapter_parameters=adapters,
    )


def compute_dtype(config: RunConfig) -> torch.dtype:
    """Of a card from Ampere on; older ones compute in float16, which takes the same memory."""
    wanted = config.model.compute_dtype
    if wanted == "auto":
        return torch.float32 if config.model.device == "cpu" else torch.bfloat16
    return getattr(torch, wanted)


def longest_row(directory: Path, config: RunConfig) -> int:
    """The longest row that the run can meet, in tokens."""
    return min(config.data.max_length, max_positions(directory) or config.data.max_length)


def empty_run(
    directory: Path, config: RunConfig, dtype: torch.dtype, policy: Policy, layers: int | None = None
) -> tuple[TrainState, Pack, FakeRun]:
    """A run before its first step and its longest micro-batch, by the functions that a run calls, on fake tensors."""
    fake = FakeRun()
    model = build_skeleton(directory, layers, dtype)
    with fake:
        fill_skeleton(model, config.model, dtype)
        add_adapters(model, config.adapter, config.training.seed)
        state = build_state(model, config, [Example([1], [1])] * config.training.batch_size, dtype, policy)
    state.total_steps = max(state.total_steps, 2)  # the plan takes two
    pack = longest_pack(directory, config, config.data.packing and state.forward.can_pack)
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


def longest_pack(directory: Path, config: RunConfig, packing: bool) -> Pack:
    """The largest micro-batch: rows of full length, every token learned."""
    length = longest_row(directory, config)
    limit = min(max(micro_batch_tokens(config), length), length * config.training.batch_size)
    rest = limit % length if packing else 0  # padded rows all take as much as the longest
    lengths = [length] * (limit // length) + [rest] * (rest > 0)
    (pack,) = make_packs([Example([1] * n, [1] * n) for n in lengths], limit, packing)
    return dataclasses.replace(pack, labels=pack.input_ids.clone(), label_tokens=pack.tokens)


def _as_fake(pack: Pack, mode: FakeTensorMode) -> Pack:
    """Without memory, but for the documents' bounds, which the host reads."""
    ids, labels, positions = (mode.from_tensor(tensor) for tensor in (pack.input_ids, pack.labels, pack.position_ids))
    return dataclasses.replace(pack, input_ids=ids, labels=labels, position_ids=positions)


def track_steps(state: TrainState, pack: Pack, on_cuda: bool, steps: int = 2) -> tuple[LiveBytes, dict[str, list[int]]]:
    """Take optimizer steps and count the last, real or fake: (what was seen, persistent blocks by kind).

    Every step takes the same memory, as optimizer state exists before the first.

    Args:
        on_cuda: count as a card would: large optimizer state pages, attention's backward needs room inside, and host
            memory is apart.
    """
    live = LiveBytes(
        kinds={torch.ops.qlora_kernels.copy_to_host.default: HOST},
        workspaces=WORKSPACES_ON_CUDA if on_cuda else WORKSPACES_ON_CPU,
        other=ACTIVATIONS,
        inside=INSIDE,
        host=HOST if on_cuda else "",  # to a CPU's step, host memory is memory as any other
        host_rounding=pinned_bytes,
    )
    persistent = {kind: live.watch(tensors, kind) for kind, tensors in persistent_tensors(state, on_cuda).items()}
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


def fused_backward_bytes(arguments: tuple[Any, ...]) -> int:
    """What attention's backward uses inside on CUDA."""
    return flash_backward_bytes(arguments[1], arguments[2])


def adamw_32bit_bytes(arguments: tuple[Any, ...]) -> int:
    """bitsandbytes' update on a CPU, written in torch, has three fp32 tensors of its own at once; on CUDA none."""
    parameter = arguments[2]
    return (3 + (parameter.dtype != torch.float32)) * 4 * parameter.numel()


def adamw_8bit_bytes(arguments: tuple[Any, ...]) -> int:
    """Likewise; both moments in fp32 come to them."""
    return adamw_32bit_bytes(arguments) + 2 * 4 * arguments[2].numel()


def blockwise_bytes(arguments: tuple[Any, ...], on_cuda: bool = True) -> int:
    """What attention by blocks of queries uses inside its forward."""
    query, key, _, _, _, *settings = arguments
    if on_cuda and _is_fused_on_cuda(query, *settings):
        return 0
    return workspace_bytes(query, key, *settings, backward=False, on_cuda=on_cuda)


def blockwise_backward_bytes(arguments: tuple[Any, ...], on_cuda: bool = True) -> int:
    """Likewise inside its backward."""
    _, query, key, _, _, _, *settings = arguments
    if on_cuda and _is_fused_on_cuda(query, *settings):
        return fused_backward_bytes(arguments)
    return workspace_bytes(query, key, *settings, backward=True, on_cuda=on_cuda)


def rms_norm_bytes(arguments: tuple[Any, ...], *, backward: bool) -> int:
    """What a norm in plain torch uses inside; on CUDA one kernel keeps it in registers."""
    return rms_norm.workspace_bytes(arguments[1 if backward else 0], backward=backward)


def _is_fused_on_cuda(query: Tensor, window: int | None, softcap: float | None, dropout: float) -> bool:
    """Flash attention on a card takes a window or dropout; a plan's tensors, which are on the CPU, go by blocks."""
    is_windowed = window is not None and query.shape[2] > window
    return softcap is None and not (dropout and is_windowed)


WORKSPACES_ON_CUDA: dict[torch._ops.OpOverload, Workspace] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: fused_backward_bytes,
    torch.ops.qlora_kernels.blockwise_attention.default: blockwise_bytes,
    torch.ops.qlora_kernels.blockwise_attention_backward.default: blockwise_backward_bytes,
}
WORKSPACES_ON_CPU: dict[torch._ops.OpOverload, Workspace] = {
    torch.ops.qlora_kernels.blockwise_attention.default: functools.partial(blockwise_bytes, on_cuda=False),
    torch.ops.qlora_kernels.blockwise_attention_backward.default: functools.partial(
        blockwise_backward_bytes, on_cuda=False
    ),
    torch.ops.qlora_kernels.rms_norm.default: functools.partial(rms_norm_bytes, backward=False),
    torch.ops.qlora_kernels.rms_norm_backward.default: functools.partial(rms_norm_bytes, backward=True),
    torch.ops.qlora_kernels.rotate.default: lambda arguments: rotary.workspace_bytes(arguments[0]),
    torch.ops.bitsandbytes.optimizer_update_32bit.default: adamw_32bit_bytes,
    torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default: adamw_8bit_bytes,
}
