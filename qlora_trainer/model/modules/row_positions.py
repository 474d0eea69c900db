"""Handle rotary embeddings whose frequencies depend on how long the rows of a forward pass are.

LongRoPE (Ding et al. 2024, arXiv:2402.13753), as transformers has it, takes other frequencies for the whole forward
pass if its longest row is beyond the original positions. Dynamic NTK takes others for each length beyond them, and
keeps those of the longest row until a short one comes; here each pass forgets the one before it, so that a resumed run
is the uninterrupted one. Left out: how many positions a model has (weights/model_config.py).
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from qlora_trainer.weights.model_config import rope_settings


def longest_with_own_positions(config: Any) -> int | None:
    """Find the row length, in tokens, up to which rotary frequencies do not depend on other rows.

    Args:
        config: of the text model.

    Returns:
        Tokens; None where there is no limit.
    """
    limits = []
    for rope in rope_settings(config):
        if rope.get("rope_type") == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        elif rope.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def forget_longer_rows(model: nn.Module) -> None:
    """Begin each forward pass of dynamic NTK with the original frequencies, whatever rows came before.

    Args:
        model: of transformers, changed in place.
    """
    for module in model.modules():
        if [*_dynamic_buffers(module)]:
            module.register_forward_pre_hook(_reset)


def _reset(module: nn.Module, _: Any) -> None:
    for prefix in _dynamic_buffers(module):
        setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _dynamic_buffers(module: nn.Module) -> Iterator[str]:
    """Yield how the names of a module's buffers begin that change with the rows."""
    kinds = getattr(module, "rope_type", None)
    by_prefix = {f"{layer}_": kind for layer, kind in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
    for prefix, kind in by_prefix.items():
        if isinstance(kind, str) and "dynamic" in kind and hasattr(module, f"{prefix}original_inv_freq"):
            yield prefix
