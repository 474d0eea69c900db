"""Hold IA3's adapter_config.json of PEFT's format, and check its tensors.

Legend: I in features, O out features.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from qlora_trainer.adapters.file_config import Differences, FileConfig
from qlora_trainer.adapters.folds import Fold, ScaleFold
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig

_SCALE = re.compile(r"base_model\.model\.(?P<path>.+)\.ia3_l")


class Ia3FileConfig(FileConfig):
    """Hold the keys of an IA3 adapter's file. Its tensors say themselves what they scale, by their shape."""

    ignored: ClassVar[frozenset[str]] = FileConfig.ignored | {"exclude_modules"}
    refused: ClassVar[Mapping[str, str]] = {
        "modules_to_save": "modules saved whole are not supported; train it without them, or merge it with PEFT first",
    }

    peft_type: Literal["IA3"] = "IA3"
    task_type: Literal["CAUSAL_LM"] | None = "CAUSAL_LM"
    target_modules: list[str] | str | None  # ends of module paths, or a regex; reading goes by the tensors instead
    feedforward_modules: list[str] | str | None
    fan_in_fan_out: bool = False  # the base stores these weights (I, O), as GPT-2's Conv1D does
    init_ia3_weights: bool = True
    modules_to_save: None = None

    @property
    def kind(self) -> str:
        """Return the value of adapter.kind that such an adapter has."""
        return "ia3"

    @property
    def is_stored_transposed(self) -> bool:
        """Return True if the base stores the adapted weights (I, O), as GPT-2's Conv1D does."""
        return self.fan_in_fan_out

    def check_tensors(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Check that these are vectors of a layer's outputs or inputs.

        Args:
            tensors: by PEFT's names: ia3_l (O, 1) or (1, I).
            origin: of them, for the message.

        Raises:
            AdapterError: they are not.
        """
        if not tensors:
            raise AdapterError(f"{origin} holds no ia3_l tensors.")
        for name, tensor in tensors.items():
            if _SCALE.fullmatch(name) is None:
                raise AdapterError(f"{origin} also holds {name}, which is no part of an IA3 adapter.")
            if tensor.dim() != 2 or 1 not in tensor.shape:
                raise AdapterError(
                    f"{origin}: {name} has shape {tuple(tensor.shape)}; (out features, 1) or (1, in features) is "
                    "expected."
                )

    def adapted_paths(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """List the paths of the adapted layers.

        Args:
            tensors: by PEFT's names.

        Returns:
            The paths, in the order of the file.
        """
        return list(_vectors(tensors))

    def folds(self, tensors: Mapping[str, Tensor]) -> dict[str, Fold]:
        """Say what becomes of each adapted weight in a merge.

        Args:
            tensors: by PEFT's names.

        Returns:
            Folds by the path of the layer.
        """
        return {
            path: ScaleFold(tensor.flatten(), of_columns=scales_input(tensor))
            for path, tensor in _vectors(tensors).items()
        }

    def bias_folds(self, tensors: Mapping[str, Tensor]) -> dict[str, Fold]:
        """Say what becomes of the bias of each adapted layer in a merge: it is scaled with the output.

        Args:
            tensors: by PEFT's names.

        Returns:
            Folds by the path of the layer.
        """
        return {
            path: ScaleFold(tensor.flatten()) for path, tensor in _vectors(tensors).items() if not scales_input(tensor)
        }

    def shown_settings(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Find the layers whose input is scaled.

        Args:
            tensors: by PEFT's names.

        Returns:
            adapter.feedforward_modules.
        """
        return {"feedforward_modules": [path for path, tensor in _vectors(tensors).items() if scales_input(tensor)]}

    def settings_of(self, tensors: Mapping[str, Tensor], wanted: AdapterConfig) -> Differences:
        """Compare nothing: which layers are adapted is compared by their paths, and whose inputs by shapes.

        Args:
            tensors: by PEFT's names.
            wanted: the run's section `adapter`.

        Returns:
            No pairs.
        """
        return {}


def scales_input(
    tensor: Tensor,  # (O, 1) or (1, I)
) -> bool:
    """Return True if a tensor of PEFT's file scales a layer's input.

    Args:
        tensor: of the file.

    Returns:
        True for (1, I).
    """
    return tensor.shape[0] == 1 and tensor.shape[1] != 1


def _vectors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the vectors by the path of their layer, in the order of the file."""
    return {match["path"]: tensor for name, tensor in tensors.items() if (match := _SCALE.fullmatch(name))}
