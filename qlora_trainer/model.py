"""The base model: from a directory of safetensors to a frozen NF4 model, or a dense or empty one of the same kind.

transformers reads the checkpoint and bitsandbytes quantises each linear weight as it arrives; every Linear4bit is then
taken over by an NF4Linear. Weights are quantised from the widest dtype the checkpoint holds, whatever the dtype of
computation, so the codes depend on the checkpoint alone, and a merge can make them again.

What the config asks to hold otherwise, the output head in 8 or 4 bits or the embedding in host memory, is made so after
loading: for a moment the device holds both densely.

Left out: loading that never gathers 16-bit weights, which transformers' own loader decides.
"""

import dataclasses
import gc
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.errors import InsufficientMemoryError, ModelError, QuantizationError, first_line
from qlora_trainer.fingerprint import BaseFingerprint, base_fingerprint
from qlora_trainer.host_embeddings import host_tensors, keep_embeddings_on_host
from qlora_trainer.model_source import read_config, refuse_multi_modal
from qlora_trainer.output_head import quantize_head
from qlora_trainer.progress import Progress, silent
from qlora_trainer.quantization import adopt_linear4bit, check_dequantization, check_four_bit_share
from qlora_trainer.quiet import quiet_transformers
from qlora_trainer.settings import ModelConfig
from qlora_trainer.tensor_io import TensorInfo, checkpoint_name, checkpoint_tensors, read_tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError)


@dataclasses.dataclass
class Base:
    """A frozen NF4 model in evaluation mode, and what identifies it."""

    model: Any  # transformers' PreTrainedModel
    directory: Path
    fingerprint: BaseFingerprint
    four_bit_share: float
    compute_dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        """Memory of the frozen weights, host's too: codes with their statistics, and what stayed dense, ties once."""
        frozen = [p for p in self.model.parameters() if not p.requires_grad]
        return sum(tensor.nbytes for tensor in [*frozen, *self.model.buffers(), *host_tensors(self.model)])


def choose_device(wanted: str) -> torch.device:
    """The device to train on; ModelError where CUDA is asked for and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is cuda, but torch sees no CUDA device here. `qlora doctor` says what it sees.")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def choose_compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """fp32 on a CPU, where it is faster than bf16; bf16 on CUDA, fp16 on cards older than Ampere."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def load_base_model(directory: Path, settings: ModelConfig, progress: Progress = silent) -> Base:
    """Load and quantise a model directory; everything frozen, every linear layer in NF4, the output head as asked for.

    Raises:
        ModelError: not a text model that transformers knows, weights missing, too little becomes 4-bit, names that a
            merge could not find again, or an embedding asked to the host that the output head needs.
        QuantizationError: weights that are not finite, or prequantised otherwise.
        InsufficientMemoryError: the 4-bit model would not fit.
    """
    device = choose_device(settings.device)
    compute_dtype = choose_compute_dtype(settings.compute_dtype, device)
    config = read_config(directory)
    refuse_multi_modal(config, directory)
    tensors = checkpoint_tensors(directory)
    _check_memory(tensors, config, compute_dtype, device)
    check_dequantization(device)
    prequantized = getattr(config, "quantization_config", None)
    if prequantized is None:
        _check_finite(tensors, progress)
    else:
        _check_prequantized(prequantized, directory)
    source_dtype = _widest_dtype(tensors)

    progress("loading the base", 0, None)
    model = _load_pretrained(
        directory,
        device,
        source_dtype,
        config=config,
        quantization_config=None if prequantized else _nf4(source_dtype),
    )
    if adopt_linear4bit(model) == 0:
        raise ModelError(f"{directory} has no linear layers that can be quantised; it cannot be trained here.")
    share = check_four_bit_share(model, settings.minimum_4bit_share)
    raw_config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    fingerprint = base_fingerprint(model, raw_config, source_dtype)  # before the cast: it is the same on any device
    model.requires_grad_(False)
    quantize_head(model, settings.output_head)  # from the checkpoint's dtype, as the linear layers
    compute_in(model, compute_dtype)
    if settings.embeddings == "host":
        keep_embeddings_on_host(model, device)
    model.eval()
    model.config.use_cache = False
    check_mergeable(directory, fingerprint.tensors, tensors)
    return Base(
        model=model,
        directory=directory,
        fingerprint=fingerprint,
        four_bit_share=share,
        compute_dtype=compute_dtype,
        device=device,
    )


def check_mergeable(directory: Path, paths: Iterable[str], tensors: Mapping[str, TensorInfo]) -> None:
    """ModelError where a 4-bit layer's weight has no tensor of its name on disk, before an adapter is trained on it."""
    lost = [path for path in paths if checkpoint_name(f"{path}.weight", tensors) is None]
    if lost:
        raise ModelError(
            f"{directory} stores its weights under other names than the model has ({len(lost)} of them, such as "
            f"{lost[0]}.weight): transformers renames or fuses them while loading. It could be trained, but its "
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
    model = _load_pretrained(directory, device, torch.float32)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def empty_model(directory: Path, config: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a directory's config, dense, in evaluation mode, frozen: parameters on meta, buffers for real.

    Args:
        config: take this one, such as the directory's own with fewer layers.
        dtype: of the parameters, and of buffers that follow them.

    Raises:
        ModelError: it cannot be made.
    """
    config = config or read_config(directory)
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise _loading_error(error, directory, torch.device("meta")) from error
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Cast what stayed dense (norms, embeddings, head, biases), a parameter at a time so that ties stay ties."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


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
        torch.accelerator.empty_host_cache()


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _load_pretrained(directory: Path, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """transformers' own loader, from safetensors alone; ModelError where it fails or leaves a weight random."""
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                device_map={"": device},
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except LOADING_ERRORS as error:
        raise _loading_error(error, directory, device) from error
    _check_complete(info, directory)
    return model


def _nf4(source_dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=source_dtype,
        bnb_4bit_quant_storage="uint8",
    )


def _loading_error(error: Exception, directory: Path, device: torch.device) -> ModelError | InsufficientMemoryError:
    if isinstance(error, torch.OutOfMemoryError):
        return InsufficientMemoryError(f"Loading {directory} ran out of memory on {device}: {first_line(error)}")
    return ModelError(f"{directory} cannot be loaded as a causal language model: {first_line(error)}")


def _check_prequantized(config: Any, directory: Path) -> None:
    """A prequantised checkpoint brings its own quantisation; take only the one we train on, and never override it."""
    found = config if isinstance(config, dict) else config.to_dict()
    method = str(found.get("quant_method"))
    if not method.endswith("bitsandbytes") or not found.get("load_in_4bit"):
        raise QuantizationError(
            f"{directory} is already quantised ({method}), in a way that cannot be trained here. Use the model's "
            "16-bit checkpoint, or one prequantised by bitsandbytes to NF4 with double quantisation."
        )


def _check_finite(tensors: dict[str, TensorInfo], progress: Progress) -> None:
    """One value that is not finite turns its whole tensor into NaN when block maxima are quantised too."""
    for done, (name, info) in enumerate(tensors.items()):
        progress("checking the weights", done, len(tensors))
        if info.dtype in FLOAT_DTYPES and not torch.isfinite(read_tensor(info)).all():
            raise QuantizationError(
                f"{name} in {info.file.name} holds values that are not finite. The checkpoint is damaged: "
                "fetch it again."
            )


def _widest_dtype(tensors: dict[str, TensorInfo]) -> torch.dtype:
    """The dtype that holds every float tensor of the checkpoint exactly."""
    found = {info.dtype for info in tensors.values() if info.dtype in FLOAT_DTYPES}
    return found.pop() if len(found) == 1 else torch.float32


def _check_memory(
    tensors: Mapping[str, TensorInfo], config: Any, compute_dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse early what cannot fit: 4.127 bits a linear weight, and the largest tensor once in its own dtype."""
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    needed, largest = 0.0, 0
    for name, info in tensors.items():
        is_embedding = info.shape[:1] == (vocab_size,)  # or the output head; they stay dense
        if ".weight." in name or not info.dtype.is_floating_point:
            needed += info.nbytes  # prequantised: packed codes and their statistics
        elif len(info.shape) == 2 and not is_embedding:
            needed += info.numel * 4.127 / 8
        else:
            needed += info.numel * compute_dtype.itemsize
        largest = max(largest, info.nbytes)
    needed += largest
    free = _free_memory(device)
    if needed > free:
        raise InsufficientMemoryError(
            f"The base takes about {needed / 2**30:.1f} GiB in 4-bit, and {device} has {free / 2**30:.1f} GiB free. "
            "Choose a smaller base, or free memory."
        )


def _check_complete(info: dict[str, Any], directory: Path) -> None:
    missing = sorted(info.get("missing_keys", ()))
    mismatched = [str(key) for key in info.get("mismatched_keys", ())]
    if missing or mismatched:
        raise ModelError(
            f"{directory} lacks {len(missing)} weight(s) that the model needs and has {len(mismatched)} of another "
            f"shape, such as {(missing + mismatched)[0]}. They would be random; fetch the checkpoint again."
        )
