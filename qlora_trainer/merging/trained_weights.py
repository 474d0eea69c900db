"""Make a base's 4-bit weights again as training had them, from its checkpoint, one at a time.

From a plain checkpoint a weight is cast to the recorded dtype and quantized, exactly as it was for training; from a
prequantized one its packed codes are taken as they are. Either way what comes out is compared with the fingerprint, so
a run may be merged from another copy of its base than it was trained on. Merging and its verification both begin here.

Legend: O out features, I in features.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kernels.nf4 import NF4Weight, dequantize_nf4
from qlora_trainer.common.errors import CheckpointError, MergeError
from qlora_trainer.common.hashing import blocks_sha256
from qlora_trainer.model.fingerprint import BaseFingerprint, TensorFingerprint, is_same, tensor_fingerprint
from qlora_trainer.weights.bitsandbytes_format import weight_from_checkpoint
from qlora_trainer.weights.listing import checkpoint_name
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.nf4 import quantize_weight
from qlora_trainer.weights.reading import read_blocks
from qlora_trainer.weights.tensors import TensorInfo


@dataclass(frozen=True)
class TrainedWeight:
    """Hold how one weight was 4-bit in training, and where it comes from."""

    source: TensorInfo  # the weight, or the packed codes of a prequantized one
    statistics: Mapping[str, TensorInfo]  # of a prequantized one; else none
    recorded: TensorFingerprint
    source_dtype: torch.dtype  # that it was quantized from
    shape: tuple[int, int]  # (O, I)
    transposed: bool  # the checkpoint stores (I, O)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Return the shape that a dense checkpoint stores."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    def read(self, device: torch.device | str) -> NF4Weight:
        """Read the weight from the checkpoint: quantized as in training, or as it is stored in 4 bits.

        Args:
            device: where it is quantized and kept.

        Returns:
            The weight (O, I).

        Raises:
            QuantizationError: it holds values that are not finite.
        """
        if self.statistics:
            return _prequantized(self.source, self.statistics, device)
        weight = self.source.read().to(device).to(self.source_dtype)
        return quantize_weight(weight.T if self.transposed else weight, self.source.name)

    def check(self, weight: NF4Weight) -> None:
        """Compare a weight with the one of training.

        Args:
            weight: as `read` gave it.

        Raises:
            CheckpointError: it is another.
        """
        found = tensor_fingerprint(weight)
        if not is_same(found, self.recorded):
            raise CheckpointError(
                f"The base is not the one this adapter was trained on: {self.source.name} in {self.source.file.parent} "
                f"does not give the 4-bit weights of training (offset {found.offset:.8g}, in training "
                f"{self.recorded.offset:.8g}). Give the base of the run, as it was."
            )

    def as_trained(self, weight: NF4Weight) -> NF4Weight:
        """Give a weight the offset of training, whose last bits depend on the device that summed it.

        Args:
            weight: as `read` gave it.

        Returns:
            The same codes and scales with the recorded offset.
        """
        return with_offset(weight, self.recorded)

    def load(self, device: torch.device | str) -> NF4Weight:
        """Read the weight, check it, and give it the offset of training.

        Args:
            device: where it is kept.

        Returns:
            The weight (O, I) that training multiplied with.

        Raises:
            CheckpointError: it is not the one of training.
        """
        weight = self.read(device)
        self.check(weight)
        return self.as_trained(weight)

    def dense(self, device: torch.device | str) -> Tensor:
        """Dequantize the weight that training multiplied with.

        Args:
            device: where it is made.

        Returns:
            fp32, in the checkpoint's layout: `stored_shape`.
        """
        weight = dequantize_nf4(self.load(device), torch.float32)
        return weight.T if self.transposed else weight


def with_offset(weight: NF4Weight, recorded: TensorFingerprint) -> NF4Weight:
    """Give a 4-bit weight the recorded offset, of which its own may be another sum.

    Args:
        weight: of the recorded codes.
        recorded: in training.

    Returns:
        The same codes and scales with the recorded offset.
    """
    return dataclasses.replace(weight, offset=torch.full_like(weight.offset, recorded.offset))


@dataclass(frozen=True)
class RecordedTensor:
    """Hold a tensor that was not 4-bit in training, and its recorded hash."""

    source: TensorInfo
    sha256: str
    source_dtype: torch.dtype  # of the base when it was loaded

    def check(self) -> None:
        """Compare the checkpoint's tensor with the one of training.

        Copies of one base may keep it in different dtypes, and models keep a few tensors in fp32, so it is compared in
        the dtype it was loaded in, its own, and fp32.

        Raises:
            CheckpointError: it is another.
        """
        own = self.source.dtype
        dtypes = [self.source_dtype, own, torch.float32] if own.is_floating_point else [own]
        if not any(self._hash(dtype) == self.sha256 for dtype in dict.fromkeys(dtypes)):
            raise CheckpointError(
                f"The base is not the one this adapter was trained on: {self.source.name} in {self.source.file.parent} "
                "holds other values than in training. Give the base of the run, as it was."
            )

    def _hash(self, dtype: torch.dtype) -> str:
        return blocks_sha256(self.source.shape, (block for _, block in read_blocks(self.source)), dtype)


def trained_weights(
    base: ModelDirectory, fingerprint: BaseFingerprint, fan_in_fan_out: bool = False
) -> dict[str, TrainedWeight]:
    """Find the weights that were 4-bit in training in a checkpoint of the base.

    Args:
        base: the checkpoint to merge from.
        fingerprint: of the base as it was trained.
        fan_in_fan_out: the checkpoint stores (I, O), as GPT-2's Conv1D does.

    Returns:
        The weights by the checkpoint's names.

    Raises:
        MergeError: one of them is not in the checkpoint, or another weight is 4-bit there.
        QuantizationError: one is prequantized otherwise than this trainer keeps its base.
    """
    tensors, statistics = base.tensors, base.quant_states
    source_dtype = getattr(torch, fingerprint.source_dtype)
    weights = {}
    for path, recorded in fingerprint.tensors.items():
        name = name_of(f"{path}.weight", tensors, fingerprint.stored_as, "was 4-bit in training")
        source, found = tensors[name], statistics.get(name, {})
        shape = _prequantized(source, found, "cpu").shape if found else source.shape
        if len(shape) != 2:
            raise MergeError(f"{name} in {base} has shape {shape}, and was a matrix in training.")
        transposed = fan_in_fan_out
        out_in = (shape[1], shape[0]) if transposed and not found else (shape[0], shape[1])
        weights[name] = TrainedWeight(source, found, recorded, source_dtype, out_in, transposed)
    if unknown := statistics.keys() - weights.keys():
        raise MergeError(f"{min(unknown)} is 4-bit in {base}, but was not in training: this is another base.")
    return weights


def dense_tensors(base: ModelDirectory, fingerprint: BaseFingerprint) -> dict[str, RecordedTensor]:
    """Find the tensors that were not 4-bit in training in a checkpoint of the base; some are stored otherwise there.

    Args:
        base: the checkpoint to merge from.
        fingerprint: of the base as it was trained.

    Returns:
        Those that the checkpoint stores as one tensor, by its names.

    Raises:
        MergeError: the checkpoint lacks one, and has no tensor that could be it under another name.
    """
    tensors = base.tensors
    source_dtype = getattr(torch, fingerprint.source_dtype)
    stored_as = fingerprint.stored_as
    names = {name: checkpoint_name(stored_as.get(name, name), tensors) for name in fingerprint.dense}
    weights = (f"{path}.weight" for path in fingerprint.tensors)
    known = {checkpoint_name(stored_as.get(name, name), tensors) for name in weights} | set(names.values())
    known |= {info.name for keys in base.quant_states.values() for info in keys.values()}
    if tensors.keys() <= known:
        for name in names:
            name_of(name, tensors, stored_as, "was in the base in training")
    found = {stored: fingerprint.dense[name] for name, stored in names.items() if stored}
    return {name: RecordedTensor(tensors[name], sha256, source_dtype) for name, sha256 in found.items()}


def name_of(parameter: str, tensors: Mapping[str, TensorInfo], stored_as: Mapping[str, str], what: str) -> str:
    """Find a parameter's name in the checkpoint.

    Args:
        parameter: its name in the model.
        tensors: of the checkpoint.
        stored_as: names in the checkpoint by names in the model, where they differ.
        what: what the parameter is, for the message.

    Returns:
        The name in the checkpoint.

    Raises:
        MergeError: the checkpoint has no such tensor.
    """
    if name := checkpoint_name(stored_as.get(parameter, parameter), tensors):
        return name
    raise MergeError(
        f"{parameter} {what}, but the base's checkpoint has no such tensor. Either this is another base than the one "
        "trained, or transformers fuses this architecture's tensors while loading, and then it cannot be merged "
        "here. The adapter itself is whole, and can be used next to its base."
    )


def _prequantized(source: TensorInfo, statistics: Mapping[str, TensorInfo], device: torch.device | str) -> NF4Weight:
    packed, *values = (info.read().to(device) for info in (source, *statistics.values()))
    return weight_from_checkpoint(packed, dict(zip(statistics, values, strict=True)), source.name)
