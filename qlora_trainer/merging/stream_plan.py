"""Plan a model that is streamed: its empty modules, the tensor that each parameter is read from, and the device.

It is made once for a base: it says whether the base can be streamed at all, which device has enough memory for it, and
is then filled (streamed_model.py). Left out: models whose tensors transformers fuses or splits while loading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qlora_trainer.merging.trained_weights import TrainedWeight
from qlora_trainer.model.device import device_with_memory
from qlora_trainer.model.empty import empty_model, keep_layers
from qlora_trainer.model.modules.nf4_linear import is_linear
from qlora_trainer.model.names import match_names
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.reading import same_values
from qlora_trainer.weights.tensors import TensorInfo

WORKING_BYTES = 2**30  # activations of a pass, roughly

MatrixSource = TensorInfo | TrainedWeight  # as the checkpoint holds it, or as it was in training


@dataclass(frozen=True)
class StreamPlan:
    """Hold an empty model and where its values are; `fill_model` fills it, once."""

    model: Any  # its parameters are on meta
    sources: dict[str, MatrixSource] | None  # by parameter or stored buffer; None: the model cannot be streamed
    resident: set[nn.Parameter]  # parameters that stay in memory
    device: torch.device  # that has enough memory: the one asked for, or the CPU


def plan_stream(
    directory: ModelDirectory,
    device: torch.device,
    trained: Mapping[str, TrainedWeight] | None = None,
    *,
    layers: int | None = None,
) -> StreamPlan:
    """Make the empty model of a directory, and find what its parameters are read from.

    Args:
        directory: of the model.
        device: to run the model on; the CPU is taken where a GPU has too little memory.
        trained: weights to take as they were in training, by the checkpoint's names; reading one checks it.
        layers: only so many of the decoder's layers.

    Returns:
        The plan, for `fill_model`.

    Raises:
        ModelError: the model cannot be made.
        InsufficientMemoryError: no device has space for the largest matrix twice (it is made from another), or for the
            whole model where its tensors are fused while loading.
    """
    config = directory.config()
    if layers is not None:
        keep_layers(config.get_text_config(), layers)
    model = empty_model(directory, config, stored=directory.tensors)
    sources, resident = _sources(model, directory, trained or {}), _resident(model)
    if sources is None:
        needed = sum(4 * parameter.numel() for parameter in model.parameters())
    else:
        by_rows = {m.weight for m in model.modules() if isinstance(m, nn.Embedding) or is_plain_head(m, model)}
        fetched = [4 * parameter.numel() for parameter in set(model.parameters()) - resident - by_rows]
        needed = sum(4 * parameter.numel() for parameter in resident) + 2 * max(fetched, default=0)
    device = device_with_memory(needed + WORKING_BYTES, device, f"Comparing logits of {directory}")
    return StreamPlan(model, sources, resident, device)


def is_plain_head(module: nn.Module, model: Any) -> bool:
    """Return True for the LM head of a model, if it is a plain linear layer.

    Args:
        module: any of the model's modules.
        model: a causal language model of transformers.

    Returns:
        False for every other module, and for a head of another class.
    """
    return module is model.get_output_embeddings() and type(module) is nn.Linear


def _sources(
    model: Any, directory: ModelDirectory, trained: Mapping[str, TrainedWeight]
) -> dict[str, MatrixSource] | None:
    """Find what each parameter and stored buffer is read from, tied ones by each name; None if one has no source."""
    tensors = directory.tensors
    stored_as = match_names(model, directory).found
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    sources: dict[str, MatrixSource] = {}
    for tied in names.values():
        stored = [tensors[found] for name in tied if (found := stored_as.get(name))]
        # transformers ties what is stored twice only where both hold the same values.
        if not stored or not all(same_values(stored[0], other) for other in stored[1:]):
            return None
        sources |= dict.fromkeys(tied, trained.get(stored[0].name, stored[0]))
    for name in model.state_dict().keys() - sources.keys():
        if found := stored_as.get(name):
            sources[name] = tensors[found]
    return sources


def _resident(model: nn.Module) -> set[nn.Parameter]:
    """Find the parameters that stay: vectors, and matrices that code may take without calling their module.

    Those are small, such as the convolutions of state-space models. Stacks of experts are not, and are used by their
    own module alone.
    """
    resident = set()
    for module in model.modules():
        is_torchs = type(module).__module__.startswith("torch.")
        for parameter in module.parameters(recurse=False):
            is_stack = parameter.ndim >= 3 and not is_torchs
            if parameter.ndim < 2 or not (is_stack or is_linear(module) or isinstance(module, nn.Embedding)):
                resident.add(parameter)
    return resident
