"""Put adapters on a model, freeze everything else, and read or write what trains under PEFT's names.

Works on any nn.Module with linear layers, so that it can be used as a library, with a training loop of one's own:

    add_adapters(model, AdapterConfig(rank=8))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ...
    save_file(lora_state_dict(model), "adapter.safetensors")

Targets are found by what the modules are, not by a list of model names: every linear layer but the output embedding,
those of attention or of the MLP, or those whose path ends in a given name. A name that matches nothing is an error with
the names that exist, because a fused projection (Phi-3's qkv_proj) makes a familiar list match half of what was meant.
Experts are no targets (model/modules/experts.py).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.formulas import without_zero_blocks
from qlora_trainer.adapters.fused_parts import trained_rows
from qlora_trainer.adapters.layers import LoRALinear, TrainableBias
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.modules.experts import SplitExperts
from qlora_trainer.model.modules.nf4_linear import NF4Linear, is_linear

PEFT_PREFIX = "base_model.model."

BiasMode = Literal["none", "lora_only", "all"]


def find_targets(model: nn.Module, target_modules: str | list[str]) -> list[str]:
    """Paths of the linear layers to adapt, in the model's order.

    Args:
        target_modules: "all-linear", experts left out; "attention" or "mlp", those in a decoder layer's attention, or
            outside it; a list of names, each the end of a path; or a regular expression that a whole path must match.

    Raises:
        AdapterError: something matches nothing, or names an embedding or the LM head; the message says what exists.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [path for path, module in model.named_modules() if path and is_linear(module) and module is not head]
    of_experts = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, SplitExperts))
    candidates = [path for path in linear if not path.startswith(of_experts)]
    if not candidates:
        raise AdapterError(
            "This model has no linear layers to put adapters on. (A single nn.Linear must lie in a module, such as "
            "nn.Sequential, where it can be replaced.)"
        )
    names = sorted({path.rsplit(".", 1)[-1] for path in candidates})
    if isinstance(target_modules, list):
        if unmatched := [name for name in target_modules if not any(_ends_in(path, name) for path in candidates)]:
            embedding = getattr(model, "get_input_embeddings", lambda: None)()
            excluded = [
                path for path, m in model.named_modules() if m in (head, embedding) or isinstance(m, nn.Embedding)
            ]
            reason = (
                " Embeddings and the LM head are not adapted: they may share one weight, and merging would change both."
                if any(_ends_in(path, name) for path in excluded for name in unmatched)
                else " Experts are not adapted."
                if any(_ends_in(path, name) for path in linear for name in unmatched)
                else ""
            )
            raise AdapterError(
                f"adapter.target_modules names {', '.join(unmatched)}, which no linear layer of this model is called. "
                f"There are: {', '.join(names)}.{reason}"
            )
        return [path for path in candidates if any(_ends_in(path, name) for name in target_modules)]
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


def add_adapters(model: nn.Module, settings: AdapterConfig, seed: int = 0) -> list[str]:
    """Wrap the targets in LoRALinear, and freeze all else but the biases `settings.bias` names; returns the paths.

    Biases that train become fp32, lora_A and lora_B are of `settings.dtype`. lora_A is drawn from `seed` alone, in fp32
    on the CPU, so it is the same on every device.

    Raises:
        AdapterError: the targets match nothing, or `settings.fused_parts` names parts that cannot be adapted alone.
    """
    paths = find_targets(model, settings.target_modules)
    parts = trained_rows(model, paths, settings.fused_parts)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        layer = LoRALinear.from_base(
            model.get_submodule(path),
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            use_rslora=settings.use_rslora,
            generator=generator,
            parts=parts.get(path, ()),
        )
        for part in (layer.lora_A, layer.lora_B):
            part.weight = nn.Parameter(part.weight.detach().to(getattr(torch, settings.dtype)))
        model.set_submodule(path, layer)
    mark_only_lora_as_trainable(model, settings.bias)
    return paths


def mark_only_lora_as_trainable(model: nn.Module, bias: BiasMode = "none") -> None:
    """Freeze everything but lora_A, lora_B and the biases that the mode names.

    Args:
        bias: "none"; "lora_only", the biases of adapted layers; or "all", every bias of the model. They become fp32.
    """
    model.requires_grad_(False)
    for layer in _lora_layers(model).values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    for path, module in _biased_modules(model, bias):
        parameter = module.get_parameter("bias")
        if parameter.dtype == torch.float32:
            parameter.requires_grad_(True)
        elif isinstance(module, NF4Linear):
            module.bias = nn.Parameter(parameter.detach().float())  # NF4Linear casts its bias itself
        else:
            model.set_submodule(path, TrainableBias(module))
    check_trainable(model)


def check_trainable(model: nn.Module) -> None:
    """Assert that nothing trains but adapters, in fp32 or bf16, and biases, in fp32."""
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_A." in f".{name}" or ".lora_B." in f".{name}"
        is_bias = name.rsplit(".", 1)[-1] == "bias"
        may_train = is_adapter or (is_bias and parameter.requires_grad)
        assert parameter.requires_grad == may_train, f"{name} must {'train' if may_train else 'be frozen'}"
        dtypes = (torch.float32, torch.bfloat16) if is_adapter else (torch.float32,)
        assert not may_train or parameter.dtype in dtypes, f"{name} trains in {parameter.dtype}"


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(PEFT's name, parameter) of all that trains, in the model's order."""
    adapted = _lora_layers(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, found, rest = name.rpartition(".base.")
            inside = found and path in adapted  # PEFT calls what a layer wraps its base_layer
            yield PEFT_PREFIX + (f"{path}.base_layer.{rest}" if inside else name), parameter


def lora_state_dict(model: nn.Module, bias: BiasMode = "none") -> dict[str, Tensor]:
    """Copies on the CPU of what the bias mode trains, by PEFT's names: what a checkpoint holds of a model.

    Raises:
        AdapterError: the model trains under another bias mode.
    """
    named = {id(module.get_parameter("bias")) for _, module in _biased_modules(model, bias)}
    state = adapter_state_dict(model)
    if named != {id(parameter) for name, parameter in trainable_parameters(model) if name.endswith(".bias")}:
        raise AdapterError(
            f"The model trains under the bias mode {_bias_mode(state)}, and its state was asked for under {bias}."
        )
    return state


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all that trains, in its dtype, by PEFT's names and in its shapes."""
    in_parts = _layers_in_parts(model)
    state = {}
    for name, parameter in trainable_parameters(model):
        layer = in_parts.get(id(parameter))
        values = parameter.detach().to("cpu", copy=True)  # first, so that it takes nothing of a full device
        state[name] = layer.whole_B(values) if layer else values
    return state


def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into the model in place: keys and shapes exactly, values finite, any float dtype.

    Raises:
        AdapterError: the tensors are not those of this model's adapters; nothing was changed.
    """
    parameters = dict(trainable_parameters(model))
    missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if (missing or unknown) and all(name.endswith(".bias") for name in missing + unknown):
        raise AdapterError(
            f"The adapter was saved under the bias mode {_bias_mode(tensors)}, and the model trains under "
            f"{_bias_mode(parameters)}. Set adapter.bias={_bias_mode(tensors)}."
        )
    if missing or unknown:
        parts = [f"{len(missing)} tensor(s) missing, such as {missing[0]}"] if missing else []
        parts += [f"{len(unknown)} that this model has no place for, such as {unknown[0]}"] if unknown else []
        raise AdapterError(
            f"The adapter does not fit the model and settings: {'; '.join(parts)}. It was made for other targets, or "
            "another architecture."
        )
    in_parts = _layers_in_parts(model)
    values: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        layer = in_parts.get(id(parameter))
        shape = layer.whole_B(parameter.detach()).shape if layer else parameter.shape
        if tensors[name].shape != shape:
            raise AdapterError(
                f"The adapter does not fit: {name} has shape {tuple(tensors[name].shape)}, the model needs "
                f"{tuple(shape)}. Check adapter.rank and the base."
            )
        if not torch.isfinite(tensors[name]).all():
            raise AdapterError(f"The adapter's tensor {name} holds values that are not finite; it is damaged.")
        blocks = without_zero_blocks(tensors[name], layer.parts) if layer else tensors[name]
        if blocks is None:
            raise AdapterError(
                f"The adapter's tensor {name} also adapts what adapter.fused_parts leaves out, or ties its parts: it "
                "was made with other settings. Leave its layer out of adapter.fused_parts."
            )
        values[name] = blocks
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def _layers_in_parts(model: nn.Module) -> dict[int, LoRALinear]:
    """Layers of which some parts are adapted alone, by the id of the B that trains."""
    return {id(layer.lora_B.weight): layer for layer in _lora_layers(model).values() if layer.parts}


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _part(model: nn.Module, path: str) -> str | None:
    """What a linear layer belongs to: "attention", or "mlp" for anything else in a decoder layer; None outside."""
    parts = path.split(".")
    ancestors = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    if not any(isinstance(ancestor, nn.ModuleList) for ancestor in ancestors):
        return None
    is_attention = any("attention" in type(ancestor).__name__.lower() for ancestor in ancestors) or any(
        "attn" in part or "attention" in part for part in parts
    )
    return "attention" if is_attention else "mlp"


def _biased_modules(model: nn.Module, mode: BiasMode) -> list[tuple[str, nn.Module]]:
    """(path, module) of the modules whose bias trains under a mode."""
    adapted = {id(layer.base) for layer in _lora_layers(model).values()}
    inner = {id(module.base) for module in model.modules() if isinstance(module, TrainableBias)}
    return [
        (path, module)
        for path, module in model.named_modules()
        if "bias" in dict(module.named_parameters(recurse=False))
        and id(module) not in inner
        and (mode == "all" or (mode == "lora_only" and id(module) in adapted))
    ]


def _bias_mode(names: Mapping[str, object]) -> BiasMode:
    """The narrowest mode that trains what has these names."""
    biases = [name for name in names if name.endswith(".bias")]
    if not biases:
        return "none"
    return "lora_only" if all(name.endswith(".base_layer.bias") for name in biases) else "all"
