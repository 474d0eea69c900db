"""Find the decoder layers of a model."""

from typing import Any

from torch import nn


def decoder_layers(model: Any) -> list[nn.Module]:
    """List a transformers model's decoder layers in order.

    Args:
        model: of transformers.

    Returns:
        The layers; none where they are not one list of the config's length.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []
