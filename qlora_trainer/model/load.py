"""Load the base model: from a directory of safetensors to a frozen NF4 model, or to an empty or dense one.

The model is made empty and filled a tensor at a time (fill.py). Weights are quantized from the widest dtype
the checkpoint holds, whatever the dtype of computation, so the codes depend on the checkpoint alone, and a merge can
make them again.

Where transformers merges or splits tensors while loading, such as the experts of a mixture, its own loader reads the
checkpoint and bitsandbytes quantizes; during loading, such a model also holds densely what the config asks to hold
otherwise.
"""

import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.common.errors import InsufficientMemoryError, ModelError, QuantizationError, memory_errors
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import counted, gib
from qlora_trainer.config.schema import ModelConfig
from qlora_trainer.model.device import (
    choose_compute_dtype,
    choose_device,
    device_with_memory,
    free_memory,
    give_back_memory,
)
from qlora_trainer.model.empty import compute_in, empty_model, recompute_buffers, refuse_multi_modal
from qlora_trainer.model.fill import lay_out, load_tensors
from qlora_trainer.model.fingerprint import BaseFingerprint
from qlora_trainer.model.known_bases import KnownBases
from qlora_trainer.model.load_plan import LoadPlan, plan_load, widest_dtype
from qlora_trainer.model.modules.cpu_embedding import (
    keep_embeddings_on_cpu,
    refuse_tied_embedding,
    tensors_on_cpu,
)
from qlora_trainer.model.modules.nf4_linear import NF4Linear, check_quantized_fraction
from qlora_trainer.model.pretrained import load_converted, load_pretrained
from qlora_trainer.weights.bitsandbytes_format import check_dequantization
from qlora_trainer.weights.model_directory import ModelDirectory


@dataclasses.dataclass
class Base:
    """Hold a frozen NF4 model in evaluation mode, and what identifies it."""

    model: Any  # transformers' PreTrainedModel
    directory: ModelDirectory
    fingerprint: BaseFingerprint
    quantized_fraction: float
    compute_dtype: torch.dtype
    device: torch.device
    warnings: list[str] = dataclasses.field(default_factory=list)  # on its checkpoint

    @property
    def bytes(self) -> int:
        """Count the bytes of the frozen weights, on the host too: codes, statistics, and what is dense; ties once."""
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        return sum(tensor.nbytes for tensor in [*frozen, *self.model.buffers(), *tensors_on_cpu(self.model)])


def load_base_model(
    directory: ModelDirectory,
    settings: ModelConfig,
    cache_dir: Path,
    progress: Progress = silent,
) -> Base:
    """Load and quantize a model directory; everything frozen, every linear layer in NF4, the LM head as asked for.

    Weights that are not finite, or prequantized otherwise than to NF4, raise QuantizationError; a 4-bit model that does
    not fit raises InsufficientMemoryError.

    Args:
        directory: of the model.
        settings: the config's section `model`.
        cache_dir: the user's; records of what the base's files were found to hold are kept there.
        progress: is called as tensors are read.

    Returns:
        The base.

    Raises:
        ModelError: not a text model that transformers knows, weights missing, too little becomes 4-bit, names that a
            merge could not find again, or an embedding asked to the host that the LM head needs.
    """
    device = choose_device(settings.device)
    compute_dtype = choose_compute_dtype(settings.compute_dtype, device)
    plan, model = plan_base(directory)
    lay_out(model, plan, settings.lm_head)
    share = check_quantized_fraction(model, settings.min_quantized_fraction)
    if share == 0.0:
        raise ModelError(f"{directory} has no linear layers that can be quantized; it cannot be trained here.")
    on_host = settings.embeddings == "cpu"
    if on_host:
        refuse_tied_embedding(model)
    compute_in(model, compute_dtype, embedding_on_cpu=on_host)
    check_mergeable(plan, [path for path, module in model.named_modules() if isinstance(module, NF4Linear)])
    _check_memory(model, plan, device, embedding_on_cpu=on_host)
    check_dequantization(device)

    if plan.converted:
        model, fingerprint = load_converted(plan, settings.lm_head, device)
        compute_in(model, compute_dtype, embedding_on_cpu=on_host)
    else:
        with memory_errors(f"Loading {directory} on {device}"):
            fingerprint = _load_known(model, plan, settings, device, cache_dir, progress)
    if compute_dtype != plan.source_dtype:
        recompute_buffers(model, directory, compute_dtype)
    if device.type == "cuda":
        give_back_memory()  # the buffers that the tensors were read into
    if on_host:
        keep_embeddings_on_cpu(model, device, compute_dtype)
    return Base(
        model=model,
        directory=directory,
        fingerprint=fingerprint,
        quantized_fraction=share,
        compute_dtype=compute_dtype,
        device=device,
        warnings=plan.warnings,
    )


def _load_known(
    model: Any,
    plan: LoadPlan,
    settings: ModelConfig,
    device: torch.device,
    cache_dir: Path,
    progress: Progress,
) -> BaseFingerprint:
    """Fill the model; its files are hashed where that was not done before, or where model.verify_bytes asks for it."""
    bases = KnownBases(cache_dir)
    known = None if settings.verify_bytes else bases.find(plan)
    began = time.time_ns()
    on_host = settings.embeddings == "cpu"
    base = load_tensors(model, plan, device=device, embedding_on_cpu=on_host, known=known, progress=progress)
    if known is None:
        bases.refuse_other_bytes(plan, base)
        bases.keep(plan, base, began)
    return base.fingerprint


def plan_base(directory: ModelDirectory) -> tuple[LoadPlan, Any]:
    """Plan what becomes of each tensor of a model directory, and make its model, dense and on meta.

    A model that is no text model transformers knows, or lacks weights, raises ModelError; one that is prequantized in a
    way that cannot be trained raises QuantizationError.

    Args:
        directory: of the model.

    Returns:
        The plan, and the model in the checkpoint's widest dtype.
    """
    config = directory.config()
    refuse_multi_modal(config, directory)
    if getattr(config, "quantization_config", None) is not None:
        _check_prequantized(config.quantization_config, directory)
        del config.quantization_config  # the model is made dense, and filled by ourselves
    source_dtype = widest_dtype(directory)
    model = empty_model(directory, config, source_dtype, directory.tensors)
    return plan_load(model, directory, source_dtype), model


def config_corrections(directory: ModelDirectory) -> dict[str, Any]:
    """Find the keys of config.json that the weights contradict, so that whoever loads a copy reads the weights.

    vLLM and transformers 4 put the embedding in the place of the LM head where the config ties them, whatever the
    checkpoint has; transformers 5 goes by the checkpoint, as this trainer does.

    Args:
        directory: of the model.

    Returns:
        The keys, with the values to write; empty where there are none.
    """
    config = directory.config()
    ties = [getattr(each, "tie_word_embeddings", False) for each in (config, config.get_text_config())]
    vocabulary = directory.facts.vocabulary
    tall = [info for info in directory.tensors.values() if info.shape[:1] == (vocabulary,)]
    if not any(ties) or len(tall) < 2:  # known without a model
        return {}
    return plan_base(directory)[0].config_corrections


def check_mergeable(plan: LoadPlan, paths: Iterable[str]) -> None:
    """Refuse, before an adapter is trained, 4-bit layers whose weights have no tensors of their own on disk.

    Args:
        plan: of the base.
        paths: of the 4-bit layers.

    Raises:
        ModelError: a layer has none.
    """
    if lost := sorted({*paths} - {*plan.four_bit.values()}):
        raise ModelError(
            f"{plan.directory} has no tensor of its own for {counted(len(lost), 'weight')} of the model, such as "
            f"{lost[0]}.weight: transformers merges or splits tensors while loading. It could be trained, but its "
            "adapter could not be merged here. Choose another architecture."
        )


def load_dense_model(directory: ModelDirectory, device: torch.device) -> Any:
    """Load a model directory in fp32 by plain transformers, in evaluation mode and frozen.

    A model that cannot be loaded, or lacks weights, raises ModelError; one that does not fit in memory at 4 bytes a
    weight raises InsufficientMemoryError.

    Args:
        directory: of the model.
        device: to load on; the CPU is taken where this is a GPU without enough free memory.

    Returns:
        The model.
    """
    needed = 4 * sum(math.prod(info.shape) for info in directory.tensors.values())
    device = device_with_memory(needed, device, f"{directory} in fp32")
    model = load_pretrained(directory, device, torch.float32)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def _check_prequantized(config: Any, directory: ModelDirectory) -> None:
    """Refuse a quantized checkpoint except in the one format that is trained here; none is quantized a second time."""
    found = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
    method = str(found.get("quant_method"))
    if not method.endswith("bitsandbytes") or not found.get("load_in_4bit"):
        raise QuantizationError(
            f"{directory} is already quantized ({method}), in a way that cannot be trained here. Use the model's "
            "16-bit checkpoint, or one prequantized by bitsandbytes to NF4 with double quantization."
        )


def _check_memory(model: Any, plan: LoadPlan, device: torch.device, *, embedding_on_cpu: bool) -> None:
    """Refuse early what cannot fit: the model as laid out, and the tensors in transit while it is filled."""
    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    if embedding_on_cpu and device.type == "cuda":
        embedding = model.get_input_embeddings().weight
        sizes |= {name: 0 for name, parameter in model.named_parameters() if parameter is embedding}
    needed = sum(sizes.values()) + sum(buffer.nbytes for buffer in model.buffers()) + plan.passing_bytes
    free = free_memory(device)
    if needed > free:
        raise InsufficientMemoryError(
            f"The base takes about {gib(needed)} in 4-bit, and {device} has {gib(free)} free. "
            "Choose a smaller base, or free memory."
        )
