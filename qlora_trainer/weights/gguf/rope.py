"""Read the rope settings of a GGUF file: base, rotated part of each head, and how positions are scaled.

llama.cpp takes them from several keys and from tensors that hold one factor for each rotary frequency; transformers has
one dictionary, `rope_parameters`. The keys' defaults are llama.cpp's. What transformers cannot compute is a problem
that refuses the file.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qlora_trainer.common.transformers_internals import rope_frequencies

ROPE_DIVISORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (ROPE_DIVISORS, LONG_FACTORS, SHORT_FACTORS)


@dataclass
class Rope:
    """Hold the rope settings of a file: transformers' parameters, the tensors used, and what cannot be computed."""

    parameters: dict[str, Any]
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)  # keys without the architecture, each with its value


def read_rope(
    keys: Mapping[str, Any], head_dim: int, context: int, tensors: Mapping[str, Tensor], partial: bool
) -> Rope:
    """Read the rope settings of a file.

    Args:
        keys: the metadata of the model, named without the architecture.
        head_dim: the size of a head.
        context: the file's context length.
        tensors: those of `FACTOR_TENSORS` that the file has.
        partial: True if the architecture can rotate a part of each head.

    Returns:
        The settings.
    """
    rope = Rope({"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base", 10000.0))})
    rotated = keys.get("rope.dimension_count", head_dim)
    if partial:
        rope.parameters["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        rope.problems.append(f"rope.dimension_count = {rotated} (the heads have {head_dim})")
    # Without a type, llama.cpp scales linearly.
    kind = keys.get("rope.scaling.type", "linear")
    factor = float(keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0)) or 1)
    attention = float(keys.get("rope.scaling.attn_factor", 1.0))
    original = int(keys.get("rope.scaling.original_context_length", context))
    if LONG_FACTORS in tensors and SHORT_FACTORS in tensors:
        if factor != 1 and kind != "none":
            rope.problems.append(f"rope.scaling.factor = {factor:g} (next to one factor for each frequency)")
        long, short = (tensors[name].tolist() for name in (LONG_FACTORS, SHORT_FACTORS))
        _set_factors(rope, long, short, original, attention, max(context / original, 1.0))
        rope.used |= {LONG_FACTORS, SHORT_FACTORS}
        return rope
    if kind == "longrope":
        rope.problems.append("rope.scaling.type = longrope (without the tensors of its factors)")
    elif kind == "yarn" and factor != 1:
        _set_yarn(rope, keys, factor, original, attention)
        attention = 1.0
    elif kind == "linear" and factor != 1:
        rope.parameters |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "linear", "yarn"):
        rope.problems.append(f"rope.scaling.type = {kind}")
    if attention != 1:
        rope.problems.append(f"rope.scaling.attn_factor = {attention:g}")
    return rope


def _set_yarn(rope: Rope, keys: Mapping[str, Any], factor: float, original: int, attention: float) -> None:
    """Set YaRN's parameters; llama.cpp multiplies its attention factor with YaRN's own, 1 + 0.1 ln(factor)."""
    for name, neutral in (("yarn_ext_factor", (-1, 1)), ("yarn_log_multiplier", (0,))):
        if (value := keys.get(f"rope.scaling.{name}", neutral[0])) not in neutral:
            rope.problems.append(f"rope.scaling.{name} = {value:g}")
    rope.parameters |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    attention *= float(keys.get("rope.scaling.yarn_attn_factor", 1.0))
    if attention != 1:
        rope.parameters["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (value := float(keys.get(f"rope.scaling.yarn_{name}", usual))) != usual:
            rope.parameters[name] = value


def _set_factors(
    rope: Rope, long: list[float], short: list[float], original: int, attention: float, factor: float
) -> None:
    rope.parameters |= {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
        "attention_factor": attention,
        "factor": factor,
    }


def restore_divisors(config: PretrainedConfig, divisors: Tensor) -> dict[str, Any] | None:
    """Find the rope parameters of a model of which llama.cpp wrote a divisor for each rotary frequency.

    llama.cpp writes Llama 3's scaling as such a tensor, not as settings, and transformers ignores it. All of Llama 3.1
    and 3.2 were published with the settings below except for the factor, so these are tried, and taken if transformers'
    formula for the rope type "llama3" gives the file's divisors with them. Other divisors are written out, by the
    rope type "longrope".

    Args:
        config: transformers', with the file's other rope parameters.
        divisors: the file's, (head_dim / 2,).

    Returns:
        The rope parameters; None where they cannot be combined with those that the config has.
    """
    rope = config.rope_parameters
    if bool((divisors == 1).all()):
        return dict(rope)
    if rope.get("rope_type") != "default":
        return None
    settings = rope | {
        "rope_type": "llama3",
        "factor": round(float(divisors.max()), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    candidate = copy.deepcopy(config)
    candidate.rope_parameters = settings
    scaled = rope_frequencies("llama3", candidate, torch.device("cpu"))
    if divisors.shape != scaled.shape:
        return None
    plain = settings["rope_theta"] ** -(torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
    if torch.allclose(plain / scaled, divisors, rtol=1e-4):
        return dict(settings)
    written = Rope(dict(rope))
    factors = divisors.tolist()
    _set_factors(written, factors, factors, config.max_position_embeddings, 1.0, 1.0)
    return written.parameters
