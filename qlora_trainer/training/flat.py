"""Hold the adapters of one group in one flat buffer, and their gradients in another.

Why: an adapter is hundreds of small tensors. As one flat parameter they take one optimizer launch, one all-reduce and
one norm, and optimizer state large enough to be paged (bitsandbytes pages tensors of 100,000 elements or more, which a
single rank-16 adapter rarely reaches). Every nn.Parameter keeps its identity and shape: its `.data` and `.grad` become
views. Autograd accumulates in place into a gradient that exists, so after backward the flat gradient is full, as long
as gradients are zeroed in place and never set to None.

Each parameter starts at a multiple of 16 bytes; the padding between is zero and stays zero, since its gradient and so
its moments are zero. Left out: anything about what the parameters mean (inject.py), and saving them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_kernels.adapter import Adapter, StackedA
from qlora_trainer.adapters.inject import lora_layers
from qlora_trainer.adapters.joint import with_stacks_together
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.adapters.trainable import AdapterModule, Switch, adapter_modules, trainable_parameters
from qlora_trainer.config.schema import OptimizerConfig

ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class FlatGroup:
    """Hold parameters that share a flat buffer and a weight decay. Build it with `flatten_parameters`."""

    name: str
    data: nn.Parameter  # (N,) fp32 or bf16; .grad is the flat gradient (N,) of the same dtype, never None
    weight_decay: float
    parameters: dict[str, nn.Parameter]  # in the order of the buffer
    slices: dict[str, slice]  # where each parameter is in the buffer
    other_grads: tuple[Tensor, ...] = ()  # (N,) each: of the workers after the first
    rate_factor: float = 1.0  # times the step's learning rate

    @property
    def grads(self) -> tuple[Tensor, ...]:
        """Return the flat gradient of each worker, the first of them `grad`.

        Returns:
            (N,) each.
        """
        return self.grad, *self.other_grads

    @property
    def grad(self) -> Tensor:
        """Return the flat gradient.

        Returns:
            (N,).
        """
        assert self.data.grad is not None
        return self.data.grad

    def zero_grad(self) -> None:
        """Zero all gradients in place: set to None they would stop being views."""
        for grad in self.grads:
            grad.zero_()

    def add_other_grads(self) -> None:
        """Add what the other workers found to the gradient, in their order."""
        for grad in self.other_grads:
            self.grad.add_(grad)

    def layout(self) -> list[dict[str, object]]:
        """List names and shapes in the order of the buffer; with ALIGNMENT and dtype they give every offset.

        Returns:
            JSON.
        """
        return [{"name": name, "shape": list(parameter.shape)} for name, parameter in self.parameters.items()]

    def check_views(self) -> None:
        """Assert that every parameter and gradient is still a view of the flat buffers.

        `module.to(...)`, `zero_grad(set_to_none=True)` or an assignment to `.data` would detach one silently: it would
        no longer train.
        """
        for name, parameter in self.parameters.items():
            offset = self.slices[name].start
            assert _is_view(parameter, self.data, offset), f"{name} is no longer a view of the flat buffer {self.name}"
            assert parameter.grad is not None, f"the gradient of {name} was set to None; zero it in place"
            assert _is_view(parameter.grad, self.grad, offset), (
                f"the gradient of {name} is no longer a view of the flat gradient of {self.name}"
            )


def flatten_parameters(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    name: str,
    weight_decay: float,
    workers: int = 1,
    rate_factor: float = 1.0,
) -> FlatGroup:
    """Move parameters into one flat buffer, keeping their values; gradients start at zero.

    Args:
        named: trainable parameters by name, on one device, all fp32 or all bf16; their order stays.
        name: of the group.
        weight_decay: of the group.
        workers: threads that add gradients at once.
        rate_factor: of the group; its learning rate is so many times the step's.

    Returns:
        The group.
    """
    parameters = dict(named)
    assert parameters, f"the group {name} has no parameters"
    assert len({id(parameter) for parameter in parameters.values()}) == len(parameters), "a parameter is given twice"
    first = next(iter(parameters.values()))
    device, dtype = first.device, first.dtype
    assert dtype in (torch.float32, torch.bfloat16), f"adapters are {dtype}; they train in fp32 or bf16"
    alignment = ALIGNMENT // dtype.itemsize  # elements
    slices: dict[str, slice] = {}
    end = 0
    for key, parameter in parameters.items():
        assert parameter.dtype == dtype, f"{key} is {parameter.dtype}, the others {dtype}"
        assert parameter.requires_grad, f"{key} is frozen"
        assert parameter.device == device, f"{key} is on {parameter.device}, the others on {device}"
        start = math.ceil(end / alignment) * alignment
        end = start + parameter.numel()
        slices[key] = slice(start, end)

    size = math.ceil(end / alignment) * alignment
    flat = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
    flat.grad = torch.zeros_like(flat)
    for key, parameter in parameters.items():
        where = slices[key]
        view = flat.detach()[where].view(parameter.shape)
        view.copy_(parameter.detach())
        parameter.data = view
        parameter.grad = flat.grad[where].view(parameter.shape)
    others = tuple(torch.zeros_like(flat.grad) for _ in range(workers - 1))
    return FlatGroup(name, flat, weight_decay, parameters, slices, others, rate_factor)


def group_trainable(model: nn.Module, settings: OptimizerConfig, workers: int = 1) -> list[FlatGroup]:
    """Move all that trains into flat groups: of one dtype, weight decay and learning rate each.

    LoRA's factors come first, those of layers over one input together. Biases of the base, and what a kind of adapter
    says of its parameters, have no weight decay.

    Args:
        model: with its adapters.
        settings: the config's section `optimizer`.
        workers: threads that add gradients at once.

    Returns:
        The groups, in an order that depends on the model and settings alone.
    """
    trainable = dict(trainable_parameters(model))
    adapted = list(lora_layers(model).values())
    factors = {id(p) for layer in adapted for p in (layer.lora_A.weight, layer.lora_B.weight)}
    decaying = {
        id(p)
        for module in adapter_modules(model).values()
        for name, p in module.own_parameters()
        if module.decays(name)
    }
    members: dict[tuple[str, torch.dtype, float], list[tuple[str, nn.Parameter]]] = {}
    lora = with_stacks_together([(name, p) for name, p in trainable.items() if id(p) in factors], adapted)
    for name, p in [*lora, *((name, p) for name, p in trainable.items() if id(p) not in factors)]:
        ratio = settings.lora_plus_ratio if name.endswith(".lora_B.weight") else 1.0
        if id(p) in factors:
            group = "lora" if settings.lora_plus_ratio == 1.0 else name.split(".")[-2]
        else:
            group = "matrix" if id(p) in decaying else "bias"
        members.setdefault((group, p.dtype, ratio), []).append((name, p))
    return [
        flatten_parameters(
            named,
            name=group,
            weight_decay=0.0 if group == "bias" else settings.weight_decay,
            workers=workers,
            rate_factor=ratio,
        )
        for (group, _, ratio), named in members.items()
    ]


def grad_norm(groups: Sequence[FlatGroup]) -> Tensor:  # () fp32
    """Compute the L2 norm of all gradients together, summed in fp32; NaN or infinite where any gradient is.

    Args:
        groups: all that train.

    Returns:
        The norm.
    """
    norms = [torch.linalg.vector_norm(group.grad, dtype=torch.float32) for group in groups]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_(groups: Sequence[FlatGroup], max_norm: float, norm: Tensor) -> None:
    """Scale gradients in place so that their norm is at most `max_norm`.

    Args:
        groups: all that train.
        max_norm: the bound.
        norm: (), as `grad_norm` gave it, finite: scaling by NaN would poison every gradient.
    """
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6: torch.nn.utils.clip_grad_norm_ does the same
    for group in groups:
        group.grad.mul_(coefficient)


def _is_view(tensor: Tensor, flat: Tensor, offset: int) -> bool:
    return tensor.untyped_storage() is flat.untyped_storage() and tensor.storage_offset() == offset


class PreparedAdapters:
    """Hold adapters as a training step takes them: in the dtype of computation too, with places for their gradients.

    All views are made once, as hundreds of them cost a step as many operations; a step casts a whole group at once.
    Backward adds to the gradients, and each worker to gradients of its own.

    Args:
        adapted: the model's layers with adapters.
        groups: that hold them.
        dtype: of computation.
        modules: all with adapters; what trains in them but LoRA's factors gets its gradients from autograd.
    """

    def __init__(
        self,
        adapted: Sequence[LoRALinear],
        groups: Sequence[FlatGroup],
        dtype: torch.dtype,
        modules: Iterable[AdapterModule] = (),
    ) -> None:
        self.adapted, self.groups, self.modules = adapted, groups, list(modules)
        self.switch = Switch()
        self._casts: list[tuple[Tensor, Tensor]] = []  # (N,) of a group, as trained and as computed with
        self._make(dtype)

    @property
    def casts(self) -> list[Tensor]:
        """Return the groups in the dtype of computation, as far as they train in another.

        Returns:
            (N,) each.
        """
        return [cast for _, cast in self._casts]

    @contextmanager
    def for_a_step(self) -> Iterator[None]:
        """Let layers take their adapters so in the block; gradients of all workers are added up after it.

        For forward and backward passes: the adapters must not change inside, nor lose their gradients.
        """
        for trained, cast in self._casts:
            cast.copy_(trained)
        self.switch.is_on = True
        self.switch.serial += 1
        try:
            yield
            for group in self.groups:
                group.add_other_grads()
        finally:
            self.switch.is_on = False

    def _make(self, dtype: torch.dtype) -> None:
        casts: dict[int, Tensor] = {}
        trained = {id(p) for layer in self.adapted for p in (layer.lora_A.weight, layer.lora_B.weight)}
        for group in self.groups:
            if group.data.dtype == dtype or trained.isdisjoint(map(id, group.parameters.values())):
                continue
            flat = torch.empty_like(group.data, dtype=dtype, requires_grad=False)
            self._casts.append((group.data.detach(), flat))
            for name, p in group.parameters.items():
                casts[id(p)] = flat.as_strided(p.shape, p.stride(), group.slices[name].start)
        grads = _grads_of_workers(self.groups)
        for module in self.modules:
            others = {name: p for name, p in module.own_parameters() if id(p) not in trained}
            if others:
                module.of_workers = self.switch, _of_workers(others, grads)
        stacks: dict[int, list[StackedA]] = {}
        for layer in self.adapted:
            A, B = layer.lora_A.weight, layer.lora_B.weight
            cast = (casts[id(A)], casts[id(B)], casts[id(B)].T) if id(A) in casts else None
            if layer.joint and layer is layer.joint[0]:
                stacks.update(_stacked(layer.joint, casts, grads))
            stacked: Sequence[StackedA | None] = stacks.get(id(layer)) or [None] * len(grads[id(A)])
            by_worker = [
                Adapter(A, B, layer.scaling, casts=cast, grads=(grad_A, grad_B.T), stacked=one)
                for grad_A, grad_B, one in zip(grads[id(A)], grads[id(B)], stacked, strict=True)
            ]
            layer.prepared = self.switch, by_worker


def _of_workers(
    own: Mapping[str, nn.Parameter], grads: Mapping[int, Sequence[Tensor]]
) -> list[Mapping[str, nn.Parameter]]:
    """Return a module's parameters for each worker: its own for the first, ones of the same values for the others."""
    found = [own]
    for of_worker in list(zip(*(grads[id(p)] for p in own.values()), strict=True))[1:]:
        others = {name: nn.Parameter(p.data) for name, p in own.items()}
        for other, grad in zip(others.values(), of_worker, strict=True):
            other.grad = grad
        found.append(others)
    return found


def _grads_of_workers(groups: Sequence[FlatGroup]) -> dict[int, list[Tensor]]:
    """Return the gradients of each parameter, by its id, of the first worker and of the others."""
    found = {}
    for group in groups:
        for name, p in group.parameters.items():
            assert p.grad is not None, "gradients are views of a flat buffer; see FlatGroup.check_views"
            others = [grad[group.slices[name]].view(p.shape) for grad in group.other_grads]
            found[id(p)] = [p.grad, *others]
    return found


def _stacked(
    joint: Sequence[LoRALinear], casts: Mapping[int, Tensor], grads: Mapping[int, Sequence[Tensor]]
) -> dict[int, list[StackedA]]:
    """Find the A's of layers over one input as one matrix, for each worker; by the layers' ids.

    None are found where they are scaled apart, or lie apart in memory.
    """
    parameters = [layer.lora_A.weight for layer in joint]
    A = _below_each_other([casts.get(id(parameter), parameter.detach()) for parameter in parameters])
    of_workers = [_below_each_other(of) for of in zip(*(grads[id(p)] for p in parameters), strict=True)]
    if A is None or len({layer.scaling for layer in joint}) > 1:
        return {}
    stacked = [StackedA(len(joint), A, grad) for grad in of_workers if grad is not None]
    return {id(layer): stacked for layer in joint}


def _below_each_other(matrices: Sequence[Tensor]) -> Tensor | None:
    """Return matrices of the same width as one, without a copy; None where they do not follow each other in memory."""
    first, end = matrices[0], matrices[0].storage_offset()
    for matrix in matrices:
        if matrix.storage_offset() != end or matrix.untyped_storage() is not first.untyped_storage():
            return None
        end += matrix.numel()
    return first.as_strided((sum(map(len, matrices)), first.shape[1]), first.stride())
