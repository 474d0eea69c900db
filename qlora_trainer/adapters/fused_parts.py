"""Adapt parts of a fused projection alone, such as the query and value rows of GPT-2's c_attn.

A fused layer computes several projections at once, one below the other in its weight: the query's rows first, then the
key's, then the value's. Adapting some parts alone, each with an A and a B of its own, is what loralib's MergedLinear
does (Hu et al. 2021, arXiv:2106.09685). Together the parts' factors are one ordinary adapter of the summed rank: A's
stacked, B in blocks, zero where a part's rows meet another part's columns. So PEFT and a merge need to know nothing of
parts. In training the zero blocks are no parameters (LoRALinear), so nothing can move them.

Which rows are a part's is the model's own convention, which no shape shows, so it is listed here, family by family.
Left out: layouts that go head by head (GPT-NeoX, Falcon); those are refused by name.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from qlora_trainer.adapters.layers import linear_facts
from qlora_trainer.common.errors import AdapterError


class FusedLayout(NamedTuple):
    """Name the parts of a fused layer from its first row on."""

    parts: tuple[str, ...]
    grouped: bool = False  # key and value have the rows of config.num_key_value_heads; else all parts have as many


QUERY_KEY_VALUE = ("query", "key", "value")
LAYOUTS: dict[str, dict[str, FusedLayout]] = {  # by model type and the layer's name
    "gpt2": {"c_attn": FusedLayout(QUERY_KEY_VALUE)},
    "phi3": {"qkv_proj": FusedLayout(QUERY_KEY_VALUE, grouped=True), "gate_up_proj": FusedLayout(("gate", "up"))},
}
# Query, key and value are together head by head here, or group of heads by group.
INTERLEAVED = {
    "bloom": "query_key_value",
    "codegen": "qkv_proj",
    "falcon": "query_key_value",
    "gpt_bigcode": "c_attn",
    "gpt_neox": "query_key_value",
    "persimmon": "query_key_value",
}


def trained_rows(
    model: nn.Module, paths: Sequence[str], fused_parts: Mapping[str, Sequence[str]]
) -> dict[str, tuple[slice, ...]]:
    """Find the rows of each adapted layer that its parts are, by path, in the layer's order.

    Args:
        model: with the layers.
        paths: of the adapted layers.
        fused_parts: names of parts by the name of a layer, the end of its path.

    Returns:
        Rows by path; whole layers have no entry.

    Raises:
        AdapterError: a name that no adapted layer has, or a part that the layer does not have. (A layout that is not
            known, or goes head by head, is refused too.)
    """
    found: dict[str, tuple[slice, ...]] = {}
    for name, wanted in fused_parts.items():
        layers = [path for path in paths if path.rsplit(".", 1)[-1] == name]
        if not layers:
            adapted = sorted({path.rsplit(".", 1)[-1] for path in paths})
            raise AdapterError(
                f"adapter.fused_parts names {name}, but no adapted layer has that name. Adapted are: "
                f"{', '.join(adapted)}."
            )
        for path in layers:
            rows = _layout(model, path)
            if unknown := [part for part in wanted if part not in rows]:
                raise AdapterError(
                    f"adapter.fused_parts: {name} has no part {', '.join(unknown)}. Its parts are: {', '.join(rows)}."
                )
            found[path] = tuple(rows[part] for part in rows if part in wanted)
    return found


def _layout(model: nn.Module, path: str) -> dict[str, slice]:
    """Return the rows of a fused layer by part."""
    name = path.rsplit(".", 1)[-1]
    config: Any = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", type(model).__name__))
    if INTERLEAVED.get(model_type) == name:
        raise AdapterError(
            f"adapter.fused_parts: in {model_type}, {name} holds query, key and value of one head after the other, not "
            "each in rows of its own. Adapt it whole: leave it out of adapter.fused_parts."
        )
    layout = LAYOUTS.get(model_type, {}).get(name)
    if layout is None:
        known = ", ".join(f"{layer} of {kind}" for kind, layers in LAYOUTS.items() for layer in layers)
        raise AdapterError(
            f"adapter.fused_parts: which rows of {name} are which part is not known for {model_type}. Known are "
            f"{known}. Adapt it whole: leave it out of adapter.fused_parts."
        )
    _, out_features, _ = linear_facts(model.get_submodule(path))
    if layout.grouped:
        keys = (
            out_features // (config.num_attention_heads + 2 * config.num_key_value_heads) * config.num_key_value_heads
        )
        sizes = [out_features - 2 * keys, keys, keys]
    else:
        sizes = [out_features // len(layout.parts)] * len(layout.parts)
    edges = itertools.accumulate(sizes, initial=0)
    return {part: slice(*edge) for part, edge in zip(layout.parts, itertools.pairwise(edges), strict=True)}
