"""Count what a step of peft + bitsandbytes needs on a card, as ours is counted: on fake tensors, by the same tracker.

The peer is made of the real libraries: transformers' model with torch's attention, its linear layers but the head as
bitsandbytes' Linear4bit (NF4, double quantization, bf16 compute), peft's LoRA in fp32 on all of them, non-reentrant
gradient checkpointing over every layer, the loss that transformers computes from labels, gradients clipped, and paged
AdamW with 32-bit state. By default the libraries are used in the way that takes least memory: the base stays in bf16.
`prepared=True` is what peft's documentation shows first, `prepare_model_for_kbit_training`, which casts embeddings,
head and norms to fp32, under bf16 autocast as transformers' Trainer sets it.

Where a library's kernel allocates inside, a formula says how much; it counts for the peer only where that is sure.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_trainer.planning.allocator import CachingAllocator, uses_expandable_segments
from qlora_trainer.planning.empty_run import card_here
from qlora_trainer.planning.fake_tensors import FakeRun
from qlora_trainer.planning.live_bytes import LiveBytes, once_more
from qlora_trainer.planning.memory_plan import CUDA_CONTEXT_BYTES
from qlora_trainer.planning.step_memory import PAGED, PAGED_ELEMENTS
from qlora_trainer.planning.workspaces import cublas_bytes, cublas_setting, workspaces_on_cuda
from qlora_trainer.weights.bitsandbytes_internals import make_state

BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256  # bitsandbytes' defaults
FUSED_TOKENS = 1536  # up to which bitsandbytes may multiply without dequantizing (its backends/cuda/ops.py)


@dataclass(frozen=True)
class PeerPlan:
    """Hold what the peer needs, in bytes; allowances as in MemoryPlan, but not in `allocated` and `reserved`."""

    tokens: int
    operation: str  # at which most is alive
    allocated: int
    reserved: int
    paged: int

    @property
    def resident(self) -> int:
        """Sum up what is reserved, and the paged state counted as resident."""
        return self.reserved + self.paged

    @property
    def total(self) -> int:
        return self.resident + allowances()


def allowances() -> int:
    """Sum up the allowances for the CUDA context and cuBLAS, in bytes; ours are the same."""
    return CUDA_CONTEXT_BYTES + cublas_bytes(card_here(), cublas_setting(deterministic=False))


def plan_peer(
    directory: Path, tokens: int, rank: int, *, layers: int | None = None, prepared: bool = False
) -> PeerPlan:
    """Plan an optimizer step on one row, played twice to the allocator.

    Args:
        directory: holds the base's config.json.
        tokens: of the row.
        rank: of the adapters on all linear layers.
        layers: a base cut to so many layers.
        prepared: with peft's prepare_model_for_kbit_training and autocast.
    """
    model = model_without_weights(directory, rank, layers, prepared)
    live = LiveBytes(workspaces=workspaces_on_cuda(card_here()) | WORKSPACES)
    paged: list[int] = []
    with FakeRun():
        live.watch(fill(model), "model")
        input_ids = torch.ones((1, tokens), dtype=torch.int64)
        live.watch([input_ids], "model")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = bitsandbytes.optim.PagedAdamW32bit(trained)
        make_state(optimizer)
        for parameter in trained:
            pages = parameter.numel() >= PAGED_ELEMENTS
            moments = [optimizer.state[parameter][key] for key in ("state1", "state2")]
            blocks = live.watch(moments, PAGED if pages else "state")
            paged += blocks if pages else []
        with live:
            live.restart_peak()
            with _autocast() if prepared else nullcontext():
                loss = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            del loss
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    steps = [*live.trace, *once_more(live.trace, live.began)]  # as ours: every step takes the same
    paged_bytes = live.peak.by_kind.get(PAGED, 0)
    return PeerPlan(
        tokens=tokens,
        operation=live.peak.operation,
        allocated=live.peak.bytes - paged_bytes,
        reserved=CachingAllocator(uses_expandable_segments()).play(steps, without=paged).reserved,
        paged=paged_bytes,
    )


def model_without_weights(directory: Path, rank: int, layers: int | None, prepared: bool) -> Any:
    config = AutoConfig.from_pretrained(directory)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                model.set_submodule(path, _linear4bit(module))
        model.is_loaded_in_4bit = True
        model.config.use_cache = False
        checkpointing = {"use_reentrant": False}
        if prepared:
            model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
        else:
            model.requires_grad_(False)
            model.gradient_checkpointing_enable(checkpointing)
        settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, settings).train()


def _linear4bit(linear: nn.Linear) -> nn.Module:
    return bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
    ).to(torch.bfloat16)  # its bias; nothing is quantized on the meta device


def fill(model: nn.Module) -> list[Tensor]:
    """Give a model without weights fake ones; returns all of them. Call under fake tensors."""
    made: dict[int, Tensor] = {}
    filled: list[Tensor] = []
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, old in [*parameters, *buffers]:
            if id(old) not in made:  # ties stay ties
                if isinstance(module, bitsandbytes.nn.Linear4bit) and name == "weight":
                    new, statistics = _packed_weight(module.out_features, module.in_features)
                    module.quant_state = new.quant_state
                    filled += statistics
                else:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                made[id(old)] = new
                filled.append(new)
            setattr(module, name, made[id(old)])
    return filled


def _packed_weight(out_features: int, in_features: int) -> tuple[Any, list[Tensor]]:
    """Make a quantized weight as bitsandbytes holds it, and its statistics; a Params4bit cannot hold a fake tensor."""
    blocks = -(-out_features * in_features // BLOCK_SIZE)
    code = torch.empty(16)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // NESTED_BLOCK_SIZE)),
        code=torch.empty(256),
        blocksize=NESTED_BLOCK_SIZE,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size((out_features, in_features)),
        code=code,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=torch.bfloat16,
        offset=torch.empty(()),
        state2=nested,
    )
    packed: Any = nn.Parameter(
        torch.empty((out_features * in_features // 2, 1), dtype=torch.uint8), requires_grad=False
    )
    packed.quant_state = state
    return packed, [state.absmax, state.offset, code, nested.absmax, nested.code]


def dequantized_bytes(arguments: tuple[Any, ...]) -> int:
    """Count the weight that bitsandbytes' 4-bit product makes whole in the input's dtype, but for few tokens."""
    x, shape = arguments[0], arguments[2]
    return math.prod(shape) * x.element_size() if x.numel() // x.shape[-1] > FUSED_TOKENS else 0


WORKSPACES = {torch.ops.bitsandbytes.gemm_4bit.default: dequantized_bytes}


@contextmanager
def _autocast() -> Iterator[None]:
    """Set bf16 autocast on the CPU, which the fake tensors are on; peft asks whether it is on for CUDA."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)
