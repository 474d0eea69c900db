"""Make a model without weights from config.json alone, as `load_base_model` gives it, for planning on fake tensors.

Left out: the checkpoint. Whether its weights are there, finite and of the config's shapes, loading says.
"""

from typing import Any

import torch
from torch import nn

from qlora_trainer.adapters.patterns import layers_differ
from qlora_trainer.config.schema import AdapterConfig, ModelConfig
from qlora_trainer.model.empty import compute_in, empty_model, keep_layers, recompute_buffers, refuse_multi_modal
from qlora_trainer.model.modules.cpu_embedding import keep_embeddings_on_cpu
from qlora_trainer.model.modules.lm_head import empty_head
from qlora_trainer.model.modules.nf4_linear import check_quantized_fraction, empty_nf4
from qlora_trainer.weights.model_directory import ModelDirectory


def build_skeleton(
    directory: ModelDirectory, layers: int | None = None, compute_dtype: torch.dtype | None = None
) -> Any:
    """Build the model of a directory's config.json, dense, without memory for its weights.

    What is not a causal language model that transformers knows is refused by a ModelError.

    Args:
        directory: holds config.json.
        layers: build only so many of the decoder's layers.
        compute_dtype: that buffers which no checkpoint holds are made in; by default the checkpoint's.

    Returns:
        The model.
    """
    config = directory.config()
    refuse_multi_modal(config, directory)
    if layers is not None:
        keep_layers(config.get_text_config(), layers)
    source_dtype = config.dtype or torch.float32
    model = empty_model(directory, config, source_dtype)  # as the checkpoint is loaded
    if compute_dtype not in (None, source_dtype):
        recompute_buffers(model, directory, compute_dtype, config)
    return model


def layers_of_a_period(directory: ModelDirectory, adapter: AdapterConfig) -> int:
    """Find after how many decoder layers a model and its adapters repeat, so that these can speak for all.

    Args:
        directory: holds config.json.
        adapter: the config's section `adapter`.

    Returns:
        The count; that of all layers where none repeats.
    """
    kinds = directory.facts.layer_kinds
    if layers_differ(adapter):
        return len(kinds)
    return next(n for n in range(1, len(kinds) + 1) if kinds[n:] == kinds[:-n])


def fill_skeleton(model: Any, settings: ModelConfig, compute_dtype: torch.dtype) -> None:
    """Make a skeleton what `load_base_model` gives, its memory uninitialized; called where tensors are fake.

    If too little becomes 4-bit, or the embedding is to be on the CPU and the LM head needs it, ModelError is raised.

    Args:
        model: as `build_skeleton` gives it.
        settings: the config's section `model`.
        compute_dtype: of what stays dense.
    """
    make_empty(model)
    empty_nf4(model)
    check_quantized_fraction(model, settings.min_quantized_fraction)
    empty_head(model, settings.lm_head)
    compute_in(model, compute_dtype, embedding_on_cpu=settings.embeddings == "cpu")
    if settings.embeddings == "cpu":
        keep_embeddings_on_cpu(model, torch.device("cpu"), compute_dtype)


def make_empty(model: nn.Module) -> None:
    """Put uninitialized tensors in the place of all parameters and buffers; ties stay ties.

    Args:
        model: on the meta device.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, old in [*parameters, *buffers]:
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                made[id(old)] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
            setattr(module, name, made[id(old)])
