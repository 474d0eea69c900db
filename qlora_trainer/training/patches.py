"""Replace the forward of a model's gated MLPs, norms and rotary embedding by one that keeps and moves less.

A model's own modules stay, with their names and weights; only their `forward` is replaced. Which are, is decided by
trying: a copy of the module with small weights is run, and the formula of qlora_kernels on the same values, from tiny
to huge. Where the results differ in one bit, or the module cannot be run so, it stays as it is. So there is no list of
models, and no module that only looks like another is taken for it. Rotary embedding is found the same way (rotary.py).

Left out: the formulas (qlora_kernels), and what is kept of a whole layer (memory/activations.py).
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.gated import Activation
from qlora_kernels.gated_linear import gated_nf4_linear
from qlora_kernels.rms_norm import Form, rms_norm
from qlora_kernels.tiling import tiled
from qlora_kernels.torch_internals import copy_with, with_real_tensors
from qlora_trainer.adapters.joint import JointLayers, join_layers, may_join
from qlora_trainer.adapters.layers import projection_of
from qlora_trainer.adapters.trainable import AdaptedLinear
from qlora_trainer.common.units import counted
from qlora_trainer.model.modules.experts import SplitExperts
from qlora_trainer.model.modules.nf4_linear import NF4Linear, is_linear
from qlora_trainer.model.modules.same_bits import SIZES, agree, named_activation
from qlora_trainer.training.rotary import patch_rotary

Split = Callable[[Tensor], tuple[Tensor, Tensor]]
FEWEST_TILE_TOKENS, MOST_TILE_TOKENS = 256, 2048  # each tile dequantizes the weights again: a tenth of 2,048's time
MOST_TILES = 32  # of a row so long that it would have more, tiles are larger


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """Count the modules that keep little for backward, by kind, and all modules of that kind: (those that do, all)."""

    projections: tuple[int, int]
    mlps: tuple[int, int]
    norms: tuple[int, int]

    def __str__(self) -> str:
        kinds = {"projection": self.projections, "MLP": self.mlps, "norm": self.norms}
        return ", ".join(f"{replaced} of {counted(count, kind)}" for kind, (replaced, count) in kinds.items() if count)


class GatedMLP:
    """Run a gated MLP, down(activation(gate(x)) * up(x)), keeping gate and up and not their product.

    Args:
        gate_and_up: x -> (gate, up).
        activation: of the gate.
        down: the last projection.
    """

    def __init__(self, gate_and_up: Split, activation: Activation, down: NF4Linear | AdaptedLinear) -> None:
        self.gate_and_up = gate_and_up
        self.activation = activation
        self.down = down
        self.tiles = 1  # take the tokens in so many parts, or more

    def __call__(self, x: Tensor) -> Tensor:
        """Run the MLP, in tiles of tokens if `tiles` is more than 1.

        Args:
            x: input, (..., H).

        Returns:
            Output, (..., H).
        """
        tokens = x.numel() // x.shape[-1]
        tile = tokens if self.tiles == 1 else tile_tokens(tokens, self.tiles)
        return self.run(x) if tile >= tokens else tiled(self.run, x, tile)

    def run(self, x: Tensor) -> Tensor:
        """Run the MLP on tokens, all at once.

        Args:
            x: (..., hidden size).

        Returns:
            (..., hidden size).
        """
        gate, up = self.gate_and_up(x)
        return gated_nf4_linear(gate, up, self.activation, *projection_of(self.down))


def tile_tokens(tokens: int, tiles: int) -> int:
    """Return how many tokens a tile of an MLP has.

    Args:
        tokens: of the micro-batch.
        tiles: parts to take them in.

    Returns:
        Tokens: fewer where a tile would be large, and not so few that products would be small.
    """
    most = max(MOST_TILE_TOKENS, -(-tokens // MOST_TILES))
    return max(min(-(-tokens // tiles), most), FEWEST_TILE_TOKENS)


def patch_model(model: nn.Module) -> PatchReport:
    """Replace the forward of every gated MLP, norm and attention with rotary embedding that is recognized.

    Call it once adapters are in place.

    Args:
        model: of transformers.

    Returns:
        What keeps little for backward now.
    """
    modules = list(model.modules())
    linear = [module for module in modules if isinstance(module, AdaptedLinear)]
    norms = [module for module in modules if _is_norm(module)]
    mlps = [module for module in modules if _is_mlp(module)]
    patched_norms = 0
    for norm in norms:
        found = rms_norm_form(norm)
        if found is not None:
            norm.forward = functools.partial(_norm_forward, norm, *found)
        patched_norms += found is not None or isinstance(norm, nn.LayerNorm)  # torch's own keeps no more
    experts = [module for module in modules if isinstance(module, SplitExperts)]
    patched_mlps = sum(module.is_4bit for module in experts)  # by their own forward
    for mlp in mlps:
        gated = gated_mlp(mlp)
        if gated is not None:
            mlp.forward = gated
            patched_mlps += 1
    patch_rotary(modules)
    join_layers(modules)
    return PatchReport(
        projections=(sum(isinstance(layer.base, NF4Linear) for layer in linear), len(linear)),
        mlps=(patched_mlps, len(mlps) + len(experts)),
        norms=(patched_norms, len(norms)),
    )


def tile_mlps(model: nn.Module, tiles: int) -> None:
    """Make every replaced MLP take the tokens in parts.

    Args:
        model: patched.
        tiles: parts, or more where those would be large; 1: whole.
    """
    for module in model.modules():
        if isinstance(module.forward, GatedMLP):
            module.forward.tiles = tiles


def rms_norm_form(norm: nn.Module) -> tuple[float, Form] | None:
    """Find the form of `rms_norm` that a module computes.

    Args:
        norm: any module.

    Returns:
        (eps, form); None where it computes something else.
    """
    own = dict(norm.named_parameters(recurse=False))
    weight = own.get("weight")
    eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, name)), None)
    if (
        weight is None
        or weight.requires_grad
        or not isinstance(eps, float)
        or next(norm.buffers(recurse=False), None) is not None
        or len(own) != 1
    ):
        return None
    forms: tuple[Form, ...] = ("scale_after_cast", "scale_before_cast", "weight_before_cast")
    if not _takes_one_argument(norm):
        return None
    return next(
        ((eps, form) for form in forms if all(_normalizes(norm, eps, form, width) for width in (64, 192))), None
    )


def _normalizes(norm: nn.Module, eps: float, form: Form, width: int) -> bool:
    """Return True if the module, given a random weight of this width, is RMS normalization in this form."""
    dtype = norm.get_parameter("weight").dtype
    with with_real_tensors(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(width, generator=generator).to(dtype)
        x = (torch.randn(32, width, generator=generator) * SIZES[:, None]).to(dtype)
        small = copy_with(norm, parameters={"weight": nn.Parameter(probe, requires_grad=False)})
        return agree(lambda: small(x), lambda: rms_norm(x, probe, eps, form))


def gated_mlp(mlp: nn.Module) -> GatedMLP | None:
    """Make the forward that keeps little, where the module is a gated MLP over a 4-bit down projection.

    Its children are a gate and an up projection, or one that holds both, a down projection, and an activation.

    Args:
        mlp: any module.

    Returns:
        The forward; None where the module is something else.
    """
    linear = {name: child for name, child in mlp.named_children() if _is_projection(child)}
    others = [child for name, child in mlp.named_children() if name not in linear]
    if len(others) != 1 or next(others[0].parameters(), None) is not None or isinstance(others[0], nn.Identity):
        return None
    if not _takes_one_argument(mlp):
        return None
    activation = others[0]
    for names in itertools.permutations(linear):
        down = linear[names[-1]]
        is_4bit = isinstance(down.base if isinstance(down, AdaptedLinear) else down, NF4Linear)
        if is_4bit and len(names) in (2, 3) and _computes_gated(mlp, names, activation):
            inside = [linear[name] for name in names[:-1]]
            is_joint = len(inside) == 2 and all(may_join(layer) for layer in inside)
            split: Any = JointLayers(inside) if is_joint else _split(inside)
            return GatedMLP(split, named_activation(activation), down)  # type: ignore[arg-type]
    return None


def _computes_gated(mlp: nn.Module, names: Sequence[str], activation: nn.Module) -> bool:
    """Return True if the module computes down(activation(gate(x)) * up(x)) with these children, down last."""
    hidden, width = 4, 6
    with with_real_tensors(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        sizes = [(2 * width, hidden)] if len(names) == 2 else [(width, hidden)] * 2
        weights = [torch.randn(size, generator=generator, dtype=torch.float64) for size in [*sizes, (hidden, width)]]
        stubs = [_stub(weight) for weight in weights]
        x = torch.randn(32, hidden, generator=generator, dtype=torch.float64) * SIZES[:, None]
        small = copy_with(mlp, children=dict(zip(names, stubs, strict=True)))

        def expected() -> Tensor:
            gate, up = _split(stubs[:-1])(x)
            return stubs[-1](activation(gate) * up)

        return agree(lambda: small(x), expected)


def _split(projections: Sequence[nn.Module]) -> Split:
    """Make x -> (gate, up) of two projections, or of the halves of one."""
    if len(projections) == 1:
        return lambda x: projections[0](x).chunk(2, dim=-1)
    gate, up = projections
    return lambda x: (gate(x), up(x))


def _takes_one_argument(module: nn.Module) -> bool:
    """Return True if the module can be called with its input alone: the replaced forward takes no second argument."""
    return len(inspect.signature(type(module).forward).parameters) == 2


def _stub(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _norm_forward(norm: nn.Module, eps: float, form: Form, x: Tensor) -> Tensor:
    return rms_norm(x, norm.weight, eps, form)  # type: ignore[arg-type]


def _is_projection(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLinear) or is_linear(module)


def _is_norm(module: nn.Module) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1


def _is_mlp(module: nn.Module) -> bool:
    """Return True for at least two projections and something without weights that is no attention: an activation."""
    if isinstance(module, AdaptedLinear) or "attention" in type(module).__name__.lower():
        return False
    children = list(module.children())
    others = [child for child in children if not _is_projection(child)]
    return len(children) - len(others) >= 2 and any(next(child.parameters(), None) is None for child in others)
