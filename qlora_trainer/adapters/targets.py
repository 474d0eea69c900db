"""Find the layers to adapt by what a model's modules are, not by a list of model names.

They are every linear layer but the LM head, those of attention or of the MLP, or those whose path ends in a given name.
A name that matches nothing is an error with the names that exist, because a fused projection (Phi-3's qkv_proj) makes a
familiar list match half of what was meant. Experts are no targets (model/modules/experts.py).
"""

import re

from torch import nn

from qlora_trainer.common.dotted_names import ends_in
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.model.modules.experts import SplitExperts
from qlora_trainer.model.modules.nf4_linear import is_linear


def find_targets(model: nn.Module, target_modules: str | list[str]) -> list[str]:
    """Find the linear layers to adapt, in the model's order.

    Args:
        model: any, of transformers or not.
        target_modules: "all-linear", experts left out; "attention" or "mlp", those in a decoder layer's attention, or
            outside it; a list of names, each the end of a path; or a regular expression that a whole path must match.

    Returns:
        Their paths.

    Raises:
        AdapterError: something matches nothing, or names an embedding or the LM head; the message says what exists.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [path for path, module in model.named_modules() if path and is_linear(module) and module is not head]
    of_experts = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, SplitExperts))
    candidates = [path for path in linear if not path.startswith(of_experts)]
    if not candidates:
        raise AdapterError(
            "This model has no linear layers to put adapters on. (A single nn.Linear must be in a module, such as "
            "nn.Sequential, where it can be replaced.)"
        )
    names = sorted({path.rsplit(".", 1)[-1] for path in candidates})
    if isinstance(target_modules, list):
        if unmatched := [name for name in target_modules if not any(ends_in(path, name) for path in candidates)]:
            embedding = getattr(model, "get_input_embeddings", lambda: None)()
            excluded = [
                path for path, m in model.named_modules() if m in (head, embedding) or isinstance(m, nn.Embedding)
            ]
            reason = (
                " Embeddings and the LM head are not adapted: they may share one weight, and merging would change both."
                if any(ends_in(path, name) for path in excluded for name in unmatched)
                else " Experts are not adapted."
                if any(ends_in(path, name) for path in linear for name in unmatched)
                else ""
            )
            raise AdapterError(
                f"adapter.target_modules names {', '.join(unmatched)}, which no linear layer of this model is called. "
                f"There are: {', '.join(names)}.{reason}"
            )
        return [path for path in candidates if any(ends_in(path, name) for name in target_modules)]
    if target_modules == "all-linear":
        return candidates
    if target_modules in ("attention", "mlp"):
        found = [path for path in candidates if _part(model, path) == target_modules]
    else:
        found = [path for path in candidates if re.fullmatch(target_modules, path)]
    if not found:
        hint = f" To name layers, give a list: adapter.target_modules=[{target_modules}]."
        if target_modules in ("attention", "mlp"):
            hint = " Experts are not adapted." if of_experts else ""
        raise AdapterError(
            f"adapter.target_modules={target_modules} matches no linear layer of this model. Their paths look like "
            f"{candidates[0]}, and their names are: {', '.join(names)}.{hint}"
        )
    return found


def _part(model: nn.Module, path: str) -> str | None:
    """Say what a linear layer belongs to: "attention", or "mlp" for anything else in a decoder layer; None outside."""
    parts = path.split(".")
    ancestors = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    if not any(isinstance(ancestor, nn.ModuleList) for ancestor in ancestors):
        return None
    is_attention = any("attention" in type(ancestor).__name__.lower() for ancestor in ancestors) or any(
        "attn" in part or "attention" in part for part in parts
    )
    return "attention" if is_attention else "mlp"
