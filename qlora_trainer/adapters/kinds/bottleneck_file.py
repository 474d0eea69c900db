"""Hold the adapter_config.json of bottleneck adapters, and check their tensors.

PEFT has no such adapters, so the format is ours, in PEFT's manner: docs/reference/bottleneck-format.md. Exactly four
tensors of each adapted part are allowed, and nothing else that could overwrite the base.

Legend: H hidden size, R bottleneck size.
"""

import re
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from qlora_trainer.adapters.file_config import PEFT_PREFIX, Differences, FileConfig
from qlora_trainer.adapters.folds import Fold
from qlora_trainer.common.errors import AdapterError
from qlora_trainer.config.schema import AdapterConfig

_NAME = re.compile(rf"{re.escape(PEFT_PREFIX)}(?P<path>.+)\.bottleneck_(?P<which>(?:down|up)\.(?:weight|bias))")


class BottleneckFileConfig(FileConfig):
    """Hold the keys of a bottleneck adapter's file."""

    ignored: ClassVar[frozenset[str]] = frozenset()  # no other program writes such files

    peft_type: Literal["BOTTLENECK"] = "BOTTLENECK"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    bottleneck_size: int = Field(ge=1, le=8192)
    hidden_size: int = Field(ge=1, le=2**20)
    activation: Literal["relu", "gelu", "silu"]
    placement: Literal["attention+mlp", "mlp", "attention"]

    @property
    def kind(self) -> str:
        """Return the value of adapter.kind that such an adapter has."""
        return "bottleneck"

    def check_tensors(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Check that these are the four tensors of each adapter, of the config's sizes.

        Args:
            tensors: bottleneck_down.weight (R, H) and .bias (R,), bottleneck_up.weight (H, R) and .bias (H,).
            origin: of them, for the message.

        Raises:
            AdapterError: they are not.
        """
        width, hidden = self.bottleneck_size, self.hidden_size
        shapes = {
            "down.weight": (width, hidden),
            "down.bias": (width,),
            "up.weight": (hidden, width),
            "up.bias": (hidden,),
        }
        found: dict[str, set[str]] = {}
        for name, tensor in tensors.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise AdapterError(
                    f"{origin} also holds {name}, which is no part of a bottleneck adapter and could overwrite the "
                    "base. Save the adapter again without it."
                )
            shape = shapes[match["which"]]
            if tensor.shape != shape:
                raise AdapterError(
                    f"{origin}: {name} has shape {tuple(tensor.shape)}; with bottleneck_size {width} and hidden_size "
                    f"{hidden} it should be {shape}."
                )
            found.setdefault(match["path"], set()).add(match["which"])
        if not found:
            raise AdapterError(f"{origin} holds no tensors of a bottleneck adapter.")
        for path, names in found.items():
            if missing := sorted(shapes.keys() - names):
                raise AdapterError(f"{origin}: {path} has no bottleneck_{missing[0]}; the adapter is incomplete.")

    def adapted_paths(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """List the paths of the adapted parts.

        Args:
            tensors: by the names in the file.

        Returns:
            The paths, in the order of the file.
        """
        matches = (_NAME.fullmatch(name) for name in tensors)
        return list(dict.fromkeys(match["path"] for match in matches if match))

    def folds(self, tensors: Mapping[str, Tensor]) -> dict[str, Fold]:
        """Return none: what is not linear becomes no weight.

        Args:
            tensors: by the names in the file.

        Returns:
            No folds.
        """
        return {}

    def settings_of(self, tensors: Mapping[str, Tensor], wanted: AdapterConfig) -> Differences:
        """Put size, activation and placement next to a run's.

        Args:
            tensors: by the names in the file.
            wanted: the run's section `adapter`.

        Returns:
            Pairs, equal or not.
        """
        return {f"adapter.{key}": (getattr(self, key), getattr(wanted, key)) for key in _SETTINGS}


_SETTINGS = ("bottleneck_size", "activation", "placement")
