"""Take optimizer steps, real or fake, and count their memory by kind.

Left out: what is not seen in a step, such as the CUDA context (memory_plan.py).
"""

import torch
from torch import Tensor, nn

from qlora_kernels.card import Card
from qlora_kernels.host_copy import pinned_bytes
from qlora_trainer.data.batching.packing import Pack
from qlora_trainer.model.modules.cpu_embedding import tensors_on_cpu
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.planning.live_bytes import LiveBytes
from qlora_trainer.planning.workspaces import workspaces_on_cpu, workspaces_on_cuda
from qlora_trainer.training.memory.managed_memory import paging_refusal_here
from qlora_trainer.training.state import TrainState
from qlora_trainer.training.step import train_step

PAGED_ELEMENTS = 100_000  # bitsandbytes pages state of this size and more


BASE, HEAD, DENSE = "base in NF4", "embeddings and head", "norms, biases, other dense"
ADAPTERS, GRADIENTS, STATE, PAGED = "adapters", "gradients", "optimizer state", "optimizer state, paged (resident)"
WORKSPACE, ACTIVATIONS, INSIDE = "dequantization workspace", "activations and loss", "inside one operation (by formula)"
HOST = "host memory"


def track_steps(
    state: TrainState, pack: Pack, card: Card | None = None, steps: int = 2
) -> tuple[LiveBytes, dict[str, list[int]]]:
    """Take optimizer steps and count the last, real or fake.

    Every step takes the same memory, as optimizer state exists before the first.

    Args:
        state: of the run.
        pack: the one micro-batch of each step.
        card: count as this card would: large optimizer state pages, attention's backward needs space inside, and host
            memory is apart. None: as a CPU.
        steps: to take.

    Returns:
        What was seen, and the persistent blocks by kind.
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
    bounds = [pack.bounds_on_device] if card and pack.bounds_on_device is not None else []  # a CPU has no copy of them
    live.watch([pack.input_ids, pack.labels, pack.position_ids, *bounds, *state.prepared.casts], ACTIVATIONS)
    state.model.train()
    with live:
        for _ in range(steps):
            live.restart_peak()
            train_step(state, [pack])
    return live, persistent


def persistent_tensors(state: TrainState, on_cuda: bool) -> dict[str, list[Tensor]]:
    """List what lives from step to step, by kind. The adapters' parameters are views of their groups' buffers.

    Args:
        state: of the run.
        on_cuda: large optimizer state pages.

    Returns:
        Tensors by kind.
    """
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
        # First, as the embedding's module may hold a part of the adapter too.
        ADAPTERS: [group.data for group in state.groups],
        BASE: [buffer for layer in layers for buffer in layer.buffers()],
        WORKSPACE: [workspace for layer in layers for workspace in layer.workspaces],
        HOST: list(tensors_on_cpu(model)),
        HEAD: [t for m in embeddings if isinstance(m, nn.Module) for t in (*m.parameters(), *m.buffers())],
        GRADIENTS: [grad for group in state.groups for grad in group.grads],
        STATE: [moment for moment, is_paged in moments if not is_paged],
        PAGED: [moment for moment, is_paged in moments if is_paged],
        DENSE: [*model.parameters(), *model.buffers()],  # what was not named above
    }
