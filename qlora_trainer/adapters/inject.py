"""Put adapters on a model, freeze everything else, and read or write what trains under PEFT's names.

Works on any nn.Module with linear layers, so that it can be used as a library, with a training loop of one's own:

    add_adapters(model, AdapterConfig(rank=8))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ...
    save_file(lora_state_dict(model), "adapter.safetensors")

Left out: which layers are adapted (targets.py), and the layer itself (layers.py).
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.formulas import without_zero_blocks
from qlora_trainer.adapters.fused_parts import trained_rows
from qlora_trainer.adapters.layers import LoRALinear, TrainableBias
from qlora_trainer.adapters.targets import find_targets
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.units import counted
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.modules.nf4_linear import NF4Linear

PEFT_PREFIX = "base_model.model."

BiasMode = Literal["none", "lora_only", "all"]


def add_adapters(model: nn.Module, settings: AdapterConfig, seed: int = 0) -> list[str]:
    """Wrap the targets in LoRALinear, and freeze all else but the biases that `settings.bias` names.

    Biases that train become fp32, lora_A and lora_B are of `settings.dtype`, fp32 for auto. lora_A is drawn from `seed`
    alone, in fp32 on the CPU, so it is the same on every device. Targets that match nothing, and parts that
    cannot be adapted alone, are refused by an AdapterError.

    Args:
        model: any, of transformers or not.
        settings: the config's section `adapter`.
        seed: of lora_A.

    Returns:
        The paths of the adapted layers.
    """
    paths = find_targets(model, settings.target_modules)
    parts = trained_rows(model, paths, settings.fused_parts)
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
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
            part.weight = nn.Parameter(part.weight.detach().to(dtype))
        model.set_submodule(path, layer)
    mark_only_lora_as_trainable(model, settings.bias)
    return paths


def mark_only_lora_as_trainable(model: nn.Module, bias: BiasMode = "none") -> None:
    """Freeze everything but lora_A, lora_B and the biases that the mode names.

    Args:
        model: with adapters.
        bias: "none"; "lora_only", the biases of adapted layers; or "all", every bias of the model. They become fp32.
    """
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
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
    """Assert that nothing trains but adapters, in fp32 or bf16, and biases, in fp32.

    Args:
        model: with adapters.
    """
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_A." in f".{name}" or ".lora_B." in f".{name}"
        is_bias = name.rsplit(".", 1)[-1] == "bias"
        may_train = is_adapter or (is_bias and parameter.requires_grad)
        assert parameter.requires_grad == may_train, f"{name} must {'train' if may_train else 'be frozen'}"
        dtypes = (torch.float32, torch.bfloat16) if is_adapter else (torch.float32,)
        assert not may_train or parameter.dtype in dtypes, f"{name} trains in {parameter.dtype}"


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all that trains, in the model's order.

    Args:
        model: with adapters.

    Yields:
        (PEFT's name, parameter).
    """
    adapted = lora_layers(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, found, rest = name.rpartition(".base.")
            inside = found and path in adapted  # PEFT calls what a layer wraps its base_layer
            yield PEFT_PREFIX + (f"{path}.base_layer.{rest}" if inside else name), parameter


def lora_state_dict(model: nn.Module, bias: BiasMode = "none") -> dict[str, Tensor]:
    """Copy to the CPU what the bias mode trains: what a checkpoint holds of a model.

    Args:
        model: with adapters.
        bias: the mode that it trains under.

    Returns:
        Tensors by PEFT's names.

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
    """Copy to the CPU all that trains, in its dtype and in PEFT's shapes.

    Args:
        model: with adapters.

    Returns:
        Tensors by PEFT's names.
    """
    in_parts = _layers_in_parts(model)
    state = {}
    for name, parameter in trainable_parameters(model):
        layer = in_parts.get(id(parameter))
        values = parameter.detach().to("cpu", copy=True)  # first, so that it takes nothing of a full device
        state[name] = layer.whole_B(values) if layer else values
    return state


def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into the model in place: keys and shapes exactly, values finite, any float dtype.

    Args:
        model: with adapters.
        tensors: by PEFT's names.

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
        parts = [f"{counted(len(missing), 'tensor')} missing, such as {missing[0]}"] if missing else []
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


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Find the adapted layers of a model.

    Args:
        model: with adapters.

    Returns:
        Layers by path, in the model's order.
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}


def _layers_in_parts(model: nn.Module) -> dict[int, LoRALinear]:
    """Return layers of which some parts are adapted alone, by the id of the B that trains."""
    return {id(layer.lora_B.weight): layer for layer in lora_layers(model).values() if layer.parts}


def _biased_modules(model: nn.Module, mode: BiasMode) -> list[tuple[str, nn.Module]]:
    """List (path, module) of the modules whose bias trains under a mode."""
    adapted = {id(layer.base) for layer in lora_layers(model).values()}
    inner = {id(module.base) for module in model.modules() if isinstance(module, TrainableBias)}
    return [
        (path, module)
        for path, module in model.named_modules()
        if "bias" in dict(module.named_parameters(recurse=False))
        and id(module) not in inner
        and (mode == "all" or (mode == "lora_only" and id(module) in adapted))
    ]


def _bias_mode(names: Mapping[str, object]) -> BiasMode:
    """Return the narrowest mode that trains what has these names."""
    biases = [name for name in names if name.endswith(".bias")]
    if not biases:
        return "none"
    return "lora_only" if all(name.endswith(".base_layer.bias") for name in biases) else "all"
