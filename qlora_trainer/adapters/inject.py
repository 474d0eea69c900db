"""Put adapters on a model, freeze everything else, and read or write what trains under PEFT's names.

Works on any nn.Module with linear layers, so that it can be used as a library, with a training loop of one's own:

    add_adapters(model, AdapterConfig(rank=8))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ...
    save_file(lora_state_dict(model), "adapter.safetensors")

Left out: what a kind of adapter puts on a model (kinds/), and what trains (trainable.py).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.kinds.table import adapter_kind
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.adapters.tokens.token_choice import TextTokenizer
from qlora_trainer.adapters.trainable import (
    AdapterModule,
    BiasMode,
    adapter_modules,
    biased_modules,
    trainable_parameters,
    trained_outside_file,
)
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.units import counted
from qlora_trainer.config.schema import AdapterConfig


def add_adapters(
    model: nn.Module, settings: AdapterConfig, seed: int = 0, tokenizer: TextTokenizer | None = None
) -> list[str]:
    """Put adapters of the settings' kind on a model, and freeze all else but the biases that `settings.bias` names.

    Biases that train become fp32, adapters are of `settings.dtype`, fp32 for auto. What is drawn is drawn from `seed`
    alone, on the CPU. What the model cannot have is refused by an AdapterError.

    Args:
        model: any, of transformers or not.
        settings: the config's section `adapter`.
        seed: of what is drawn.
        tokenizer: of the model; only settings that hold text, such as adapter.prompt_init_text, need one.

    Returns:
        The paths of the adapted modules.
    """
    return adapter_kind(settings).add(model, settings, seed, tokenizer)


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
    named = {id(module.get_parameter("bias")) for _, module in biased_modules(model, bias)}
    state = adapter_state_dict(model)
    of_base = _biases_of_base(model)
    if named != set(of_base.values()):
        raise AdapterError(
            f"The model trains under the bias mode {_bias_mode(of_base)}, and its state was asked for under {bias}."
        )
    return state


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copy to the CPU what an adapter's file holds: all that trains, or what is made of it, in PEFT's shapes.

    Args:
        model: with adapters.

    Returns:
        Tensors by PEFT's names, in the dtype of what trains.
    """
    owners, outside = _owners(model), trained_outside_file(model)
    state: dict[str, Tensor] = {}
    for module in adapter_modules(model).values():
        with torch.no_grad():
            state |= {name: values.to("cpu", copy=True) for name, values in module.made_for_file().items()}
    for name, parameter in trainable_parameters(model):
        if name in outside:
            continue
        values = parameter.detach().to("cpu", copy=True)  # first, so that it takes nothing of a full device
        owner = owners.get(id(parameter))
        state[name] = owner[0].stored(owner[1], values) if owner else values
    return state


def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into the model in place: keys and shapes exactly, values finite, any float dtype.

    Args:
        model: with adapters.
        tensors: by PEFT's names; where the file holds what is made of what trains, those of `trained_outside_file`.

    Raises:
        AdapterError: the tensors are not those of this model's adapters; nothing was changed.
    """
    parameters = dict(trainable_parameters(model))
    if (outside := trained_outside_file(model)) and outside.keys().isdisjoint(tensors):
        raise AdapterError(
            "The adapter holds a prefix and not the MLP that the model would train it through. Set "
            "adapter.prefix_projection=false."
        )
    missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    owners, of_base = _owners(model), _biases_of_base(model)
    if (missing or unknown) and all(name in of_base for name in missing) and all(n.endswith(".bias") for n in unknown):
        saved = _bias_mode(name for name in tensors if name in of_base or name not in parameters)
        raise AdapterError(
            f"The adapter was saved under the bias mode {saved}, and the model trains under "
            f"{_bias_mode(of_base)}. Set adapter.bias={saved}."
        )
    if missing or unknown:
        parts = [f"{counted(len(missing), 'tensor')} missing, such as {missing[0]}"] if missing else []
        parts += [f"{len(unknown)} that this model has no place for, such as {unknown[0]}"] if unknown else []
        raise AdapterError(
            f"The adapter does not fit the model and settings: {'; '.join(parts)}. It was made for other targets, or "
            "another architecture."
        )
    values: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        owner = owners.get(id(parameter))
        shape = owner[0].stored(owner[1], parameter.detach()).shape if owner else parameter.shape
        if tensors[name].shape != shape:
            raise AdapterError(
                f"The adapter does not fit: {name} has shape {tuple(tensors[name].shape)}, the model needs "
                f"{tuple(shape)}. Check the section adapter of the config, and the base."
            )
        if not torch.isfinite(tensors[name]).all():
            raise AdapterError(f"The adapter's tensor {name} holds values that are not finite; it is damaged.")
        unstored = owner[0].unstored(owner[1], tensors[name]) if owner else tensors[name]
        if unstored is None:
            raise AdapterError(
                f"The adapter's tensor {name} also adapts what adapter.fused_parts leaves out, or ties its parts: it "
                "was made with other settings. Leave its layer out of adapter.fused_parts."
            )
        values[name] = unstored
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


def _owners(model: nn.Module) -> dict[int, tuple[AdapterModule, str]]:
    """Return the module of each parameter of an adapter, and its name there, by the parameter's id."""
    return {
        id(parameter): (module, name)
        for module in adapter_modules(model).values()
        for name, parameter in module.own_parameters()
    }


def _biases_of_base(model: nn.Module) -> dict[str, int]:
    """Return the ids of the base's biases that train, by PEFT's names."""
    own = _owners(model).keys()
    named = ((name, id(parameter)) for name, parameter in trainable_parameters(model) if name.endswith(".bias"))
    return {name: key for name, key in named if key not in own}


def _bias_mode(names: Iterable[str]) -> BiasMode:
    """Return the narrowest mode that trains what has these names."""
    biases = [name for name in names if name.endswith(".bias")]
    if not biases:
        return "none"
    return "lora_only" if all(name.endswith(".base_layer.bias") for name in biases) else "all"
