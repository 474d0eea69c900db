"""Count what a token goes through in a model: the numbers of its weights, by what is done with them.

They are counted in the modules of the model itself, without memory, cut to one period of its layers. Left out: seconds
(cost.py).

L layers, H hidden size, V vocabulary, I and O in and out features of a linear layer, R rank.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.model.modules.experts import SplitExperts
from qlora_trainer.model.modules.nf4_linear import is_linear, is_transposed, linear_layers
from qlora_trainer.model.modules.packed_attention import head_sizes
from qlora_trainer.planning.skeleton import build_skeleton, layers_of_a_period
from qlora_trainer.weights.model_directory import ModelDirectory

RESIDUAL_PASSES = 16
"""How often a layer reads or writes its hidden states outside of products: two norms, two sums, rotary embedding, the
activation; counted on Llama's layer (python -m benchmarks.kernels)."""


@dataclass(frozen=True)
class Shape:
    """Hold counts of a model with its adapters, over all layers."""

    layers: int  # L
    hidden: int  # H
    vocabulary: int  # V
    attention: int  # numbers of all query heads of all layers
    stored: int  # numbers of the layers in NF4: I x O
    active: float  # of these, those that one token is multiplied by: of experts, the chosen ones
    tiled: int  # of these, those of MLPs, which tiles expand again
    adapters: int  # numbers of the adapters that multiply a token: of LoRA R x (I + O)
    between: float  # numbers that one token's forward reads and writes between products
    itemsize: int  # bytes of a number that is computed with
    remade: float = 0.0  # numbers of layers whose output backward computes again where it was not kept

    @property
    def head(self) -> int:
        """Return the numbers of the LM head, V x H.

        Returns:
            The count.
        """
        return self.vocabulary * self.hidden


def count_shape(directory: ModelDirectory, config: RunConfig, dtype: torch.dtype) -> Shape:
    """Count a model with the adapters of a config.

    A model that cannot be built is refused by a ModelError, targets that it does not have by an AdapterError.

    Args:
        directory: holds the base's config.json.
        config: of the run.
        dtype: of computation.

    Returns:
        The counts.
    """
    kinds = directory.facts.layer_kinds
    period = layers_of_a_period(directory, config.adapter)
    model = build_skeleton(directory, layers=period)
    text = model.config.get_text_config()
    experts = {path: module for path, module in model.named_modules() if isinstance(module, SplitExperts)}
    kind = adapter_kind(config.adapter)
    adapted = set(kind.target_paths(model, config.adapter))
    stored = tiled = adapters = remade = 0
    active = between = 0.0
    for path, layer in linear_layers(model).items():
        inputs, outputs = _features(layer)
        of_expert = next((module for other, module in experts.items() if path.startswith(f"{other}.")), None)
        chosen = getattr(text, "num_experts_per_tok", None) or 1
        share = chosen / of_expert.experts if of_expert else 1.0
        stored += inputs * outputs
        active += share * inputs * outputs
        tiled += inputs * outputs * (of_expert is None and getattr(text, "intermediate_size", 0) in (inputs, outputs))
        between += share * (inputs + outputs)
        if path in adapted:
            adapters += kind.layer_numbers(config.adapter, path, inputs, outputs)
            remade += inputs * outputs * kind.remakes_outputs
            between += inputs + 3 * outputs  # read for A; what B gives is read, and added to the output
    # Attention and MLPs that are adapted whole: their output is read, and read again to be added to.
    hidden = text.hidden_size
    for path in adapted:
        if not is_linear(model.get_submodule(path)):
            adapters += kind.layer_numbers(config.adapter, path, hidden, hidden)
            between += 4 * hidden
    sizes = head_sizes(text)
    width = sizes[0] * sizes[2] if sizes else text.hidden_size
    times = len(kinds) // period if len(kinds) % period == 0 else len(kinds) / period
    return Shape(
        layers=len(kinds),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        attention=width * len(kinds),
        stored=math.ceil(stored * times),
        active=active * times,
        tiled=math.ceil(tiled * times),
        adapters=math.ceil(adapters * times),
        between=(between + RESIDUAL_PASSES * text.hidden_size * period) * times,
        itemsize=dtype.itemsize,
        remade=remade * times,
    )


def _features(layer: nn.Module) -> tuple[int, int]:
    """Return the in and out features of a linear layer."""
    assert isinstance(layer.weight, Tensor)
    rows, columns = layer.weight.shape
    return (rows, columns) if is_transposed(layer) else (columns, rows)
