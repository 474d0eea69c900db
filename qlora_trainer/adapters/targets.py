"""Find the layers to adapt by what a model's modules are, not by a list of model names.

They are every linear layer but the LM head, those of attention or of the MLP, or those whose path ends in a given name.
A name that matches nothing is an error with the names that exist, because a fused projection (Phi-3's qkv_proj) makes a
familiar list match half of what was meant. Experts are no targets (model/modules/experts.py).
"""

import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from qlora_trainer.adapters.alternatives import alternatives
from qlora_trainer.adapters.layers import linear_facts
from qlora_trainer.common.dotted_names import ends_in
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.modules.experts import SplitExperts
from qlora_trainer.model.modules.nf4_linear import is_linear

KEYS_AND_VALUES = {
    *("k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "wk", "wv"),
    *("c_attn", "qkv_proj", "query_key_value", "Wqkv", "qkv"),  # fused: the query is scaled too, as in PEFT
}


def adapted_paths(model: nn.Module, settings: AdapterConfig) -> list[str]:
    """Find the linear layers that a config adapts, in the model's order.

    Targets that match nothing are refused by an AdapterError.

    Args:
        model: any, of transformers or not.
        settings: the config's section `adapter`.

    Returns:
        Their paths.

    Raises:
        AdapterError: adapter.layers_to_transform leaves none, or names a decoder layer that does not exist.
    """
    if settings.target_modules != "auto":
        paths = find_targets(model, settings.target_modules)
    else:
        paths = _of_ia3(model) if settings.kind == "ia3" else find_targets(model, "all-linear")
    chosen = settings.layers_to_transform
    if chosen is None:
        return paths
    layers = {path: _decoder_layer(model, path) for path in paths}
    known = {layer for layer in layers.values() if layer is not None}
    if unknown := sorted(set(chosen) - known):
        there = f"0 to {max(known)}" if known else "none"
        raise AdapterError(
            f"adapter.layers_to_transform names {', '.join(map(str, unknown))}, and this model's decoder layers with "
            f"targets are {there}, counted from 0."
        )
    return [path for path in paths if layers[path] in chosen]


def find_targets(model: nn.Module, target_modules: str | list[str]) -> list[str]:
    """Find the linear layers to adapt, in the model's order.

    Args:
        model: any, of transformers or not.
        target_modules: "all-linear", experts left out; "attention" or "mlp", those in a decoder layer's attention, or
            outside it; a list of names, each the end of a path; or a regular expression that a whole path must match,
            each of its alternatives one at least.

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
            reasons = [_why_not_adapted(model, partial(ends_in, end=name)) for name in unmatched]
            raise AdapterError(
                f"adapter.target_modules names {', '.join(unmatched)}, but no linear layer of this model has that "
                f"name. There are: {', '.join(names)}.{max(reasons, key=bool)}"
            )
        return [path for path in candidates if any(ends_in(path, name) for name in target_modules)]
    if target_modules == "all-linear":
        return candidates
    if target_modules in ("attention", "mlp"):
        found = [path for path in candidates if _part(model, path) == target_modules]
        if not found:
            hint = " Experts are not adapted." if of_experts else ""
            raise AdapterError(f"adapter.target_modules={target_modules} {_matches_nothing(candidates, names)}{hint}")
        return found
    return _matching(model, target_modules, candidates, names)


def last_of_mlps(model: nn.Module) -> list[str]:
    """Find the last linear layers of MLPs: those outside of attention that give the hidden size from another size.

    Args:
        model: any, of transformers or not.

    Returns:
        Their paths, in the model's order; none where the model does not say its hidden size.
    """
    config = getattr(model, "config", None)
    hidden = getattr(config and config.get_text_config(), "hidden_size", None)
    found = []
    for path in find_targets(model, "all-linear"):
        inputs, outputs, _ = linear_facts(model.get_submodule(path))
        if outputs == hidden != inputs and _part(model, path) == "mlp":
            found.append(path)
    return found


def _of_ia3(model: nn.Module) -> list[str]:
    """Find keys, values and the last layers of MLPs; of attention that computes all at once, the fused layer."""
    linear = find_targets(model, "all-linear")
    names = {path: path.rsplit(".", 1)[-1] for path in linear}
    chosen = {path for path in linear if names[path] in KEYS_AND_VALUES and _part(model, path) == "attention"}
    last = set(last_of_mlps(model))
    if not chosen or not last:
        raise AdapterError(
            "adapter.kind=ia3 does not find the keys, the values and the last layers of the MLPs of this model by "
            "itself. Name them in adapter.target_modules, and the MLPs' last layers in adapter.feedforward_modules "
            f"too. There are: {', '.join(sorted(set(names.values())))}."
        )
    return [path for path in linear if path in chosen | last]


def target_names(model: nn.Module, adapted: Sequence[str]) -> list[str]:
    """Find the shortest names that PEFT resolves to exactly the adapted layers.

    Args:
        model: with its adapters.
        adapted: paths of the adapted layers.

    Returns:
        The last parts of the paths if no other layer has them, else the paths; sorted.
    """
    ends = {path.rsplit(".", 1)[-1] for path in adapted}
    matched = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in ends]
    return sorted(ends) if sorted(matched) == sorted(adapted) else sorted(adapted)


def _matching(model: nn.Module, pattern: str, candidates: list[str], names: list[str]) -> list[str]:
    """Return the candidates that a regular expression matches; each of its alternatives must match one."""
    found = [path for path in candidates if re.fullmatch(pattern, path)]
    if not found:
        reason = _why_not_adapted(model, lambda path: re.fullmatch(pattern, path) is not None)
        hint = reason or f" To name layers, give a list: {shlex.quote(f'adapter.target_modules=[{pattern}]')}."
        raise AdapterError(f"adapter.target_modules={pattern} {_matches_nothing(candidates, names)}{hint}")
    for alternative, alone in alternatives(pattern):
        matches = _matcher(alone)
        if matches is not None and not any(matches(path) for path in candidates):
            # .*\.(q_proj|lm_head) matches no path of the head, but names it.
            named = _matcher(rf"(.*\.)?({alternative})") or matches
            reason = _why_not_adapted(model, matches) or _why_not_adapted(model, named)
            raise AdapterError(
                f"adapter.target_modules={pattern} has the alternative {alternative}, which "
                f"{_matches_nothing(candidates, names)}{reason} Leave it out."
            )
    return found


def _matcher(pattern: str) -> Callable[[str], bool] | None:
    """Return what tests a path; None for a part of a pattern that is no expression without the others."""
    try:
        compiled = re.compile(pattern)
    except re.error:
        return None
    return lambda path: compiled.fullmatch(path) is not None


def _matches_nothing(candidates: list[str], names: list[str]) -> str:
    return (
        f"matches no linear layer of this model. Their paths look like {candidates[0]}, and their names are: "
        f"{', '.join(names)}."
    )


def _why_not_adapted(model: nn.Module, matches: Callable[[str], bool]) -> str:
    """Say why what a name or pattern matches is not adapted, as a sentence; "" where it matches nothing at all."""
    ends = [getattr(model, name, lambda: None)() for name in ("get_output_embeddings", "get_input_embeddings")]
    modules = {path: module for path, module in model.named_modules() if path and matches(path)}
    parameters = [path for path, _ in model.named_parameters() if matches(path)]
    if any(module in ends or isinstance(module, nn.Embedding) for module in modules.values()):
        return " Embeddings and the LM head are not adapted: they may share one weight, and merging would change both."
    if any("expert" in path.lower() for path in [*modules, *parameters]):
        return " Experts are not adapted."
    if modules or parameters:
        return f" {next(iter([*modules, *parameters]))} is no linear layer."
    return ""


def _decoder_layer(model: nn.Module, path: str) -> int | None:
    """Return the place of the decoder layer that a linear layer is in; None outside of all."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return int(parts[end])
    return None


def _part(model: nn.Module, path: str) -> str | None:
    """Say what a linear layer belongs to: "attention", or "mlp" for anything else in a decoder layer; None outside."""
    parts = path.split(".")
    ancestors = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    if not any(isinstance(ancestor, nn.ModuleList) for ancestor in ancestors):
        return None
    is_attention = looks_like_attention(parts[-1]) or any(map(looks_like_attention, parts, ancestors))
    return "attention" if is_attention else "mlp"


def looks_like_attention(name: str, module: nn.Module | None = None) -> bool:
    """Return True if a module is attention by its name or its class.

    Args:
        name: in the module that holds it.
        module: whose class counts; None: the name alone does.

    Returns:
        True if it is.
    """
    return "attn" in name or "attention" in name or "attention" in type(module).__name__.lower()
