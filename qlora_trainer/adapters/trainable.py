"""Say what of a model trains, under which names of PEFT, and freeze everything else.

Left out: what adapters compute (layers.py), and copying their values (inject.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qlora_kernels.adapter import Projection
from qlora_kernels.lora_rows import RowAdapter
from qlora_kernels.side_by_side import worker_number
from qlora_trainer.adapters.file_config import PEFT_PREFIX
from qlora_trainer.adapters.folds import Fold
from qlora_trainer.model.modules.nf4_linear import NF4Linear

BiasMode = Literal["none", "lora_only", "all"]


class Switch:
    """Say to many layers at once whether what was prepared for them is to be taken."""

    is_on = False
    serial = 0  # of the block in which it is on


class AdapterModule(nn.Module):
    """Wrap a module of the base, next to what trains; a kind of adapter has a subclass.

    All parameters but those of `base` train. They have PEFT's names inside the module, and PEFT's shapes but for what
    `stored` says.
    """

    base: nn.Module
    runs_at_once = False  # several threads may be in it, as it takes what trains from `own`
    file_is_made = False  # the file holds what `made_for_file` returns, and not what trains
    # By worker, parameters that share the values and have gradients of their own, to be taken while the switch is on:
    of_workers: tuple[Switch, Sequence[Mapping[str, nn.Parameter]]] = (Switch(), ())

    def own(self, name: str) -> nn.Parameter:
        """Return a parameter as this thread is to take it.

        Args:
            name: inside the module.

        Returns:
            The parameter, or this thread's one of the same values.
        """
        switch, by_worker = self.of_workers
        return by_worker[worker_number()][name] if switch.is_on else self.get_parameter(name)

    @property
    def leading_ids(self) -> list[int]:
        """Return the ids of virtual tokens, beyond the vocabulary, that each row begins with. Most kinds have none."""
        return []

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what trains next to the base.

        Yields:
            (name inside the module, parameter).
        """
        for name, parameter in self.named_parameters():
            if not name.startswith("base."):
                yield name, parameter

    def stored_name(self, path: str, name: str) -> str:
        """Return the name of a parameter in PEFT's file.

        Args:
            path: of the module in the model.
            name: inside the module.

        Returns:
            The name.
        """
        return f"{PEFT_PREFIX}{path}.{name}"

    def decays(self, name: str) -> bool:
        """Return True if weight decay is for a parameter: by default for matrices.

        A vector that scales a layer would decay to 0, and with it the layer.

        Args:
            name: inside the module.

        Returns:
            True if it is.
        """
        return self.get_parameter(name).dim() > 1

    def is_merged_as_it_is(self, name: str) -> bool:
        """Return True if a merge writes a parameter's values into the base's weight, in its dtype, as they are.

        Args:
            name: inside the module.

        Returns:
            False, by default: they make another weight, or none.
        """
        return False

    def hold(self) -> None:
        """Compute from now on with what depends on the base's weight now, until `let_go`; by default nothing does."""

    def let_go(self) -> None:
        """Follow the base's weight again."""

    def bias_fold(self) -> Fold | None:
        """Say what becomes of the bias of `base` in a merge.

        Returns:
            The fold; None where the bias stays as it is.
        """
        return None

    def fold(self) -> Fold | None:
        """Say what becomes of the weight of `base` in a merge, by the adapter as it is now.

        Returns:
            The fold; None where the weight stays as it is.
        """
        return None

    def made_for_file(self) -> dict[str, Tensor]:
        """Compute the tensors of PEFT's file from what trains, where that is something else.

        Returns:
            By PEFT's names; none where what trains is stored itself.
        """
        return {}

    def stored(self, name: str, values: Tensor) -> Tensor:
        """Return the values of a parameter in the shape of PEFT's file.

        Args:
            name: inside the module.
            values: of any shape, the parameter's.

        Returns:
            The values.
        """
        return values

    def unstored(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return the values of a parameter from those of PEFT's file: the inverse of `stored`.

        Args:
            name: inside the module.
            tensor: of any shape that `stored` gives.

        Returns:
            In the parameter's shape; None where the module cannot have such values.
        """
        return tensor


class AdaptedLinear(AdapterModule, ABC):
    """Wrap a linear layer; over a 4-bit one it is computed by the kernels, with others over the same input as one."""

    may_join = True  # with others over the same input

    @abstractmethod
    def projection(self) -> Projection:
        """Return the layer as the kernels take it, for one call; its base is an NF4Linear.

        Returns:
            Weight, bias and what trains.
        """

    def row_adapter(self) -> RowAdapter | None:
        """Say what the adapter, as it is now, does to rows of a batch whose other rows take others.

        Returns:
            That; None where rows cannot.
        """
        return None


class TrainableBias(nn.Module):
    """Run a module whose bias trains in fp32 while its weights have 16 bits: the bias is cast where the module runs.

    A layer norm, for one, takes weight and bias of one dtype only, and a bias that trains in bf16 loses its updates.

    Args:
        base: the module.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.bias = nn.Parameter(base.get_parameter("bias").detach().float())

    def forward(self, *inputs: object, **named: object) -> object:
        """Run the module with the bias in the dtype of its weights.

        Args:
            *inputs: of the module.
            **named: of the module, by name.

        Returns:
            The module's output.
        """
        bias = self.bias.to(self.base.get_parameter("bias").dtype)
        return torch.func.functional_call(self.base, {"bias": bias}, inputs, named)


def adapter_modules(model: nn.Module) -> dict[str, AdapterModule]:
    """Find the adapted modules of a model.

    Args:
        model: with adapters.

    Returns:
        Modules by path, in the model's order.
    """
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterModule)}


def mark_only_lora_as_trainable(model: nn.Module, bias: BiasMode = "none") -> None:
    """Freeze everything but adapters and the biases that the mode names.

    Args:
        model: with adapters.
        bias: "none"; "lora_only", the biases of adapted layers; or "all", every bias of the model. They become fp32.
    """
    model.requires_grad_(False)
    for module in adapter_modules(model).values():
        for _, parameter in module.own_parameters():
            parameter.requires_grad_(True)
    for path, biased in biased_modules(model, bias):
        parameter = biased.get_parameter("bias")
        if parameter.dtype == torch.float32:
            parameter.requires_grad_(True)
        elif isinstance(biased, NF4Linear):
            biased.bias = nn.Parameter(parameter.detach().float())  # NF4Linear casts its bias itself
        else:
            model.set_submodule(path, TrainableBias(biased))
    check_trainable(model)


def check_trainable(model: nn.Module) -> None:
    """Assert that nothing trains but adapters, in fp32 or bf16, and biases, in fp32.

    Args:
        model: with adapters.
    """
    own = {id(p) for module in adapter_modules(model).values() for _, p in module.own_parameters()}
    for name, parameter in model.named_parameters():
        is_adapter = id(parameter) in own
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
    adapted = adapter_modules(model)
    stored = {
        id(parameter): module.stored_name(path, name)
        for path, module in adapted.items()
        for name, parameter in module.own_parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            path, found, rest = name.rpartition(".base.")
            inside = found and path in adapted  # PEFT calls what a layer wraps its base_layer
            other = PEFT_PREFIX + (f"{path}.base_layer.{rest}" if inside else name)
            yield stored.get(id(parameter), other), parameter


def trained_outside_file(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find what trains and is in no file of the adapter, as the file holds what is made of it.

    Args:
        model: with adapters.

    Returns:
        Parameters by name; none for most kinds of adapters.
    """
    return {
        module.stored_name(path, name): parameter
        for path, module in adapter_modules(model).items()
        if module.file_is_made
        for name, parameter in module.own_parameters()
    }


def leading_ids(model: nn.Module) -> list[int]:
    """Return the ids of a model's virtual tokens, which each of its rows begins with.

    Args:
        model: with or without adapters.

    Returns:
        The ids, beyond those of the vocabulary; none for most kinds of adapters.
    """
    return [token for module in adapter_modules(model).values() for token in module.leading_ids]


def biased_modules(model: nn.Module, mode: BiasMode) -> list[tuple[str, nn.Module]]:
    """List the modules whose bias trains under a mode.

    Args:
        model: with adapters.
        mode: as `mark_only_lora_as_trainable` takes it.

    Returns:
        (path, module) of each.
    """
    adapters = list(adapter_modules(model).values())
    adapted = {id(module.base) for module in adapters}
    own = {id(p) for module in adapters for _, p in module.own_parameters()}
    inner = {id(module.base) for module in model.modules() if isinstance(module, TrainableBias)}
    return [
        (path, module)
        for path, module in model.named_modules()
        if (bias := dict(module.named_parameters(recurse=False)).get("bias")) is not None
        and id(bias) not in own
        and id(module) not in inner
        and (mode == "all" or (mode == "lora_only" and id(module) in adapted))
    ]
