"""Combine LoRA adapters of one base into one adapter, a layer at a time, without the base.

    delta = sum of w s B A, over the adapters that have the layer

`cat` puts the factors next to each other, and is that sum; `svd` cuts it to a rank. `linear` sums the A's and the B's
apart, each times the root of w s, which adds products of one adapter's A with another's B. TIES (Yadav et al. 2023,
arXiv:2306.01708) keeps the largest values, and of each place those of the sign that has the larger sum. DARE (Yu et al.
2023, arXiv:2311.03099) drops values at random and scales up the others. All are those of PEFT's `add_weighted_adapter`,
with its treatment of negative weights; ranks and alphas may differ from layer to layer, which PEFT cannot combine.

Legend: O out features, I in features, R rank, S the ranks' sum.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_trainer.adapters.arithmetic.low_rank import (
    balanced_factors,
    largest_singular,
    product_norm,
    product_singular,
)
from qlora_trainer.adapters.arithmetic.methods import CombineSettings
from qlora_trainer.adapters.file_config import PEFT_PREFIX
from qlora_trainer.adapters.folds import LoraFold
from qlora_trainer.adapters.formulas import lora_delta
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.peft_format import StoredAdapter
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.common.progress import Progress, silent

MAX_COMBINED_RANK = 1024  # that adapter.rank may have


@dataclass(frozen=True)
class WeightedAdapter:
    """Hold an adapter that takes part in a sum."""

    name: str  # for messages
    adapter: StoredAdapter
    weight: float


@dataclass(frozen=True)
class CombinedAdapter:
    """Hold the adapter that was made of several."""

    tensors: dict[str, Tensor]  # by PEFT's names; fp32
    ranks: dict[str, int]  # by path
    difference: float  # of its deltas from the weighted sum, relative, over all layers

    def file_config(
        self, target_modules: Sequence[str], base: str | None, revision: str | None, fan_in_fan_out: bool
    ) -> LoraFileConfig:
        """Describe the adapter as its file does; each layer's scaling is 1.

        Args:
            target_modules: names or paths of the adapted layers.
            base: base_model_name_or_path.
            revision: of the base.
            fan_in_fan_out: the base stores its weights (I, O).

        Returns:
            The file's config.
        """
        rank = max(self.ranks.values())
        others = {path: found for path, found in self.ranks.items() if found != rank}
        return LoraFileConfig(
            r=rank,
            lora_alpha=float(rank),
            rank_pattern=others,
            alpha_pattern={path: float(found) for path, found in others.items()},
            target_modules=list(target_modules),
            fan_in_fan_out=fan_in_fan_out,
            base_model_name_or_path=base,
            revision=revision,
        )


@dataclass(frozen=True, eq=False)
class _Share:
    """Hold one adapter's share in a layer."""

    name: str
    lora_A: Tensor  # (R, I) fp32
    lora_B: Tensor  # (O, R) fp32
    scaling: float
    weight: float

    @property
    def factor(self) -> float:
        return self.scaling * self.weight


def combine_adapters(
    parts: Sequence[WeightedAdapter], settings: CombineSettings, progress: Progress = silent
) -> CombinedAdapter:
    """Combine adapters layer by layer; those that have not a layer take no part in it.

    What the settings lack, or have without effect, is refused by a ConfigError.

    Args:
        parts: of one base, which is not looked at here.
        settings: the method, and what it needs.
        progress: is called for each layer.

    Returns:
        The adapter, with the scaling 1.

    Raises:
        AdapterError: an adapter cannot be part of such a sum.
    """
    settings.check()
    for part in parts:
        _refuse_other_kinds(part)
    folds = [_folds(part) for part in parts]
    paths = list(dict.fromkeys(path for found in folds for path in found))
    generator = torch.Generator().manual_seed(settings.seed or 0)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    difference = total = 0.0
    for done, path in enumerate(paths):
        progress("combining adapters", done, len(paths))
        shares = [
            _Share(part.name, fold.lora_A.float(), fold.lora_B.float(), fold.scaling, part.weight)
            for part, found in zip(parts, folds, strict=True)
            if (fold := found.get(path)) is not None
        ]
        _refuse_other_shapes(path, shares, settings)
        lora_A, lora_B = _combined(shares, settings, generator)
        ranks[path] = len(lora_A)
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = lora_A.contiguous()
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = lora_B.contiguous()
        sum_A, sum_B = _side_by_side(shares)
        total += product_norm(sum_A, sum_B) ** 2
        difference += product_norm(torch.cat([lora_A, sum_A]), torch.cat([lora_B, -sum_B], dim=1)) ** 2
    if (rank := max(ranks.values())) > MAX_COMBINED_RANK:
        raise AdapterError(
            f"The combined adapter would have the rank {rank}, and at most {MAX_COMBINED_RANK} can be used. Cut it "
            f"with --method svd --rank {MAX_COMBINED_RANK} or less."
        )
    return CombinedAdapter(tensors, ranks, math.sqrt(difference / total) if total else 0.0)


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum tensors of one shape.

    Args:
        values: of any shape.
        weights: of each.

    Returns:
        The sum.
    """
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total.add_(value, alpha=weight)
    return total


def elected_mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Average, at each place, the weighted values that have the sign of the values' plain sum (TIES).

    Args:
        values: of one shape, any.
        weights: of each.

    Returns:
        The mean over the values that count; 0 where none does.
    """
    is_positive = weighted_sum(values, [1.0] * len(values)) >= 0
    total, count = torch.zeros_like(values[0]), torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        agrees = torch.where(is_positive, value > 0, value < 0)
        total += torch.where(agrees, value * weight, 0.0)
        count += agrees
    return total / count.clamp_min(1.0)


def keep_largest(values: Tensor, density: float) -> Tensor:
    """Zero all but the share of the values that are largest (TIES).

    Args:
        values: of any shape.
        density: the share to keep.

    Returns:
        The values, with zeros.
    """
    if density == 1.0:
        return values
    kept = values.abs().flatten().topk(int(density * values.numel())).indices
    mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    mask[kept] = True
    return torch.where(mask.view(values.shape), values, 0.0)


def keep_some(values: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Zero values at random, and divide the others by the share that is kept, so that the mean is the same (DARE).

    Args:
        values: of any shape, on the CPU.
        density: the probability to be kept.
        generator: of what is drawn.

    Returns:
        The values, with zeros.
    """
    if density == 1.0:
        return values
    kept = torch.bernoulli(torch.full_like(values, density), generator=generator)
    return values * kept / density


def _combined(shares: Sequence[_Share], settings: CombineSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Combine a layer's adapters into one A and B."""
    if settings.method == "cat":
        return _side_by_side(shares)
    if settings.method == "svd":
        assert settings.rank is not None
        return balanced_factors(*product_singular(*_side_by_side(shares), settings.rank))
    if settings.truncates:
        assert settings.rank is not None
        deltas = [lora_delta(share.lora_A, share.lora_B, share.scaling) for share in shares]
        merged = _merged(deltas, [share.weight for share in shares], settings, generator)
        return balanced_factors(*largest_singular(merged, settings.rank, generator))
    # A negative weight turns one factor's sign: turned in both, it would be lost.
    roots = [math.sqrt(abs(share.factor)) for share in shares]
    signed = [math.copysign(root, share.factor) for root, share in zip(roots, shares, strict=True)]
    lora_A = _merged([share.lora_A for share in shares], signed, settings, generator)
    return lora_A, _merged([share.lora_B for share in shares], roots, settings, generator)


def _merged(
    values: Sequence[Tensor], weights: Sequence[float], settings: CombineSettings, generator: torch.Generator
) -> Tensor:
    density = settings.density or 1.0
    if settings.draws:
        values = [keep_some(value, density, generator) for value in values]
    elif settings.prunes:
        values = [keep_largest(value, density) for value in values]
    elects = settings.method.removesuffix("_svd").endswith("ties")
    return elected_mean(values, weights) if elects else weighted_sum(values, weights)


def _side_by_side(shares: Sequence[_Share]) -> tuple[Tensor, Tensor]:
    """Return A (S, I) and B (O, S) whose product is the weighted sum."""
    lora_A = torch.cat([share.lora_A * share.factor for share in shares])
    return lora_A, torch.cat([share.lora_B for share in shares], dim=1)


def _folds(part: WeightedAdapter) -> Mapping[str, LoraFold]:
    found = part.adapter.config.folds(part.adapter.tensors)
    return {path: fold for path, fold in found.items() if isinstance(fold, LoraFold)}


def _refuse_other_kinds(part: WeightedAdapter) -> None:
    config = part.adapter.config
    if config.kind != "lora":
        why = {
            "dora": "it also trains the norm of each row, and norms of a sum are no sum of norms",
            "ia3": "it multiplies weights, and products do not add up",
        }.get(config.kind, "it is no sum of a weight and a product of two thin matrices")
        raise AdapterError(
            f"{part.name} is an adapter of the kind {config.kind}, and only LoRA adapters can be combined: {why}."
        )
    assert isinstance(config, LoraFileConfig)
    if config.bias != "none":
        raise AdapterError(
            f"{part.name} also trained biases (bias: {config.bias}), which take the place of the base's and have no "
            "weighted sum. Train it with adapter.bias=none."
        )
    if config.token_ids:
        raise AdapterError(
            f"{part.name} also trained rows of tokens, which take the place of the base's and have no weighted sum. "
            "Train it without adapter.new_tokens and adapter.trainable_tokens."
        )


def _refuse_other_shapes(path: str, shares: Sequence[_Share], settings: CombineSettings) -> None:
    """Refuse a layer that is another model's, or whose ranks differ where factors are summed."""
    by_factors = not settings.truncates and settings.method != "cat"
    first = shares[0]
    rank, inputs, outputs = *first.lora_A.shape, len(first.lora_B)
    for other in shares[1:]:
        its_rank, its_inputs, its_outputs = *other.lora_A.shape, len(other.lora_B)
        if (its_inputs, its_outputs) != (inputs, outputs):
            raise AdapterError(
                f"{path} has {inputs} inputs and {outputs} outputs in {first.name}, and {its_inputs} and {its_outputs} "
                f"in {other.name}: they were made for different models."
            )
        if by_factors and its_rank != rank:
            raise AdapterError(
                f"--method {settings.method} sums factors of equal rank, and {path} has the rank {rank} in "
                f"{first.name} and {its_rank} in {other.name}. Take --method cat, or svd with --rank."
            )
