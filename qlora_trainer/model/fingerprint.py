"""Identify a base as it was trained on: an adapter belongs to exactly this function.

The fingerprint is kept with each checkpoint and with the final adapter, and resume, evaluate and merge compare it: an
adapter loads without an error on another base of the same shape, and the model's output is nonsense there. Recorded are
the config, the packed codes of every 4-bit tensor, and everything that stayed dense, as loaded and before it is cast to
the dtype of computation, so that a CPU in fp32 and a GPU in bf16 give the same base the same fingerprint.

The statistics of a 4-bit tensor are compared within a tolerance, not by a hash: double quantization subtracts the mean
of the block maxima, whose last bit depends on the device and even on the number of threads that summed it, and with
it a few maxima of a large tensor get the neighboring code. Measured on a CPU, 4096 x 4096, one thread against two:
15 of 262,144 codes differ, while the packed codes are equal to the last.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from qlora_kernels.nf4 import NF4Weight
from qlora_trainer.common.hashing import bytes_sha256, values_sha256
from qlora_trainer.common.units import counted, dtype_name
from qlora_trainer.model.modules.nf4_linear import NF4Linear

OFFSET_TOLERANCE = 1e-6  # relative; the offset is a mean of thousands of values in fp32
SCALES_TOLERANCE = 1e-5  # relative; means of block scales, of which a few may have the neighboring code

# Keys of config.json that do not say what function the model is: where it came from, and how it was written or run.
# Tied or not is seen by the tensors, and a copy in 4 bits may say it otherwise than the config it was made with.
_NOT_IDENTITY = {
    "tie_word_embeddings",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "use_cache",
}


@dataclasses.dataclass(frozen=True)
class TensorFingerprint:
    """Identify one 4-bit tensor: its packed codes to the bit, its block scales within a tolerance."""

    packed_sha256: str
    offset: float  # mean of the block maxima
    scales: tuple[float, float]  # mean of the block scales, and their mean weighted by position, from 0 to 1


@dataclasses.dataclass(frozen=True)
class BaseFingerprint:
    """Identify a quantized base: its config, the dtype it was quantized from, and every tensor."""

    config: dict[str, Any]  # config.json, as far as it says what the model computes
    source_dtype: str  # dtype the weights had when they were quantized, such as "bfloat16"
    tensors: dict[str, TensorFingerprint]  # 4-bit, by module path, such as "model.layers.0.self_attn.q_proj"
    dense: dict[str, str]  # sha256 of what is not 4-bit, by name, such as "model.norm.weight"; ties once
    # sha256 of each tensor's bytes on disk, by the checkpoint's names; no part of the identity, as a copy kept in 4
    # bits is the same base. Empty where transformers read the base.
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    # The checkpoint's name of each of the model's tensors that transformers renames; no part of the identity either.
    stored_as: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as JSON's types.

        Returns:
            What `from_json` reads.
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a fingerprint; KeyError or TypeError where `data` is not what `to_json` gave.

        Args:
            data: as `to_json` gave it.

        Returns:
            The fingerprint.
        """
        tensors = {
            path: TensorFingerprint(fields["packed_sha256"], fields["offset"], tuple(fields["scales"]))
            for path, fields in data["tensors"].items()
        }
        return cls(**{**data, "tensors": tensors})

    def difference(self, other: "BaseFingerprint") -> str | None:
        """Describe how another base differs from this one.

        Args:
            other: the base that is here now.

        Returns:
            A clause for a message; None where they are the same function.
        """
        if missing := self.tensors.keys() ^ other.tensors.keys():
            reported = (
                f"{counted(len(missing), 'layer is', 'layers are')} 4-bit in one and not in the other, "
                f"such as {min(missing)}"
            )
            return reported + self._origin(other)
        changed = [path for path, tensor in self.tensors.items() if not is_same(tensor, other.tensors[path])]
        if changed:
            reported = (
                f"{len(changed):,} of {counted(len(self.tensors), 'layer')} "
                f"{'holds' if len(changed) == 1 else 'hold'} other weights, such as {changed[0]}"
            )
            return reported + self._origin(other)
        names = sorted(self.dense.keys() | other.dense.keys())
        changed = [name for name in names if self.dense.get(name) != other.dense.get(name)]
        if changed:
            reported = (
                f"{len(changed):,} of {counted(len(names), 'tensor')} outside the 4-bit layers "
                f"{'differs' if len(changed) == 1 else 'differ'}, such as {changed[0]}"
            )
            return reported + self._origin(other)
        keys = sorted((self.config.keys() | other.config.keys()) - _NOT_IDENTITY)  # of earlier versions' records, too
        if changed := [key for key in keys if self.config.get(key) != other.config.get(key)]:
            key = changed[0]
            return (
                f"config.json differs in {', '.join(changed)} ({key} was {self.config.get(key)!r} and is "
                f"{other.config.get(key)!r})"
            )
        return None

    def _origin(self, other: "BaseFingerprint") -> str:
        """Return the end of a message: why the same layers hold other weights, as far as the files' bytes show it."""
        if self.sources and self.sources == other.sources:
            reported = "they were made of the same bytes: quantized otherwise, or a copy kept in 4 bits is damaged"
        elif self.sources.keys() == other.sources.keys() and self.sources:
            changed = [name for name, source in self.sources.items() if other.sources[name] != source]
            reported = (
                f"it is another checkpoint: {len(changed):,} of its "
                f"{counted(len(self.sources), 'tensor')} {'differs' if len(changed) == 1 else 'differ'} on disk"
            )
        elif self.sources and other.sources:
            reported = "the checkpoints do not hold the same tensors, or one of them is 4-bit on disk"
        else:
            reported = ""
        if self.source_dtype != other.source_dtype:
            reported += ", " if reported else ""
            reported += f"quantized from {self.source_dtype} there and from {other.source_dtype} here"
        return f"; {reported}" if reported else ""


def make_fingerprint(
    config: Mapping[str, Any],  # what config.json holds
    source_dtype: torch.dtype,
    tensors: dict[str, TensorFingerprint],
    dense: dict[str, str],
    sources: dict[str, str],
    stored_as: dict[str, str],
) -> BaseFingerprint:
    """Make a fingerprint of its parts, each as BaseFingerprint describes it.

    Args:
        config: the keys that are no part of the identity are dropped.
        source_dtype: that the weights were quantized from.
        tensors: of the 4-bit layers, by path.
        dense: sha256 by the model's name.
        sources: sha256 by the checkpoint's name.
        stored_as: the checkpoint's names by the model's.

    Returns:
        The fingerprint.
    """
    name = dtype_name(source_dtype)
    return BaseFingerprint(config_identity(config), name, tensors, dense, sources, stored_as)


def base_fingerprint(model: nn.Module, config: Mapping[str, Any], source_dtype: torch.dtype) -> BaseFingerprint:
    """Compute the fingerprint of a model that is loaded already; what its files held is not known any more.

    Call it before what stayed dense is cast to the dtype of computation, and before adapters are added.

    Args:
        model: with its 4-bit layers.
        config: what its config.json holds.
        source_dtype: that the weights were quantized from.

    Returns:
        The fingerprint, without `sources`.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}
    dense: dict[str, str] = {}
    seen: set[int] = set()  # tied weights are one tensor under several names
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            dense[name] = values_sha256(tensor)
    tensors = {path: tensor_fingerprint(layer.nf4_weight) for path, layer in layers.items()}
    return make_fingerprint(config, source_dtype, tensors, dense, {}, {})


def tensor_fingerprint(weight: NF4Weight) -> TensorFingerprint:
    """Compute the fingerprint of a 4-bit weight.

    Args:
        weight: on any device.

    Returns:
        The fingerprint.
    """
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
    """Compare two fingerprints of 4-bit weights.

    Args:
        first: a fingerprint.
        second: another one.

    Returns:
        True if both are of one weight, whatever devices made it.
    """
    return (
        first.packed_sha256 == second.packed_sha256
        and math.isclose(first.offset, second.offset, rel_tol=OFFSET_TOLERANCE)
        and all(math.isclose(a, b, rel_tol=SCALES_TOLERANCE) for a, b in zip(first.scales, second.scales, strict=True))
    )


def config_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the keys of a config that do not say what the model computes, in its sections too, and private keys.

    Args:
        config: what config.json holds.

    Returns:
        The rest, copied.
    """
    return {
        key: config_identity(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _NOT_IDENTITY and not key.startswith("_")
    }
