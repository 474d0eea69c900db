"""The base model: from a directory of safetensors to a frozen NF4 model, or a dense or empty one of the same kind.

The model is made empty and filled a tensor at a time (fill.py). Weights are quantised from the widest dtype
the checkpoint holds, whatever the dtype of computation, so the codes depend on the checkpoint alone, and a merge can
make them again.

Where transformers merges or splits tensors while loading, such as the experts of a mixture, its own loader reads the
checkpoint and bitsandbytes quantises; such a model holds for a moment densely what the config asks to hold otherwise.
"""

import dataclasses
import gc
import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM

from qlora_kernels.torch_features import release_pinned_memory
from qlora_trainer.common.errors import InsufficientMemoryError, ModelError, QuantizationError, memory_errors
from qlora_trainer.common.machine import host_memory
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.quiet import quiet_transformers
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.model.device import refuse_unusable
from qlora_trainer.model.fill import lay_out, load_tensors
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.model.load_plan import LoadPlan, plan_load, widest_dtype
from qlora_trainer.model.modules.cpu_embedding import (
    host_tensors,
    keep_embeddings_on_host,
    keeps_own_dtype,
    refuse_tied_embedding,
)
from qlora_trainer.model.modules.experts import split_experts
from qlora_trainer.model.modules.nf4_linear import NF4Linear, check_four_bit_share
from qlora_trainer.model.pretrained import LOADING_ERRORS, load_converted, load_pretrained, loading_error
from qlora_trainer.model.source import read_config, refuse_multi_modal
from qlora_trainer.weights.bitsandbytes_format import check_dequantization
from qlora_trainer.weights.model_directory import checkpoint_tensors


@dataclasses.dataclass
class Base:
    """A frozen NF4 model in evaluation mode, and what identifies it."""

    model: Any  # transformers' PreTrainedModel
    directory: Path
    fingerprint: BaseFingerprint
    four_bit_share: float
    compute_dtype: torch.dtype
    device: torch.device
    notices: list[str] = dataclasses.field(default_factory=list)  # on its checkpoint

    @property
    def bytes(self) -> int:
        """Memory of the frozen weights, host's too: codes with their statistics, and what stayed dense, ties once."""
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        return sum(tensor.nbytes for tensor in [*frozen, *self.model.buffers(), *host_tensors(self.model)])


def choose_device(wanted: str) -> torch.device:
    """The device to train on; ModelError where CUDA is asked for and absent, or the card cannot be used.

    A CUDA device has its index: without one it would mean the current card of each thread, and threads that read or
    hash begin with the first.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("CUDA is asked for, but torch sees no CUDA device here. `qlora doctor` says what it sees.")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    refuse_unusable(torch.cuda.current_device())
    return torch.device("cuda", torch.cuda.current_device())


def choose_compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`compute_dtype_of` on a device that is here."""
    is_asked = wanted == "auto" and device.type != "cpu"
    return compute_dtype_of(wanted, torch.cuda.get_device_capability(device) if is_asked else None)


def compute_dtype_of(wanted: str, capability: tuple[int, int] | None) -> torch.dtype:
    """fp32 on a CPU (None), where it is faster than bf16; bf16 on CUDA, fp16 on cards older than Ampere."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if capability is None:
        return torch.float32
    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def load_base_model(directory: Path, settings: ModelConfig, progress: Progress = silent) -> Base:
    """Load and quantise a model directory; everything frozen, every linear layer in NF4, the output head as asked for.

    Raises:
        ModelError: not a text model that transformers knows, weights missing, too little becomes 4-bit, names that a
            merge could not find again, or an embedding asked to the host that the output head needs.
        QuantizationError: weights that are not finite, or prequantised otherwise.
        InsufficientMemoryError: the 4-bit model does not fit.
    """
    device = choose_device(settings.device)
    compute_dtype = choose_compute_dtype(settings.compute_dtype, device)
    plan, model = plan_base(directory)
    lay_out(model, plan, settings.output_head)
    share = check_four_bit_share(model, settings.minimum_4bit_share)
    if share == 0.0:
        raise ModelError(f"{directory} has no linear layers that can be quantised; it cannot be trained here.")
    on_host = settings.embeddings == "host"
    if on_host:
        refuse_tied_embedding(model)
    compute_in(model, compute_dtype, embedding_on_host=on_host)
    check_mergeable(plan, [path for path, module in model.named_modules() if isinstance(module, NF4Linear)])
    _check_memory(model, plan, device, embedding_on_host=on_host)
    check_dequantization(device)

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if plan.converted:
        model, fingerprint = load_converted(plan, config, settings.output_head, device)
        compute_in(model, compute_dtype, embedding_on_host=on_host)
    else:
        with memory_errors(f"Loading {directory} on {device}"):
            fingerprint = load_tensors(model, plan, config, device=device, embedding_on_host=on_host, progress=progress)
    if compute_dtype != plan.source_dtype:
        recompute_buffers(model, directory, compute_dtype)
    give_back_memory()  # what the tensors came through
    if on_host:
        keep_embeddings_on_host(model, device, compute_dtype)
    return Base(
        model=model,
        directory=directory,
        fingerprint=fingerprint,
        four_bit_share=share,
        compute_dtype=compute_dtype,
        device=device,
        notices=plan.notices,
    )


def plan_base(directory: Path) -> tuple[LoadPlan, Any]:
    """What becomes of each tensor of a model directory, and its model, dense and on meta.

    Raises:
        ModelError: not a text model that transformers knows, or weights are missing.
        QuantizationError: it is prequantised in a way that cannot be trained.
    """
    config = read_config(directory)
    refuse_multi_modal(config, directory)
    if getattr(config, "transformers_weights", None):
        raise ModelError(f"{directory / 'config.json'} names its own weight file, which is not read here.")
    tensors = checkpoint_tensors(directory)
    if getattr(config, "quantization_config", None) is not None:
        _check_prequantized(config.quantization_config, directory)
        del config.quantization_config  # the model is made dense, and filled by ourselves
    source_dtype = widest_dtype(tensors)
    model = empty_model(directory, config, source_dtype, tensors)
    return plan_load(model, directory, tensors, source_dtype), model


def check_mergeable(plan: LoadPlan, paths: Iterable[str]) -> None:
    """ModelError where a 4-bit layer's weight has no tensor of its own on disk, before an adapter is trained on it."""
    if lost := sorted({*paths} - {*plan.four_bit.values()}):
        raise ModelError(
            f"{plan.directory} has no tensor of its own for {len(lost)} weight(s) of the model, such as "
            f"{lost[0]}.weight: transformers merges or splits tensors while loading. It could be trained, but its "
            "adapter could not be merged here. Choose another architecture."
        )


def load_dense_model(directory: Path, device: torch.device) -> Any:
    """A model directory in fp32 by plain transformers, in evaluation mode, frozen; on the CPU where it fits no device.

    Raises:
        ModelError: it cannot be loaded, or weights are missing.
        InsufficientMemoryError: it does not fit in memory at 4 bytes a weight.
    """
    needed = 4 * sum(math.prod(info.shape) for info in checkpoint_tensors(directory).values())
    device = device_with_room(needed, device, f"{directory} in fp32")
    model = load_pretrained(directory, device, torch.float32)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def empty_model(
    directory: Path, config: Any = None, dtype: torch.dtype = torch.float32, stored: Collection[str] = ()
) -> Any:
    """The model of a directory's config, dense, in evaluation mode, frozen: parameters on meta, buffers for real.

    Experts that transformers fuses are linear layers of their own in it (model/modules/experts.py).

    Args:
        config: take this one, such as the directory's own with fewer layers.
        dtype: of the parameters, and of buffers that follow them.
        stored: the names of the checkpoint's tensors, where they are known; experts that are fused there stay so.

    Raises:
        ModelError: it cannot be made.
    """
    config = config or read_config(directory)
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise loading_error(error, directory) from error
    split_experts(model, stored)
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def compute_in(model: Any, dtype: torch.dtype, *, embedding_on_host: bool = False) -> None:
    """Cast what stayed dense (norms, embeddings, head, biases), a parameter at a time so that ties stay ties.

    An embedding that goes to host memory keeps its dtype where it may.
    """
    kept = model.get_input_embeddings().weight if embedding_on_host and keeps_own_dtype(model) else None
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter is not kept:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def recompute_buffers(model: Any, directory: Path, dtype: torch.dtype, config: Any = None) -> None:
    """Give the model the buffers that no checkpoint holds as they are where its directory is loaded in `dtype`.

    Some are made in that dtype, and differ with it: the root of 192, by which Gemma 3 scales its embedding, is 13.856
    in fp32 and 13.875 in bf16.

    Args:
        config: the model's, where it is not that of the directory.
    """
    config = config or read_config(directory)
    vars(config).pop("quantization_config", None)
    for path, module in empty_model(directory, config, dtype).named_modules():
        for name in module._non_persistent_buffers_set:
            if (buffer := module._buffers[name]) is not None:
                buffers = model.get_submodule(path)._buffers
                buffers[name] = buffer.to(buffers[name].device)


def device_with_room(needed: int, device: torch.device, what: str) -> torch.device:
    """`device`, or the CPU where a GPU has fewer bytes free than needed; InsufficientMemoryError where neither has."""
    if device.type == "cuda" and needed > _free_memory(device):
        device = torch.device("cpu")
    free = _free_memory(device)
    if needed > free:
        raise InsufficientMemoryError(
            f"{what} takes {needed / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} GiB free."
        )
    return device


def give_back_memory() -> None:
    """Free what was just dropped: cycles, and what torch keeps of GPU and pinned memory, which would count as taken."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a copy to the host or back may still be reading or writing what is dropped here
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        release_pinned_memory()


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory().available


def _check_prequantized(config: Any, directory: Path) -> None:
    """A prequantised checkpoint brings its own quantisation; take only the one we train on, and never override it."""
    found = config if isinstance(config, dict) else config.to_dict()
    method = str(found.get("quant_method"))
    if not method.endswith("bitsandbytes") or not found.get("load_in_4bit"):
        raise QuantizationError(
            f"{directory} is already quantised ({method}), in a way that cannot be trained here. Use the model's "
            "16-bit checkpoint, or one prequantised by bitsandbytes to NF4 with double quantisation."
        )


def _check_memory(model: Any, plan: LoadPlan, device: torch.device, *, embedding_on_host: bool) -> None:
    """Refuse early what cannot fit: the model as laid out, and what passes by while it is filled."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    if embedding_on_host and device.type == "cuda":
        embedding = model.get_input_embeddings().weight
        sizes |= {name: 0 for name, parameter in model.named_parameters() if parameter is embedding}
    needed = sum(sizes.values()) + sum(buffer.nbytes for buffer in model.buffers()) + plan.passing_bytes
    free = _free_memory(device)
    if needed > free:
        raise InsufficientMemoryError(
            f"The base takes about {needed / 2**30:.1f} GiB in 4-bit, and {device} has {free / 2**30:.1f} GiB free. "
            "Choose a smaller base, or free memory."
        )
