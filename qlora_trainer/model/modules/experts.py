"""Experts as linear layers of their own: what transformers fuses while loading, as the checkpoint has it.

transformers 5 holds the experts of a layer as two 3-D parameters, which no quantizer of linear layers sees: four fifths
of a Mixtral would stay in 16 bits. On disk each expert has three matrices with names. `split_experts` gives an empty
model these matrices back, as linear layers under the checkpoint's own names, so that they are read, quantized, known
again and merged as every other layer is. The names come from transformers' own conversion mapping; whether a module
computes what SplitExperts computes is tried on small weights, and where not, it stays as it is.

Over 4-bit layers the forward is qlora_kernels' own, which keeps little. Left out: adapters on experts. PEFT finds no
such layers in transformers' fused modules, so an adapter on them could not be used next to its base.

Legend: N tokens, K slots of each token, E experts, H hidden size, I the experts' width.
"""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Concatenate, MergeModulelist

from qlora_kernels.experts import Expert, expert_order, expert_turns, gated_experts
from qlora_kernels.torch_internals import copy_with, with_real_tensors
from qlora_trainer.common.transformers_internals import conversion_mapping, eager_experts_config
from qlora_trainer.model.modules.nf4_linear import NF4Linear
from qlora_trainer.model.modules.same_bits import agree, named_activation

FUSED = {"gate_up_proj", "down_proj"}  # transformers' names of the 3-D parameters, (E, 2I, H) and (E, H, I)


class ExpertNames(NamedTuple):
    """What a checkpoint calls the matrices of an expert, such as w1, w3, w2."""

    gate: str
    up: str
    down: str


class SplitExperts(nn.Module):
    """The experts of one layer: children 0 to E - 1, each with a gate, an up and a down projection, and an activation.

    The projections have the checkpoint's names, as in "0.w1".
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
        """Gate, up and down of an expert, dense or 4-bit."""
        expert = self.get_submodule(str(index))
        return [expert.get_submodule(name) for name in self.names]

    @property
    def is_4bit(self) -> bool:
        return all(isinstance(layer, NF4Linear) for index in range(self.experts) for layer in self.projections(index))

    def forward(
        self,
        hidden_states: Tensor,  # (N, H)
        top_k_index: Tensor,  # (N, K) int64
        top_k_weights: Tensor,  # (N, K)
    ) -> Tensor:  # (N, H)
        """The arguments are transformers'."""
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
    """Put SplitExperts, on meta, in the place of a model's fused experts that compute the same; returns their paths.

    Args:
        stored: the checkpoint's names, where they are known: what is fused there too stays so.
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
    """Whether a router chooses where a model's tokens go; transformers calls all such modules experts."""
    return any("experts" in type(module).__name__.lower() for module in model.modules())


def named_as_experts(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Names of layers among these that the matrices of the model's experts have too.

    PEFT (0.21) takes an adapter on a layer of such a name for one on the experts, which it then misses.
    """
    names = {name for module in model.modules() if isinstance(module, SplitExperts) for name in module.names}
    return sorted(names & {path.rpartition(".")[2] for path in paths})


def _names(model: Any, path: str) -> ExpertNames | None:
    """What the checkpoint calls the matrices, by the mapping that fuses them; None where it does something else."""
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
        if _ends_in(f"{path}.gate_up_proj", target) and kinds == [MergeModulelist, Concatenate]:
            gate_up = sources
        if _ends_in(f"{path}.down_proj", target) and kinds == [MergeModulelist]:
            down = sources
    return ExpertNames(*gate_up, *down) if (len(gate_up), len(down)) == (2, 1) else None


def _after_index(pattern: str, of: str) -> str | None:
    """ "w1" of the pattern ".experts.*.w1.weight", where `of` is ".experts"."""
    before, found, name = pattern.removesuffix(".weight").partition(".*.")
    return name if found and before == of and "." not in name else None


def _ends_in(name: str, pattern: str) -> bool:
    return f".{name}".endswith(f".{pattern.removeprefix('.')}")


def _computes_gated(fused: nn.Module) -> bool:
    """Whether a fused module computes what SplitExperts does, by trying it on small weights."""
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
        # Two products of half the rows round otherwise than one: to the last bit the same only after rounding.
        return agree(lambda: small(x, chosen, routing).float(), lambda: split(x, chosen, routing).float())
