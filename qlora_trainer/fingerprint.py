"""The identity of a base as it was trained on: an adapter belongs to this very function.

It travels with each checkpoint and with the final adapter, and resume, evaluate and merge compare it: an adapter loads
just as well on another base of the same shape, and answers nonsense there. Recorded are the config, the packed codes
of every 4-bit tensor, and everything that stayed dense, as loaded and before it is cast to the dtype of computation,
so that a CPU in fp32 and a GPU in bf16 name the same base alike.

The statistics of a 4-bit tensor are compared within a tolerance, not by a hash: double quantisation subtracts the mean
of the block maxima, whose last bit depends on the device and even on the number of threads that summed it, and with
it a few maxima of a large tensor get the neighbouring code. Measured on a CPU, 4096 x 4096, one thread against two:
15 of 262,144 codes differ, while the packed codes are equal to the last.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from qlora_kernels.nf4 import NF4Weight
from qlora_trainer.hashing import bytes_sha256, values_sha256
from qlora_trainer.quantization import NF4Linear

OFFSET_TOLERANCE = 1e-6  # relative; the offset is a mean of thousands of values in fp32
SCALES_TOLERANCE = 1e-5  # relative; means of block scales, of which a few may have the neighbouring code

# Keys of config.json that do not say what function the model is: where it came from, and how it was written or run.
_NOT_IDENTITY = {"transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache"}


@dataclasses.dataclass(frozen=True)
class TensorFingerprint:
    """One 4-bit tensor: its packed codes to the bit, its block scales within a tolerance."""

    packed_sha256: str
    offset: float  # mean of the block maxima
    scales: tuple[float, float]  # mean of the block scales, and their mean weighted by position, from 0 to 1


@dataclasses.dataclass(frozen=True)
class BaseFingerprint:
    """The identity of a quantised base: its config, the dtype it was quantised from, and every tensor."""

    config: dict[str, Any]  # config.json, as far as it says what the model computes
    source_dtype: str  # dtype the weights had when they were quantised, such as "bfloat16"
    tensors: dict[str, TensorFingerprint]  # 4-bit, by module path, such as "model.layers.0.self_attn.q_proj"
    dense: dict[str, str]  # sha256 of what is not 4-bit, by name, such as "model.norm.weight"; ties once

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises KeyError or TypeError where `data` is not what `to_json` gave."""
        tensors = {
            path: TensorFingerprint(fields["packed_sha256"], fields["offset"], tuple(fields["scales"]))
            for path, fields in data["tensors"].items()
        }
        return cls(data["config"], data["source_dtype"], tensors, data["dense"])

    def difference(self, other: "BaseFingerprint") -> str | None:
        """A sentence on how `other` differs from this base, or None where they are the same function."""
        if missing := self.tensors.keys() ^ other.tensors.keys():
            return f"{len(missing)} layer(s) are 4-bit in one and not in the other, such as {min(missing)}"
        changed = [path for path, tensor in self.tensors.items() if not is_same(tensor, other.tensors[path])]
        if changed:
            hint = (
                f"; they were quantised from {self.source_dtype} there and from {other.source_dtype} here"
                if self.source_dtype != other.source_dtype
                else ""
            )
            return f"{len(changed)} of {len(self.tensors)} layers hold other weights, such as {changed[0]}{hint}"
        names = sorted(self.dense.keys() | other.dense.keys())
        if changed := [name for name in names if self.dense.get(name) != other.dense.get(name)]:
            return f"{len(changed)} of {len(names)} tensors that are not 4-bit differ, such as {changed[0]}"
        keys = sorted(self.config.keys() | other.config.keys())
        if changed := [key for key in keys if self.config.get(key) != other.config.get(key)]:
            key = changed[0]
            return (
                f"config.json differs in {', '.join(changed)} ({key} was {self.config.get(key)!r} and is "
                f"{other.config.get(key)!r})"
            )
        return None


def base_fingerprint(model: nn.Module, config: Mapping[str, Any], source_dtype: torch.dtype) -> BaseFingerprint:
    """Hash every tensor of `model` in one pass; `config` is what config.json holds.

    Call it before what stayed dense is cast to the dtype of computation, and before adapters are put on.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}
    dense: dict[str, str] = {}
    seen: set[int] = set()  # tied weights are one tensor under several names
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            dense[name] = values_sha256(tensor)
    return BaseFingerprint(
        config=config_identity(config),
        source_dtype=str(source_dtype).removeprefix("torch."),
        tensors={path: tensor_fingerprint(layer.nf4_weight) for path, layer in layers.items()},
        dense=dense,
    )


def tensor_fingerprint(weight: NF4Weight) -> TensorFingerprint:
    """Of a 4-bit weight, on whatever device."""
    blocks = weight.absmax.numel()
    nested = weight.nested_absmax.double().repeat_interleave(weight.nested_block_size)[:blocks]
    scales = weight.nested_code.double()[weight.absmax.long()] * nested + weight.offset.double()  # (blocks,)
    position = torch.linspace(0.0, 1.0, blocks, dtype=torch.float64, device=scales.device)
    return TensorFingerprint(
        packed_sha256=bytes_sha256(weight.packed),
        offset=float(weight.offset),
        scales=(float(scales.mean()), float((scales * position).mean())),
    )


def is_same(first: TensorFingerprint, second: TensorFingerprint) -> bool:
    """Whether both are of one 4-bit weight, whatever devices made it."""
    return (
        first.packed_sha256 == second.packed_sha256
        and math.isclose(first.offset, second.offset, rel_tol=OFFSET_TOLERANCE)
        and all(math.isclose(a, b, rel_tol=SCALES_TOLERANCE) for a, b in zip(first.scales, second.scales, strict=True))
    )


def config_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that do not matter, in its sections too; private keys say where it came from."""
    return {
        key: config_identity(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _NOT_IDENTITY and not key.startswith("_")
    }
