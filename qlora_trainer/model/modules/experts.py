"""Split fused mixture-of-experts weights into one Linear per expert matrix, so that they can be quantized.

transformers 5 holds the experts of a layer as two 3-D parameters, which no quantizer of linear layers finds: four
fifths of a Mixtral would stay in 16 bits. On disk each expert has three matrices with names. `split_experts` replaces
the fused parameters of an empty model by linear layers with the checkpoint's own names, which are then read, quantized,
fingerprinted and merged as every other layer. The names come from transformers' own conversion mapping. A module is
split only if it computes what SplitExperts computes, which is tried on small weights.

Over 4-bit layers the forward is qlora_kernels' own, which keeps little for backward. Left out: adapters on experts.
PEFT finds no such layers in transformers' fused modules, so an adapter on them could not be used with its base.

Legend: N tokens, K slots of each token, E experts, H hidden size, I the experts' width.
"""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Concatenate, MergeModulelist

from qlora_kernels.experts import Expert, expert_order, expert_turns, gated_experts
from qlora_kernels.torch_internals import copy_with, with_real_tensors
from qlora_trainer.common.dotted_names import ends_in
from qlora_trainer.common.transformers_internals import conversion_mapping, eager_experts_config
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.modules.same_bits import agree, named_activation

FUSED = {"gate_up_proj", "down_proj"}  # transformers' names of the 3-D parameters, (E, 2I, H) and (E, H, I)


class ExpertNames(NamedTuple):
    """Name the matrices of an expert as a checkpoint does, such as w1, w3, w2."""

    gate: str
    up: str
    down: str


class SplitExperts(nn.Module):
    """Hold the experts of one layer: children 0 to E - 1, each with a gate, an up and a down projection.

    The projections have the checkpoint's names, as in "0.w1". They begin on meta.

    Args:
        names: the checkpoint's.
        experts: E.
        hidden: H.
        width: I.
        activation: of the gate.
        dtype: of the weights.
    """

    def __init__(
        self, names: ExpertNames, experts: int, hidden: int, width: int, activation: nn.Module, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.names = names
        self.act_fn = activation
        self.activation = named_activation(activation)
        self.experts = experts
        shapes = {names.gate: (hidden, width), names.up: (hidden, width), names.down: (width, hidden)}
        for index in range(experts):
            layers = {name: nn.Linear(*shape, bias=False, device="meta", dtype=dtype) for name, shape in shapes.items()}
            self.add_module(str(index), nn.ModuleDict(layers))

    def projections(self, index: int) -> list[Any]:
        """Return the layers of an expert, dense or 4-bit.

        Args:
            index: of the expert.

        Returns:
            Gate, up and down.
        """
        expert = self.get_submodule(str(index))
        return [expert.get_submodule(name) for name in self.names]

    @property
    def is_4bit(self) -> bool:
        """Return True if all projections are 4-bit."""
        return all(isinstance(layer, NF4Linear) for index in range(self.experts) for layer in self.projections(index))

    def forward(
        self,
        hidden_states: Tensor,  # (N, H)
        top_k_index: Tensor,  # (N, K) int64
        top_k_weights: Tensor,  # (N, K)
    ) -> Tensor:  # (N, H)
        """Sum each token's experts, weighted: down(activation(gate(x)) * up(x)) * weight.

        Args:
            hidden_states: x.
            top_k_index: the experts of each token, as transformers' routers choose them.
            top_k_weights: of these experts.

        Returns:
            The sums, in the dtype of x.
        """
        if self.is_4bit:
            weights = [
                Expert(*(layer.nf4_weight for layer in self.projections(index))) for index in range(self.experts)
            ]
            return gated_experts(hidden_states, top_k_index, top_k_weights, weights, self.activation)
        order, counts = expert_order(top_k_index, self.experts)
        routing, output = top_k_weights.reshape(-1), torch.zeros_like(hidden_states)
        for index, tokens, slots in expert_turns(order, counts, top_k_index.shape[1]):
            gate, up, down = self.projections(index)
            inputs = hidden_states[tokens]
            weighted = down(self.act_fn(gate(inputs)) * up(inputs)) * routing[slots, None]
            output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


def split_experts(model: Any, stored: Collection[str] = ()) -> list[str]:
    """Replace a model's fused experts by SplitExperts on meta, where both compute the same.

    Args:
        model: of transformers, may be on meta; changed in place.
        stored: the checkpoint's names, if known; experts that are fused there too stay fused.

    Returns:
        The paths of the replaced modules.
    """
    split = []
    for path, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if own.keys() == FUSED and all(p.ndim == 3 for p in module.parameters()):
            names = None if f"{path}.down_proj" in stored else _names(model, path)
            if names is not None and _computes_gated(module):
                down = module.get_parameter("down_proj")
                experts, hidden, width = down.shape
                new = SplitExperts(names, experts, hidden, width, module.get_submodule("act_fn"), down.dtype)
                model.set_submodule(path, new.requires_grad_(False).train(module.training))
                split.append(path)
    return split


def has_experts(model: nn.Module) -> bool:
    """Return True if a model is a mixture of experts; transformers names the classes of all such modules so.

    Args:
        model: any.

    Returns:
        True if a module's class has "experts" in its name.
    """
    return any("experts" in type(module).__name__.lower() for module in model.modules())


def named_as_experts(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """List the names of layers that matrices of the model's experts have too.

    PEFT (0.21) takes an adapter on a layer of such a name for one on the experts, and then does not find those.

    Args:
        model: after `split_experts`.
        paths: of the layers.

    Returns:
        Last parts of their paths, sorted.
    """
    names = {name for module in model.modules() if isinstance(module, SplitExperts) for name in module.names}
    return sorted(names & {path.rpartition(".")[2] for path in paths})


def _names(model: Any, path: str) -> ExpertNames | None:
    """Find the checkpoint's names of the matrices in the mapping that fuses them; None if it does something else."""
    gate_up: list[str] = []
    down: list[str] = []
    _, converters = conversion_mapping(model)
    for entry in converters:
        if len(entry.target_patterns) != 1:
            continue
        target = entry.target_patterns[0]
        kinds = [type(operation) for operation in entry.operations]
        names = [_after_index(source, target.rpartition(".")[0]) for source in entry.source_patterns]
        sources = [name for name in names if name is not None]
        if ends_in(f"{path}.gate_up_proj", target) and kinds == [MergeModulelist, Concatenate]:
            gate_up = sources
        if ends_in(f"{path}.down_proj", target) and kinds == [MergeModulelist]:
            down = sources
    return ExpertNames(*gate_up, *down) if (len(gate_up), len(down)) == (2, 1) else None


def _after_index(pattern: str, of: str) -> str | None:
    """Return "w1" for the pattern ".experts.*.w1.weight", if `of` is ".experts"."""
    before, found, name = pattern.removesuffix(".weight").partition(".*.")
    return name if found and before == of and "." not in name else None


def _computes_gated(fused: nn.Module) -> bool:
    """Return True if a fused module computes what SplitExperts does, by trying it on small weights."""
    experts, hidden, width, tokens = min(4, fused.get_parameter("down_proj").shape[0]), 4, 6, 8
    activation = getattr(fused, "act_fn", None)
    if not isinstance(activation, nn.Module) or next(activation.parameters(), None) is not None:
        return False
    with with_real_tensors(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        matrices = {"gate_up_proj": normal(experts, 2 * width, hidden), "down_proj": normal(experts, hidden, width)}
        small = copy_with(
            fused, parameters={name: nn.Parameter(matrix, requires_grad=False) for name, matrix in matrices.items()}
        )
        vars(small)["config"] = eager_experts_config()
        names = ExpertNames("gate", "up", "down")
        split = SplitExperts(names, experts, hidden, width, activation, torch.float64)
        for index in range(experts):
            own = (*matrices["gate_up_proj"][index].chunk(2), matrices["down_proj"][index])
            for layer, matrix in zip(split.projections(index), own, strict=True):
                layer.weight = nn.Parameter(matrix.clone(), requires_grad=False)
        routing, chosen = normal(tokens, experts).softmax(-1).topk(min(2, experts), dim=-1)
        x = normal(tokens, hidden)
        # Two products of half the rows round differently from one of all, so fp64 results are compared rounded to fp32.
        return agree(lambda: small(x, chosen, routing).float(), lambda: split(x, chosen, routing).float())
