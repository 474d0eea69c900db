"""Run the layers of a module that have the same input as one function: the input is kept once, its gradient added up.

Which they are is found by trying: the module's forward is run with functions in the place of its layers, which note
what they are given. So there is no list of models; where a module computes something between, such as a norm of one
layer's input alone, that layer stays apart. In training the module's own code runs on, and asks for each output where
it wants it: the first call computes all, and a call with another input is that layer's alone. Nothing is held from one
call of the module to the next, so several threads may be in it at once.

Left out: the function (qlora_kernels.lora_linear), and layers whose bases are not 4-bit or that are adapted in parts.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.lora_linear import nf4_linears
from qlora_kernels.torch_internals import has_hooks, version_of, with_real_tensors
from qlora_trainer.adapters.layers import LoRALinear, linear_facts, projection_of
from qlora_trainer.adapters.trainable import AdaptedLinear
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.modules.same_bits import ERRORS_OF_A_CALL

TOKENS_TRIED = 4


class JointLayers:
    """Hold 4-bit layers over one input, adapted or not; those adapted know each other, so that their A's are stacked.

    Args:
        layers: for which `may_join` is true, of the same number of input features.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers: tuple[NF4Linear | AdaptedLinear, ...] = tuple(layers)
        adapted = tuple(layer for layer in layers if isinstance(layer, LoRALinear))
        for layer in adapted:
            layer.joint = adapted if len(adapted) > 1 else ()

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the layers' outputs.

        Args:
            x: input, (..., I).

        Returns:
            (..., O) of each layer.
        """
        for layer in self.layers:
            if has_hooks(layer):
                return tuple(layer(x) for layer in self.layers)
        return nf4_linears(x, [projection_of(layer) for layer in self.layers])


class JointForward:
    """Run a module's own forward so that its layers over one input are computed together.

    Args:
        module: whose forward it is.
        function: the forward, to be called with the module.
        groups: names of children over one input, each group with more than one.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], groups: Sequence[Sequence[str]]) -> None:
        self.module, self.function = module, function
        self.groups = [(names, JointLayers([module.get_submodule(name) for name in names])) for names in groups]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Run the module.

        Args:
            *arguments: of its forward.
            **named: of its forward, by name.

        Returns:
            What it returns.
        """
        given: dict[str, Any] = {}
        for names, layers in self.groups:
            outputs = _Outputs(layers)
            for place, name in enumerate(names):
                given[name] = _InPlaceOf(layers.layers[place], functools.partial(outputs.take, place))
        return self.function(_with_children(self.module, given), *arguments, **named)


class _Outputs:
    """Hold the outputs of joint layers during one call of their module, each until it is asked for.

    Args:
        layers: of the module.
    """

    def __init__(self, layers: JointLayers) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.values: list[Tensor | None] = []

    def take(self, place: int, x: Tensor) -> Tensor:
        if self.x is None:
            self.x, self.values = x, list(self.layers(x))
        value = self.values[place] if x is self.x else None
        if value is None:
            return self.layers.layers[place](x)
        self.values[place] = None
        return value


class _InPlaceOf:
    """Take the place of a layer for one call of its module, with the layer's attributes.

    Args:
        layer: of the module.
        call: what is called instead of it.
    """

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor]) -> None:
        self.layer, self.call = layer, call

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        return self.call(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def may_join(layer: nn.Module) -> bool:
    """Return True if a layer can be computed with others over its input.

    Args:
        layer: any module.

    Returns:
        True for a 4-bit one, adapted whole or not at all.
    """
    base = layer.base if isinstance(layer, AdaptedLinear) and layer.may_join else layer
    return isinstance(base, NF4Linear)


def join_layers(modules: Iterable[nn.Module]) -> int:
    """Let modules compute their layers over one input together, where trying shows that they have such.

    Args:
        modules: of one model, with the forward that they are to have but for this.

    Returns:
        How many of them do.
    """
    count = 0
    for module in modules:
        layers = {name: child for name, child in module.named_children() if may_join(child)}
        forward = vars(module).get("forward") or MethodType(type(module).forward, module)
        if isinstance(forward, JointForward):
            forward = MethodType(forward.function, module)
        if len(layers) > 1 and isinstance(forward, MethodType) and forward.__self__ is module:
            function: Callable[..., Any] = forward.__func__
            groups = over_one_input(module, function, layers)
            if groups:
                module.forward = JointForward(module, function, groups)
                count += 1
    return count


def with_stacks_together(
    named: Iterable[tuple[str, nn.Parameter]], adapted: Iterable[LoRALinear]
) -> list[tuple[str, nn.Parameter]]:
    """Order the adapters' parameters so that the A's of layers over one input follow each other.

    Args:
        named: A's and B's of the layers, by name.
        adapted: the layers, in the model's order.

    Returns:
        The same ones.
    """
    names = {id(parameter): name for name, parameter in named}
    order: list[Any] = []
    for layer in adapted:
        together = layer.joint or (layer,)
        if layer is together[0]:
            order += [one.lora_A.weight for one in together] + [one.lora_B.weight for one in together]
    assert len(order) == len(names), "each layer is joint with those that name it"
    return [(names[id(parameter)], parameter) for parameter in order]


def over_one_input(module: nn.Module, function: Callable[..., Any], layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Find which layers a module calls once each with the same tensor, before it needs what cannot be tried.

    Args:
        module: holds the layers.
        function: its forward.
        layers: children by name.

    Returns:
        Groups of names, each in the order in which the module calls them, and of more than one.
    """
    called: list[tuple[Tensor, int, str]] = []

    def noting(name: str, out_features: int) -> Callable[..., Tensor]:
        def forward(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
            called.append((x, version_of(x), name))
            return x.new_zeros(*x.shape[:-1], out_features)

        return forward

    facts = {
        name: linear_facts(layer.base if isinstance(layer, AdaptedLinear) else layer) for name, layer in layers.items()
    }
    stubs: dict[str, Any] = {name: _InPlaceOf(layer, noting(name, facts[name][1])) for name, layer in layers.items()}
    for name, child in module.named_children():
        if name not in stubs and any(True for _ in (*child.parameters(), *child.buffers())):
            stubs[name] = lambda x, *arguments, **named: torch.zeros_like(x)  # a tensor of its own, as of a norm
    _, *parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    with with_real_tensors(), torch.no_grad():
        x = torch.zeros(1, TOKENS_TRIED, next(iter(facts.values()))[0])
        with contextlib.suppress(*ERRORS_OF_A_CALL):  # it goes as far as it can
            function(_with_children(module, stubs), x, **{p.name: None for p in needed})
    groups: dict[tuple[int, int], list[str]] = {}
    names = [name for _, _, name in called]
    for given, version, name in called:
        if names.count(name) == 1 and facts[name][0] == given.shape[-1]:
            groups.setdefault((id(given), version), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _with_children(module: nn.Module, children: Mapping[str, Any]) -> nn.Module:
    """Return a module that has the same attributes, but for some children; it is thrown away after one call."""
    other = object.__new__(type(module))
    vars(other).update(vars(module))
    vars(other).update(children)  # found before a module's own, which it keeps elsewhere
    return other
