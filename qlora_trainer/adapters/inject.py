"""Put adapters on a model, freeze everything else, and read or write what is trainable under PEFT's names.

Targets are found by what the modules are, not by a list of model names: every linear layer but the output embedding,
or those whose path ends in a given name. A name that matches nothing is an error with the names that exist, because a
fused projection (Phi-3's qkv_proj) makes a familiar list match half of what was meant.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.config import AdapterConfig
from qlora_trainer.errors import AdapterError
from qlora_trainer.quantization import NF4Linear

PEFT_PREFIX = "base_model.model."


def find_targets(model: nn.Module, targets: str | list[str]) -> list[str]:
    """Paths of the linear layers to adapt, in the model's order.

    Raises:
        AdapterError: a name matches nothing, or names an embedding or the output head.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    candidates = [
        path
        for path, module in model.named_modules()
        if isinstance(module, NF4Linear | nn.Linear) and module is not head
    ]
    if targets == "all-linear":
        if not candidates:
            raise AdapterError("This model has no linear layers to put adapters on; it cannot be trained here.")
        return candidates
    wanted = [targets] if isinstance(targets, str) else targets
    unmatched = [name for name in wanted if not any(_ends_in(path, name) for path in candidates)]
    if unmatched:
        exists = sorted({path.rsplit(".", 1)[-1] for path in candidates})
        excluded = sorted(path for path, m in model.named_modules() if m is head or isinstance(m, nn.Embedding))
        reason = (
            " Embeddings and the output head are not adapted: they may share one weight, and merging would change both."
            if any(_ends_in(path, name) for path in excluded for name in unmatched)
            else ""
        )
        raise AdapterError(
            f"adapter.targets names {', '.join(unmatched)}, which no linear layer of this model is called. "
            f"There are: {', '.join(exists)}.{reason}"
        )
    return [path for path in candidates if any(_ends_in(path, name) for name in wanted)]


def add_adapters(model: nn.Module, settings: AdapterConfig, seed: int) -> list[str]:
    """Wrap the targets in LoRALinear, freeze all else but the biases `settings.bias` names; returns the paths.

    Biases that train become fp32. lora_A is drawn from `seed` alone, on the CPU, so it is the same on every device.
    """
    model.requires_grad_(False)
    paths = find_targets(model, settings.targets)
    generator = torch.Generator().manual_seed(seed)
    for path in paths:
        layer = LoRALinear.from_base(
            model.get_submodule(path),  # type: ignore[arg-type]  # find_targets returns linear layers only
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            use_rslora=settings.use_rslora,
            generator=generator,
        )
        model.set_submodule(path, layer)
    for path, module in model.named_modules():
        bias = module._parameters.get("bias")
        if bias is not None and _bias_trains(path, settings.bias, paths):
            module._parameters["bias"] = nn.Parameter(bias.detach().float(), requires_grad=True)
    check_trainable(model)
    return paths


def check_trainable(model: nn.Module) -> None:
    """Assert that nothing trains but adapters and biases, all in fp32."""
    for name, parameter in model.named_parameters():
        is_ours = ".lora_A." in name or ".lora_B." in name or (name.endswith(".bias") and parameter.requires_grad)
        assert parameter.requires_grad == is_ours, f"{name} must {'train' if is_ours else 'be frozen'}"
        assert not is_ours or parameter.dtype == torch.float32, f"{name} trains in {parameter.dtype}"


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(PEFT's name, parameter) of all that trains, in the model's order."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield PEFT_PREFIX + name.replace(".base.bias", ".base_layer.bias"), parameter


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of all that trains, fp32, by PEFT's names."""
    return {name: parameter.detach().cpu().clone() for name, parameter in trainable_parameters(model)}


def load_adapter_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy adapter tensors into the model in place: keys and shapes exactly, values finite, any float dtype.

    Raises:
        AdapterError: the tensors are not those of this model's adapters; nothing was changed.
    """
    parameters = dict(trainable_parameters(model))
    missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or unknown:
        parts = [f"{len(missing)} tensor(s) missing, such as {missing[0]}"] if missing else []
        parts += [f"{len(unknown)} that this model has no place for, such as {unknown[0]}"] if unknown else []
        raise AdapterError(
            f"The adapter does not fit the model and settings: {'; '.join(parts)}. It was made for other targets, "
            "another bias mode, or another architecture."
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise AdapterError(
                f"The adapter does not fit: {name} has shape {tuple(tensors[name].shape)}, the model needs "
                f"{tuple(parameter.shape)}. Check adapter.rank and the base."
            )
        if not torch.isfinite(tensors[name]).all():
            raise AdapterError(f"The adapter's tensor {name} holds values that are not finite; it is damaged.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _bias_trains(path: str, mode: str, adapted: list[str]) -> bool:
    if mode == "all":
        return True
    return mode == "lora_only" and path.endswith(".base") and path.removesuffix(".base") in set(adapted)
