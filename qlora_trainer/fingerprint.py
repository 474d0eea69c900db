"""The identity of a quantised base: an adapter belongs to these very bytes.

It travels with each checkpoint, and resume, evaluate and merge compare it: an adapter loads just as well on another
base of the same shape, and answers nonsense there.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from qlora_trainer.quantization import NF4Linear


@dataclasses.dataclass(frozen=True)
class TensorFingerprint:
    """What was quantised: sha256 of the packed bytes, and the nested offset, a mean whose last bit is the device's."""

    packed_sha256: str
    offset: float


@dataclasses.dataclass(frozen=True)
class BaseFingerprint:
    """The identity of a quantised base: its config, the dtype it was quantised from, and every 4-bit tensor."""

    config_sha256: str
    source_dtype: str  # dtype the weights had when they were quantised, such as "bfloat16"
    tensors: dict[str, TensorFingerprint]  # by module path, such as "model.layers.0.self_attn.q_proj"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        tensors = {path: TensorFingerprint(**fields) for path, fields in data["tensors"].items()}
        return cls(config_sha256=data["config_sha256"], source_dtype=data["source_dtype"], tensors=tensors)

    def difference(self, other: "BaseFingerprint") -> str | None:
        """A sentence on how `other` differs from this base, or None where the quantised bytes are the same."""
        if missing := self.tensors.keys() ^ other.tensors.keys():
            return f"{len(missing)} layer(s) are 4-bit in one and not in the other, such as {min(missing)}"
        changed = [p for p, t in self.tensors.items() if t.packed_sha256 != other.tensors[p].packed_sha256]
        if changed:
            hint = (
                f"; they were quantised from {self.source_dtype} there and from {other.source_dtype} here"
                if self.source_dtype != other.source_dtype
                else ""
            )
            return f"{len(changed)} of {len(self.tensors)} layers hold other weights, such as {changed[0]}{hint}"
        return None


def base_fingerprint(model: nn.Module, config: Mapping[str, Any], source_dtype: torch.dtype) -> BaseFingerprint:
    """Hash every NF4Linear of `model`; one pass over the packed bytes (3.5 GB for a 7B)."""
    tensors = {
        path: TensorFingerprint(
            packed_sha256=hashlib.sha256(module.packed.cpu().numpy().data).hexdigest(),
            offset=float(module.offset),
        )
        for path, module in model.named_modules()
        if isinstance(module, NF4Linear)
    }
    canonical = json.dumps(config, sort_keys=True, default=str)
    return BaseFingerprint(
        config_sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        source_dtype=str(source_dtype).removeprefix("torch."),
        tensors=tensors,
    )
