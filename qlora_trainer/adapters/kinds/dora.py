"""Train a norm for each row of a weight next to LoRA's direction: DoRA (Liu et al. 2024, arXiv:2402.09353).

y = m / ||W + s B A|| * (x W^T + s dropout(x) A^T B^T) + bias. The norm is a constant for the gradient, as in the
paper's section 4.3, so a step computes it once for each layer and takes it for all micro-batches. PEFT drops the input
of W too where dropout is on, which is another function; without dropout both are the same.

Legend: O out features, I in features, R rank, N tokens.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_kernels.adapter import OutputScale, Projection
from qlora_kernels.dora import dora_norms, squared_row_norms
from qlora_kernels.lora_linear import add_lora
from qlora_kernels.lora_rows import RowAdapter
from qlora_kernels.saved_tensors import saves_tensors
from qlora_kernels.torch_internals import version_of
from qlora_trainer.adapters.folds import DoraFold
from qlora_trainer.adapters.formulas import dora_factors
from qlora_trainer.adapters.kinds.lora import LoraKind
from qlora_trainer.adapters.kinds.lora_file import LoraFileConfig
from qlora_trainer.adapters.layers import LoRALinear
from qlora_trainer.adapters.trainable import TrainableBias
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.modules.nf4_linear import NF4Linear


class DoRALinear(LoRALinear):
    """Add LoRA to a linear layer and give each row of the sum a norm that trains.

    Args:
        base: as `is_linear` finds it.
        rank: R.
        alpha: of the scaling.
        dropout: probability, of the adapter's input.
        use_rslora: divide alpha by the root of the rank.
        parts: none; rows of a fused layer cannot be adapted alone.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        parts: Sequence[slice] = (),
    ) -> None:
        super().__init__(base, rank, alpha, dropout, use_rslora, parts)
        assert not parts, "a norm is that of a whole row"
        device = self.lora_A.weight.device
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features, dtype=torch.float32, device=device))
        self._squared: tuple[Tensor, Tensor] | None = None  # a 4-bit base's weight, and (O,) fp32 of it
        self._norms: tuple[Any, Tensor] | None = None  # and when they hold
        self._held: Tensor | None = None

    @classmethod
    def from_base(cls, base: nn.Module, **settings: Any) -> Self:
        """Wrap `base`, with LoRA as it starts, and the norms of the base's rows: the base's own output.

        Where the base has no weight yet, or has it only while it runs, they are NaN until an adapter is loaded.

        Args:
            base: as `is_linear` finds it.
            **settings: of `LoRALinear.from_base`.

        Returns:
            The layer.
        """
        layer = super().from_base(base, **settings)
        with torch.no_grad():
            layer.lora_magnitude_vector.copy_(layer.norms() if _has_weight(base) else torch.tensor(torch.nan))
        return layer

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and forget norms that were computed for evaluation.

        Args:
            mode: True to train.

        Returns:
            The layer.
        """
        self._norms = None
        return super().train(mode)

    def forward(
        self,
        x: Tensor,  # (..., I)
    ) -> Tensor:  # (..., O)
        """Compute the layer's output.

        Args:
            x: input, (..., I).

        Returns:
            Output, (..., O).
        """
        if isinstance(self.base, NF4Linear):
            return super().forward(x)
        bias: Tensor | None = getattr(self.base, "bias", None)
        bias = None if bias is None else bias.to(x.dtype)
        with _present(self.base):
            output, factors = self.base(x), self._factors()
        dropped = F.dropout(x, self.dropout, self.training)
        A, B = self.lora_A.weight, self.lora_B.weight
        output = add_lora(output if bias is None else output - bias, dropped, A, B, self.scaling)
        output = (output * factors).to(x.dtype)
        return output if bias is None else output + bias

    def projection(self) -> Projection:
        """Return the layer as the kernels take it, for one call; its base is an NF4Linear.

        Returns:
            Weight, bias, adapter and the scale of the output.
        """
        scale = OutputScale(self._factors(), keeps_output=not saves_tensors())
        plain = super().projection()
        return Projection(plain.weight, plain.bias, plain.adapter, scale)

    def norms(self) -> Tensor:  # (O,) fp32
        """Compute the norm of each row of the adapted weight, without a gradient: in fp32, as a merge does.

        Returns:
            ||W + s B A||.
        """
        base, A, B = self.base, self.lora_A.weight.detach(), self.lora_B.weight.detach()
        if isinstance(base, NF4Linear):
            if self._squared is None or self._squared[0] is not base.packed:
                self._squared = base.packed, squared_row_norms(base.nf4_weight, torch.float32)
            return dora_norms(base.nf4_weight, self._squared[1], A, B, self.scaling, torch.float32)
        with _present(base):
            weight = _weight(base).detach()
            weight = weight if isinstance(_inside(base), nn.Linear) else weight.T
            return dora_norms(weight, squared_row_norms(weight, torch.float32), A, B, self.scaling, torch.float32)

    def hold(self) -> None:
        """Take the norms of now until `let_go`, whatever becomes of the base's weight."""
        self._held = self.norms()

    def let_go(self) -> None:
        """Compute norms again."""
        self._held = None

    def row_adapter(self) -> RowAdapter:
        """Say what the adapter, as it is now, does to rows of a batch whose other rows take others.

        Returns:
            That.
        """
        return replace(super().row_adapter(), output_scale=self._factors().detach())

    def fold(self) -> DoraFold:
        """Say what becomes of the layer's weight in a merge.

        Returns:
            The fold, of the adapter as it is now.
        """
        return DoraFold(self.lora_A.weight, self.lora_B.weight, self.scaling, self.lora_magnitude_vector)

    def _factors(self) -> Tensor:  # (O,) fp32
        """Return what the output is multiplied by; the norms of a step are computed once."""
        return dora_factors(self.own("lora_magnitude_vector"), self._norms_now())

    def _norms_now(self) -> Tensor:
        if self._held is not None:
            return self._held
        switch, _ = self.prepared
        now: Any = None
        if switch.is_on:
            now = switch.serial
        elif not self.training and isinstance(self.base, NF4Linear):
            now = version_of(self.lora_A.weight), version_of(self.lora_B.weight)
        if now is None:
            return self.norms()
        if self._norms is None or self._norms[0] != now:
            self._norms = now, self.norms()
        return self._norms[1]


def _inside(base: nn.Module) -> nn.Module:
    """Return the layer that has the weight: one whose bias trains is wrapped."""
    return base.base if isinstance(base, TrainableBias) else base


def _weight(base: nn.Module) -> Tensor:
    return _inside(base).get_parameter("weight")


def _has_weight(base: nn.Module) -> bool:
    """Return False for a layer on the meta device, and for one that has its weight only while it is in use."""
    return isinstance(base, NF4Linear) or not (_weight(base).is_meta or hasattr(_weight(base), "present"))


def _present(base: nn.Module) -> Any:
    """Let a layer have its weight in the block, where it has it only while it is in use (merging/streamed_model.py)."""
    present = getattr(_weight(base), "present", None)
    return nullcontext() if present is None else present()


class DoraKind(LoraKind):
    """Put DoRALinear in the place of linear layers."""

    name: ClassVar[str] = "dora"
    remakes_outputs: ClassVar[bool] = True
    layer: ClassVar[type[LoRALinear]] = DoRALinear

    def file_config(
        self,
        settings: AdapterConfig,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        paths: Sequence[str],
        named: Mapping[str, Any],
    ) -> LoraFileConfig:
        """Describe an adapter as its file does: LoRA's, with use_dora.

        Args:
            settings: the config's section `adapter`.
            model: with its adapters.
            tensors: of the adapter, by PEFT's names.
            paths: of the adapted layers.
            named: the keys of the base, such as base_model_name_or_path.

        Returns:
            The file's config.
        """
        return super().file_config(settings, model, tensors, paths, named).model_copy(update={"use_dora": True})

    def layer_numbers(self, settings: AdapterConfig, path: str, inputs: int, outputs: int) -> int:
        """Count R (I + O) + O.

        Args:
            settings: the config's section `adapter`.
            path: of the layer.
            inputs: I, features.
            outputs: O, features.

        Returns:
            The count.
        """
        return super().layer_numbers(settings, path, inputs, outputs) + outputs

    def in_words(self, settings: AdapterConfig) -> str:
        """Describe the rank.

        Args:
            settings: the config's section `adapter`.

        Returns:
            A phrase.
        """
        return f"DoRA of {super().in_words(settings)}"


DORA_KIND = DoraKind()
