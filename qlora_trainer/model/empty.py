"""Make a transformers model without weights: parameters on the meta device, buffers with their values.

Left out: filling it (fill.py).
"""

from collections.abc import Collection
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from qlora_trainer.common.boundary import library_boundary
from qlora_trainer.common.errors import ModelError
from qlora_trainer.common.quiet import quiet_transformers
from qlora_trainer.common.transformers_internals import prepares_more_than_text
from qlora_trainer.model.modules.cpu_embedding import keeps_own_dtype
from qlora_trainer.model.modules.experts import split_experts
from qlora_trainer.model.modules.row_positions import forget_longer_rows
from qlora_trainer.model.pretrained import not_loadable
from qlora_trainer.weights.model_config import make_model_config
from qlora_trainer.weights.model_directory import ModelDirectory


def empty_model(
    directory: ModelDirectory, config: Any = None, dtype: torch.dtype = torch.float32, stored: Collection[str] = ()
) -> Any:
    """Make the dense model of a directory's config, frozen and in evaluation mode.

    Parameters are on meta, buffers have their values. Experts that transformers fuses become linear layers of their own
    (model/modules/experts.py).

    Args:
        directory: the base.
        config: another one to use, such as the directory's own with fewer layers.
        dtype: of the parameters, and of buffers that follow them.
        stored: the names of the checkpoint's tensors, if known; experts that are fused there stay fused.

    Returns:
        The model.

    Raises:
        ModelError: transformers cannot make it.
    """
    config = config or directory.config()

    def make(config: Any) -> Any:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)

    def make_from(values: dict[str, Any]) -> Any:
        return make(make_model_config(values, directory.path))

    with library_boundary(not_loadable(directory), directory.config_json, make_from):
        model = make(config)
    split_experts(model, stored)
    forget_longer_rows(model)
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def compute_in(model: Any, dtype: torch.dtype, *, embedding_on_cpu: bool = False) -> None:
    """Cast what stayed dense (norms, embeddings, head, biases), each parameter in place, so that tied ones stay tied.

    Args:
        model: of transformers, changed in place.
        dtype: of computation.
        embedding_on_cpu: True if the input embedding goes to host memory; it then keeps its dtype where it may.
    """
    kept = model.get_input_embeddings().weight if embedding_on_cpu and keeps_own_dtype(model) else None
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter is not kept:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def recompute_buffers(model: Any, directory: ModelDirectory, dtype: torch.dtype, config: Any = None) -> None:
    """Set the buffers that no checkpoint holds to the values they have when the model is loaded in a dtype.

    Some are computed in that dtype, and differ with it: the root of 192, by which Gemma 3 scales its embedding, is
    13.856 in fp32 and 13.875 in bf16.

    Args:
        model: changed in place.
        directory: the base.
        dtype: to load in.
        config: the model's, if it is not that of the directory.
    """
    config = config or directory.config()
    vars(config).pop("quantization_config", None)
    fresh = empty_model(directory, config, dtype)
    stored = fresh.state_dict().keys()
    for name, buffer in fresh.named_buffers(remove_duplicate=False):
        if name not in stored:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, buffer.to(model.get_buffer(name).device))


def refuse_multi_modal(config: Any, directory: ModelDirectory) -> None:
    """Refuse a model that takes more than text, since the adapter would train its vision tower too.

    transformers loads some of them as causal language models, also such as have their tower in no config of its own
    (Fuyu, Emu3): it knows what prepares images or audio for them, and nothing of the kind for a model of text.

    Args:
        config: transformers'.
        directory: the base, for the message.

    Raises:
        ModelError: the model takes images or audio.
    """
    towers = [kind for kind in ("vision", "audio") if getattr(config, f"{kind}_config", None) is not None]
    if towers or prepares_more_than_text(config.model_type):
        parts = f", with a part for {' and '.join(towers)}" if towers else ""
        raise ModelError(
            f"{directory} holds a model of several kinds of input ({config.model_type}{parts}). Only text models are "
            "trained here: choose one that takes text alone."
        )


def keep_layers(config: Any, layers: int) -> None:
    """Cut the config to its first layers, and with it every list that has one entry for each layer.

    Args:
        config: transformers', changed in place.
        layers: how many to keep.
    """
    before = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
