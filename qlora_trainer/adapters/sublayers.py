"""Find the parts of each decoder layer whose outputs it adds to the hidden states: its attention and its MLP.

Which they are is found by trying, not by a list of names: the layer's own forward is run with functions in the place of
its children, and autograd says whose outputs are in the sum with the layer's input. So a layer that keeps the two
matrices of its MLP as children of its own (OPT) has the second of them as its MLP's last part, and a layer whose parts
add the hidden states themselves (BLOOM) is refused: behind such a part nothing could be put in front of the sum.

Left out: what is put behind them (bottleneck.py).

Legend: B batch, T tokens, H hidden size.
"""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.torch_internals import with_real_tensors
from qlora_trainer.adapters.joint import with_children
from qlora_trainer.adapters.targets import looks_like_attention
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.model.modules.decoder_layers import decoder_layers
from qlora_trainer.model.modules.experts import SplitExperts
from qlora_trainer.model.modules.nf4_linear import is_linear
from qlora_trainer.model.modules.same_bits import ERRORS_OF_A_CALL

_SHAPE = (1, 4, 8)  # (B, T, H) that is tried
_FORMS: Sequence[Callable[[Tensor], Any]] = (lambda x: (x, None), lambda x: x, lambda x: (x, None, None))
"""What attention and MLPs return; of a batch of one, no form but its own can be unpacked."""


def find_sublayers(model: Any) -> dict[str, str]:
    """Find what each decoder layer adds to its hidden states.

    Args:
        model: of transformers, without adapters.

    Returns:
        "attention" or "mlp", which is all that is no attention, by path.

    Raises:
        AdapterError: the model has no decoder layers, or some that cannot be tried, or that add elsewhere.
    """
    layers = decoder_layers(model) if hasattr(model, "config") else []
    if not layers:
        raise AdapterError(
            f"{type(model).__name__} has no list of decoder layers, and so no attention and MLP that a bottleneck "
            "adapter could be put behind. Set adapter.kind=lora."
        )
    paths = {id(module): path for path, module in model.named_modules()}
    known: dict[tuple[type, tuple[tuple[str, type], ...]], list[str]] = {}
    found = {}
    for layer in layers:
        key = type(layer), tuple((name, type(child)) for name, child in layer.named_children())
        if key not in known:
            known[key] = _added_children(layer)
        for name in known[key]:
            found[f"{paths[id(layer)]}.{name}"] = _part(name, layer.get_submodule(name))
    return found


def _added_children(layer: nn.Module) -> list[str]:
    """Return the names of the children whose outputs a decoder layer adds to its input."""
    names = [name for name, child in layer.named_children() if _has_matrices(child)]
    for forms in itertools.product(_FORMS, repeat=len(names)):
        with with_real_tensors(), torch.enable_grad():
            hidden, *outputs = (torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0)) for _ in ("", *names))
            given = [tensor.requires_grad_() for tensor in (hidden, *outputs)]
            children = {name: _giving(output, form) for name, output, form in zip(names, outputs, forms, strict=True)}
            try:
                result = _run(layer, children, hidden)
                grads = torch.autograd.grad(result.sum(), given, allow_unused=True)
            except ERRORS_OF_A_CALL:
                continue  # it takes outputs of another form
            has_hidden, *has_outputs = (grad is not None and bool(grad.any()) for grad in grads)
        added = [name for name, is_added in zip(names, has_outputs, strict=True) if is_added]
        if added and not has_hidden:
            raise _refusal(layer, f"leaves it to {' and '.join(added)} to add the hidden states to their output")
        if added:
            return added
    raise _refusal(layer, "shows no attention or MLP whose output it adds to the hidden states, tried with others")


def _run(layer: nn.Module, children: Mapping[str, Any], hidden: Tensor) -> Tensor:
    """Run a layer with these children; norms, activations and dropout are left out, and factors of its own are 1."""
    others: dict[str, Any] = {name: lambda x, *arguments, **named: x for name, _ in layer.named_children()}
    own = itertools.chain(layer.named_parameters(recurse=False), layer.named_buffers(recurse=False))
    children = {**others, **{name: torch.ones(()) for name, _ in own}, **children}
    function = type(layer).forward
    _, _, *parameters = inspect.signature(function).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    tried = with_children(layer, children)
    tried.training = False  # of this copy: no dropout
    result = function(tried, hidden, **{p.name: None for p in needed})
    return result if isinstance(result, Tensor) else result[0]


def _giving(output: Tensor, form: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """Return a function that gives a tensor in some form, whatever it is given; a new one, as layers write to it."""
    return lambda *arguments, **named: form(output.clone())


def _part(name: str, child: nn.Module) -> str:
    """Say what a child of a decoder layer is, by the names that target_modules=attention goes by."""
    return "attention" if looks_like_attention(name, child) else "mlp"


def _has_matrices(module: nn.Module) -> bool:
    holds = any(is_linear(each) or isinstance(each, SplitExperts) for each in module.modules())
    return holds or any(parameter.dim() > 1 for parameter in module.parameters())


def _refusal(layer: nn.Module, reason: str) -> AdapterError:
    return AdapterError(
        f"{type(layer).__name__} {reason}; so a bottleneck adapter has no place before the sum. Set adapter.kind=lora."
    )
