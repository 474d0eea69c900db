"""Load by transformers' own loader: dense models, and bases whose tensors it merges or splits while loading.

Left out: plain and prequantized bases, which are loaded a tensor at a time (fill.py).
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_trainer.common.boundary import library_boundary
from qlora_trainer.common.errors import memory_errors
from qlora_trainer.common.quiet import quiet_transformers
from qlora_trainer.model.fill import check_finite
from qlora_trainer.model.fingerprint import BaseFingerprint, base_fingerprint
from qlora_trainer.model.load_plan import LoadPlan, refuse_incomplete
from qlora_trainer.model.modules.lm_head import HeadKind, quantize_head
from qlora_trainer.model.modules.nf4_linear import adopt_linear4bit
from qlora_trainer.model.modules.row_positions import forget_longer_rows
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.nf4 import load_bitsandbytes


def load_pretrained(directory: ModelDirectory, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """Load a model by transformers, from safetensors alone; ModelError if it cannot, or a weight would stay random.

    Args:
        directory: the model.
        device: to load on.
        dtype: of the weights.
        **options: more arguments of `from_pretrained`.

    Returns:
        The model.
    """
    config = directory.config()
    with (
        memory_errors(f"Loading {directory} on {device}"),
        quiet_transformers(),
        library_boundary(not_loadable(directory)),
    ):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory.path,
            config=config,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    forget_longer_rows(model)
    refuse_incomplete(directory, sorted(info.get("missing_keys", ())), [*map(str, info.get("mismatched_keys", ()))])
    return model


def load_converted(plan: LoadPlan, lm_head: HeadKind, device: torch.device) -> tuple[Any, BaseFingerprint]:
    """Load a base whose tensors are merged or split while loading, in the checkpoint's dtype where it is not 4-bit.

    Args:
        plan: of the base.
        lm_head: the format of the LM head.
        device: to load on.

    Returns:
        The model, frozen and in evaluation mode, and its fingerprint.
    """
    if not plan.directory.quant_states:
        for name in plan.used:  # one such value turns its whole tensor into NaN where block maxima are quantized too
            check_finite(plan.directory.tensors[name], plan.directory.read(name))
    load_bitsandbytes()  # before transformers does, which would let it download kernels
    quantization = None if plan.directory.quant_states else nf4_config(plan.source_dtype)
    # On CUDA bitsandbytes divides approximately: that changes no code of bf16 weights, and now and then one of others.
    is_exact = plan.directory.quant_states or plan.source_dtype == torch.bfloat16
    place = device if is_exact else torch.device("cpu")
    model = load_pretrained(plan.directory, place, plan.source_dtype, quantization_config=quantization)
    adopt_linear4bit(model)
    model.to(device)
    fingerprint = base_fingerprint(model, plan.directory.config_json, plan.source_dtype)
    model.requires_grad_(False)
    quantize_head(model, lm_head)
    model.config.use_cache = False
    return model.eval(), fingerprint


def nf4_config(compute_dtype: torch.dtype, kept_dense: list[str] | None = None) -> BitsAndBytesConfig:
    """Describe our 4-bit weights to transformers.

    Args:
        compute_dtype: dtype of computation.
        kept_dense: paths of the linear layers that are not 4-bit; by default transformers finds the LM head.

    Returns:
        The quantization config.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage="uint8",
        llm_int8_skip_modules=kept_dense,
    )


def not_loadable(directory: ModelDirectory) -> str:
    """Begin the message on a model that transformers cannot make or load.

    Args:
        directory: the model.

    Returns:
        The beginning of a sentence.
    """
    return f"{directory} cannot be loaded as a causal language model"
