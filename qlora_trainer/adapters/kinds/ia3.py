"""Train a vector that scales keys, values and the inputs of MLPs' last layers: IA3 (Liu et al. 2022, arXiv:2205.05638).

Legend: O out features, I in features.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora_kernels.adapter import OutputScale, Projection
from qlora_kernels.lora_linear import nf4_linears
from qlora_kernels.lora_rows import RowAdapter
from qlora_kernels.saved_tensors import saves_tensors
from qlora_trainer.adapters.folds import ScaleFold
from qlora_trainer.adapters.kinds.ia3_file import Ia3FileConfig
from qlora_trainer.adapters.kinds.kind import AdapterKind
from qlora_trainer.adapters.layers import linear_facts
from qlora_trainer.adapters.targets import last_of_mlps, target_names
from qlora_trainer.adapters.tokens.token_choice import TextTokenizer
from qlora_trainer.adapters.trainable import AdaptedLinear, adapter_modules, mark_only_lora_as_trainable
from qlora_trainer.common.dotted_names import ends_in
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig
from qlora_trainer.model.modules.nf4_linear import NF4Linear


class IA3Linear(AdaptedLinear):
    """Scale the output of a linear layer, bias and all, or its input, by a vector in fp32.

    In bf16, whose steps at 1 are 1/128, a vector that starts at 1 would lose its updates.

    Args:
        base: as `is_linear` finds it.
        of_input: scale the input.
    """

    runs_at_once = True

    def __init__(self, base: nn.Module, *, of_input: bool) -> None:
        super().__init__()
        inputs, outputs, device = linear_facts(base)
        self.base, self.of_input = base, of_input
        self.ia3_l = nn.Parameter(torch.ones(inputs if of_input else outputs, dtype=torch.float32, device=device))

    @property
    def may_join(self) -> bool:  # type: ignore[override]
        """Return True where the layer takes its input as it is."""
        return not self.of_input

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
            return nf4_linears(x, (self.projection(),))[0]
        scales = self.own("ia3_l")
        if self.of_input:
            return self.base((x * scales).to(x.dtype))
        return (self.base(x) * scales).to(x.dtype)

    def projection(self) -> Projection:
        """Return the layer as the kernels take it, for one call; its base is an NF4Linear.

        Returns:
            Weight, bias and the scale.
        """
        base = self.base
        assert isinstance(base, NF4Linear), "the kernels take 4-bit layers"
        scales = self.own("ia3_l")
        if self.of_input:
            return Projection(base.nf4_weight, base.bias, input_scale=scales)
        bias = None if base.bias is None else base.bias * scales
        scale = OutputScale(scales, keeps_output=not saves_tensors())
        return Projection(base.nf4_weight, bias, output_scale=scale)

    def row_adapter(self) -> RowAdapter:
        """Say what the adapter, as it is now, does to rows of a batch whose other rows take others.

        Returns:
            That.
        """
        scales = self.ia3_l.detach()
        return RowAdapter(input_scale=scales) if self.of_input else RowAdapter(output_scale=scales, scales_bias=True)

    def stored(self, name: str, values: Tensor) -> Tensor:
        """Return the vector in the shape of PEFT's file.

        Args:
            name: of the vector.
            values: (O,) or (I,).

        Returns:
            (O, 1), or (1, I) of an input.
        """
        return values[None] if self.of_input else values[:, None]

    def unstored(self, name: str, tensor: Tensor) -> Tensor:
        """Return the vector from that of PEFT's file: the inverse of `stored`.

        Args:
            name: of the vector.
            tensor: (O, 1), or (1, I) of an input.

        Returns:
            (O,) or (I,).
        """
        return tensor.flatten()

    def fold(self) -> ScaleFold:
        """Say what becomes of the layer's weight in a merge.

        Returns:
            The fold, of the vector as it is now.
        """
        return ScaleFold(self.ia3_l, of_columns=self.of_input)

    def bias_fold(self) -> ScaleFold | None:
        """Say what becomes of the layer's bias in a merge.

        Returns:
            The fold; None where the input is scaled, as the bias is added after it.
        """
        return None if self.of_input else ScaleFold(self.ia3_l)

    def extra_repr(self) -> str:
        """Describe the adapter, as `print(model)` shows it.

        Returns:
            What is scaled.
        """
        return f"scales its {'input' if self.of_input else 'output'}"


class Ia3Kind(AdapterKind):
    """Put IA3Linear in the place of linear layers."""

    name: ClassVar[str] = "ia3"
    size: ClassVar[str] = "adapter.target_modules"
    mixes: ClassVar[bool] = True

    def add(
        self, model: nn.Module, settings: AdapterConfig, seed: int, tokenizer: TextTokenizer | None = None
    ) -> list[str]:
        """Wrap the targets; nothing is drawn, as all vectors start at 1.

        Targets that match nothing are refused by an AdapterError.

        Args:
            model: any, of transformers or not.
            settings: the config's section `adapter`.
            seed: not used.
            tokenizer: not used.

        Returns:
            The paths of the adapted layers.
        """
        paths = self.target_paths(model, settings)
        of_input = set(feedforward_paths(model, settings, paths))
        for path in paths:
            model.set_submodule(path, IA3Linear(model.get_submodule(path), of_input=path in of_input))
        mark_only_lora_as_trainable(model)
        return paths

    def file_config(
        self,
        settings: AdapterConfig,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        paths: Sequence[str],
        named: Mapping[str, Any],
    ) -> Ia3FileConfig:
        """Describe an adapter as its file does.

        Args:
            settings: the config's section `adapter`.
            model: with its adapters.
            tensors: of the adapter, by PEFT's names.
            paths: of the adapted layers.
            named: the keys of the base, such as base_model_name_or_path.

        Returns:
            The file's config.
        """
        layers = adapter_modules(model)
        of_input = [path for path in paths if getattr(layers[path], "of_input", False)]
        targets, feedforward = target_names(model, paths), target_names(model, of_input)
        if not set(feedforward) <= set(targets):  # PEFT wants a part of the targets' own names
            targets, feedforward = sorted(paths), sorted(of_input)
        return Ia3FileConfig(
            target_modules=targets,
            feedforward_modules=feedforward,
            fan_in_fan_out=getattr(layers[paths[0]].base, "fan_in_fan_out", False),
            **named,
        )

    def layer_numbers(self, settings: AdapterConfig, path: str, inputs: int, outputs: int) -> int:
        """Count the vector, one of outputs or of inputs.

        Args:
            settings: the config's section `adapter`.
            path: of the layer.
            inputs: I, features.
            outputs: O, features.

        Returns:
            The larger of both.
        """
        return max(inputs, outputs)

    def in_words(self, settings: AdapterConfig) -> str:
        """Name the kind.

        Args:
            settings: the config's section `adapter`.

        Returns:
            A phrase.
        """
        return "IA3 vectors"


def feedforward_paths(model: nn.Module, settings: AdapterConfig, paths: Sequence[str]) -> list[str]:
    """Find the adapted layers whose input is scaled.

    Args:
        model: any, with or without its adapters.
        settings: the config's section `adapter`.
        paths: of the adapted layers.

    Returns:
        Paths among them.

    Raises:
        AdapterError: adapter.feedforward_modules names what is not adapted.
    """
    names = settings.feedforward_modules
    if names == "auto":
        last = set(last_of_mlps(model))
        return [path for path in paths if path in last]
    if unknown := [name for name in names if not any(ends_in(path, name) for path in paths)]:
        raise AdapterError(
            f"adapter.feedforward_modules names {', '.join(unknown)}, in which the path of no adapted layer ends. Name "
            "them in adapter.target_modules too."
        )
    return [path for path in paths if any(ends_in(path, name) for name in names)]


IA3_KIND = Ia3Kind()
