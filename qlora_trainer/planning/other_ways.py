"""Set the memory of a run next to that of full fine-tuning and of 16-bit LoRA, by component and by exact count.

The common estimate for full fine-tuning in 16 bits is 8 bytes a weight: the weight, its gradient and Adam's two states,
56 GB for a 7B. Mixed precision keeps a weight and its gradient in 16 bits, and in fp32 a master weight and both states:
16 bytes (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1). 16-bit LoRA is this run without quantization. What is
not of the weights, such as activations, is counted as in the run. Left out: the run itself (memory_plan.py).
"""

import math
from collections.abc import Mapping
from typing import Any

from qlora_trainer.common.transformers_internals import tied_weight_names
from qlora_trainer.common.units import counted, gib
from qlora_trainer.model.modules.cpu_embedding import tensors_on_cpu
from qlora_trainer.model.modules.lm_head import QuantizedHead
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.planning.step_memory import ADAPTERS, BASE, DENSE, GRADIENTS, HEAD, PAGED, STATE, WORKSPACE

FULL, MIXED, LORA = "full fine-tuning in 16 bits", "full fine-tuning in mixed precision", "16-bit LoRA"
WEIGHT_BYTES = {
    FULL: (2, 2, 4),
    MIXED: (6, 2, 8),
}  # of each weight: weights (with a master's), gradients, Adam's two states

PARTS = {  # as to_json names them, and in words
    "weights": "weights",
    "gradients": "gradients",
    "adam_states": "Adam's two states",
    "rest": "activations and all else",
}
Parts = dict[str, int]  # bytes by part


def parts_of(components: Mapping[str, int]) -> Parts:
    """Sum up a plan's components to the parts that other ways have too.

    Args:
        components: bytes by name.

    Returns:
        Bytes of weights (the base's and the adapters'), gradients, Adam's states, and the rest.
    """
    names = {
        "weights": (BASE, HEAD, DENSE, ADAPTERS),
        "gradients": (GRADIENTS,),
        "adam_states": (STATE, PAGED),
    }
    parts = {part: sum(components.get(name, 0) for name in found) for part, found in names.items()}
    return {**parts, "rest": sum(components.values()) - sum(parts.values())}


def full_parts(parameters: int, rest: int = 0, way: str = FULL) -> Parts:
    """Compute what full fine-tuning takes.

    Args:
        parameters: of the model, ties once.
        rest: bytes that are not of the weights.
        way: FULL or MIXED.

    Returns:
        Bytes by part.
    """
    weights, gradients, states = (size * parameters for size in WEIGHT_BYTES[way])
    return {"weights": weights, "gradients": gradients, "adam_states": states, "rest": rest}


def other_ways(components: Mapping[str, int], parameters: int) -> dict[str, Parts]:
    """Compute what the same training takes in other ways.

    Args:
        components: of the plan, bytes by name.
        parameters: of the base, ties once.

    Returns:
        Bytes by way and part.
    """
    ours = parts_of(components)
    rest = ours["rest"] - components.get(WORKSPACE, 0)  # nothing is dequantized
    lora = {**ours, "weights": 2 * parameters + components.get(ADAPTERS, 0), "rest": rest}
    return {LORA: lora, **{way: full_parts(parameters, rest, way) for way in WEIGHT_BYTES}}


def base_parameters(model: Any) -> int:
    """Count the numbers of a base, ties once and 4-bit weights as the numbers that they encode.

    Args:
        model: with or without its adapters.

    Returns:
        The count.
    """
    dense = sum(p.numel() for p in (*model.parameters(), *tensors_on_cpu(model)) if not p.requires_grad)
    dense += sum(m.out_features * m.in_features for m in model.modules() if isinstance(m, NF4Linear))
    heads = {
        f"{path.removesuffix('.base')}.weight": m for path, m in model.named_modules() if isinstance(m, QuantizedHead)
    }
    tied = tied_weight_names(model)  # of which a quantized one is a copy
    return dense + sum(math.prod(head.shape) for name, head in heads.items() if name not in {*tied, *tied.values()})


def estimate_in_words(parameters: int) -> str:
    """Write what full fine-tuning takes before activations, by the common estimate and by exact count.

    Args:
        parameters: of the model.

    Returns:
        Such as "56 GB by the common estimate, 8 bytes for each of 7B; 57.9 GB by exact count (7,241,732,096 weights)".
    """
    unit, short = (10**9, "B") if parameters >= 10**9 else (10**6, "M")
    rounded = max(round(parameters / unit), 1)
    size = sum(WEIGHT_BYTES[FULL])
    common, exact = size * rounded * unit / 10**9, size * parameters / 10**9
    return (
        f"{common:.3g} GB by the common estimate, {size} bytes for each of {rounded}{short}; {exact:.1f} GB by exact "
        f"count ({counted(parameters, 'weight')})"
    )


def side_by_side(ways: Mapping[str, Parts]) -> list[tuple[str, ...]]:
    """Lay out ways of training as a table.

    Args:
        ways: bytes by way and part.

    Returns:
        Rows of text: the names of the ways, each part that any of them has, and the sums.
    """
    named = [(words, [parts.get(part, 0) for parts in ways.values()]) for part, words in PARTS.items()]
    named = [(words, sizes) for words, sizes in named if any(sizes)]
    sums = [sum(parts.values()) for parts in ways.values()]
    return [("", *ways), *((words, *map(gib, sizes)) for words, sizes in [*named, ("total", sums)])]
