"""Fill an empty model from its checkpoint, a tensor at a time: the 4-bit base is never whole in 16 bits, anywhere.

`load_plan.py` says beforehand what becomes of each tensor; `lay_out` gives the empty model, still on meta, the form it
will have, so its size is known to the byte before anything is read. `load_tensors` then goes through the files in their
order: what becomes 4-bit is quantized from the checkpoint's widest dtype and dropped, what stays dense is checked for
values that are not finite and cast once. Weights that are 4-bit on disk already are taken as they are: on a CPU they
stay in the file, which is mapped privately, so nothing writes into it. Hashes of what lies on disk and of what was made
of it are computed meanwhile, in the same pass, and become the base's fingerprint.

Of a base whose files were hashed before (known_bases.py), nothing that lies on disk is hashed or checked again, and of
one that is 4-bit on disk, what needs no cast stays mapped, large embeddings included: nothing is read until it is used.
A file that is replaced by another meanwhile (renamed over) stays what it was for this process; one that is cut short
in place ends the process with a bus error, as with any mapped file. So do not write into a base that is in use.

How a tensor becomes part of a module is in one place, `_Filling.take`, by the tables of the plan. Another kind of
module, such as experts that share one weight, needs a table there, its form in `lay_out`, and its case in `take`.

Legend: O out features, I in features.
"""

import contextlib
import dataclasses
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.nf4 import NF4Weight
from qlora_trainer.common.errors import QuantizationError
from qlora_trainer.common.hashing import Hasher, bytes_sha256, values_sha256
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.model.fingerprint import TensorFingerprint, make_fingerprint, tensor_fingerprint
from qlora_trainer.model.known_bases import HashedBase
from qlora_trainer.model.load_plan import DenseTensor, LoadPlan, refuse_incomplete
from qlora_trainer.model.modules.lm_head import HeadKind, QuantizedHead, empty_head
from qlora_trainer.model.modules.nf4_linear import empty_nf4
from qlora_trainer.weights.bitsandbytes_format import weight_from_checkpoint
from qlora_trainer.weights.file_reading import LARGEST_KEPT, PIECE_BYTES
from qlora_trainer.weights.nf4 import all_finite, quantize_weight
from qlora_trainer.weights.stream import Arrival, stream_tensors
from qlora_trainer.weights.tensors import TensorInfo


def lay_out(model: Any, plan: LoadPlan, lm_head: HeadKind) -> None:
    """Give the model, dense and on meta, its 4-bit layers and its LM head, on meta too.

    A head that is no linear layer, and cannot be held as asked for, raises ModelError.

    Args:
        model: changed in place.
        plan: of its checkpoint.
        lm_head: how the LM head is held.
    """
    empty_nf4(model, set(plan.four_bit.values()), "meta")
    empty_head(model, lm_head, "meta")


def load_tensors(
    model: Any,  # as `lay_out` left it, each parameter in the dtype it shall have; filled
    plan: LoadPlan,
    *,
    device: torch.device,
    embedding_on_cpu: bool = False,  # leave it out of the device; who computes must know (modules/cpu_embedding.py)
    known: HashedBase | None = None,
    progress: Progress = silent,
) -> HashedBase:
    """Read, check, quantize and place every tensor of the plan, and find out which base it is.

    A weight that is not finite, or was quantized otherwise than to NF4 with double quantization, raises
    QuantizationError; a file that is damaged or changes meanwhile, or a prequantized weight of another shape than the
    model's, raises ModelError.

    Args:
        model: is filled.
        plan: of its checkpoint.
        device: to fill it on.
        embedding_on_cpu: keep the embedding in host memory.
        known: what was found in the same files before; they are not hashed again.
        progress: is called as tensors are read.

    Returns:
        The base's fingerprint, and the hashes of what lies on disk.
    """
    wanted = [info for name, info in plan.tensors.items() if name in plan.four_bit or name in plan.dense]
    done, total = 0, sum(info.nbytes for info in wanted)
    with Hasher() as hasher:
        filling = _Filling(model, plan, hasher, device, embedding_on_cpu, known)
        arrivals = stream_tensors(
            wanted,
            device,
            stays_on_host=filling.stays_on_host,
            stays_in_file=filling.stays_in_file,
            hashes=known is None,
        )
        with contextlib.closing(arrivals):
            for arrival in arrivals:
                progress("loading the base", done, total)
                filling.take(arrival)
                done += arrival.info.nbytes
                del arrival  # before the next one comes
        filling.move_buffers()
        plan.directory.refuse_changed()
        progress("loading the base", total, total)
        return filling.found()


class _Filling:
    """Fill a model, and keep the hashes of what was filled in.

    Args:
        model: as `lay_out` left it.
        plan: of its checkpoint.
        hasher: that computes the hashes.
        device: of the model.
        embedding_on_cpu: keep the embedding in host memory.
        known: what was found in the same files before.
    """

    def __init__(
        self,
        model: Any,
        plan: LoadPlan,
        hasher: Hasher,
        device: torch.device,
        embedding_on_cpu: bool,
        known: HashedBase | None,
    ) -> None:
        self.model, self.plan, self.hasher, self.device, self.known = model, plan, hasher, device, known
        embedding = model.get_input_embeddings() if embedding_on_cpu else None
        self.host_name = next((f"{path}.weight" for path, m in model.named_modules() if m is embedding), None)
        self.stored: dict[str, str] = {}  # by the checkpoint's names
        self.four_bit: dict[str, Future[TensorFingerprint]] = {}  # by path of the layer
        self.dense: dict[str, Future[str]] = {}  # by the model's names

    def take(self, arrival: Arrival) -> None:
        """Make a tensor part of the model.

        Args:
            arrival: the tensor as it was read.
        """
        name = arrival.info.name
        if arrival.sha256 is not None:
            self.stored[name] = arrival.sha256
        if name in self.plan.dense:
            self._take_dense(arrival, self.plan.dense[name])
        elif name in self.plan.statistics:
            self._take_prequantized(arrival, self.plan.four_bit[name])
        else:
            self._take_weight(arrival, self.plan.four_bit[name])

    def _take_weight(self, arrival: Arrival, path: str) -> None:
        weight = quantize_arrival(arrival, self.plan)
        self.model.get_submodule(path).take(weight)
        self.four_bit[path] = self.hasher.submit(tensor_fingerprint, weight)

    def _take_prequantized(self, arrival: Arrival, path: str) -> None:
        layer, name = self.model.get_submodule(path), arrival.info.name
        statistics = {}
        for key, info in self.plan.statistics[name].items():
            values = info.read()
            if self.known is None:
                self.stored[info.name] = bytes_sha256(values)
            statistics[key] = values.to(arrival.values.device)
        weight = weight_from_checkpoint(arrival.values, statistics, _described(arrival.info))
        if weight.shape != (layer.out_features, layer.in_features):
            refuse_incomplete(self.plan.directory, [], [f"{name} {weight.shape}"])
        layer.take(weight)
        if self.known is None:
            self.four_bit[path] = self.hasher.submit(tensor_fingerprint, weight)

    def _take_dense(self, arrival: Arrival, dense: DenseTensor) -> None:
        if self.known is None:
            self.dense[dense.names[0]] = self.hasher.submit(values_sha256, arrival.host, dense.dtype)
            check_finite(arrival.info, arrival.values)
        parameter = None  # one for all names: they are tied
        for name in dense.names:
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            if isinstance(module, QuantizedHead) and leaf == "weight":
                module.take(arrival.values.to(self.device, dense.dtype))
            elif leaf in dict(module.named_buffers(recurse=False)):
                setattr(module, leaf, self._own_copy(arrival, dense.dtype, dense.dtype))
            else:
                if parameter is None:
                    values = self._own_copy(arrival, dense.dtype, module.get_parameter(leaf).dtype)
                    parameter = nn.Parameter(values, requires_grad=False)
                setattr(module, leaf, parameter)
        if self.known is None and arrival.info.nbytes > LARGEST_KEPT:
            self.dense[dense.names[0]].result()  # or several of the largest could wait at once

    def _own_copy(self, arrival: Arrival, loaded: torch.dtype, dtype: torch.dtype) -> Tensor:
        """Return the values in `loaded` and cast from that to `dtype`, copied unless they are to stay mapped."""
        values = arrival.values.to(loaded)
        return values.to(dtype, copy=values is arrival.host and not self.stays_in_file(arrival.info))

    def stays_in_file(self, info: TensorInfo) -> bool:
        """Decide which tensors are mapped: 4-bit codes, and in a known 4-bit base also what is too large to be a bias.

        Args:
            info: of the tensor.

        Returns:
            True if it is mapped.
        """
        is_large = len(info.shape) == 2 and info.nbytes >= PIECE_BYTES and info.offset is not None
        return info.name in self.plan.statistics or (bool(self.plan.statistics) and self.known is not None and is_large)

    def stays_on_host(self, info: TensorInfo) -> bool:
        """Decide which tensor is wanted in host memory; the LM head may be made of it on the device too.

        Args:
            info: of the tensor.

        Returns:
            True for the embedding that is kept on the CPU.
        """
        return info.name in self.plan.dense and self.host_name in self.plan.dense[info.name].names

    def move_buffers(self) -> None:
        """Put the buffers that no checkpoint has, such as rotary frequencies, where the model computes."""
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                assert buffer.device.type != "meta", f"{name} of {type(module).__name__} was not filled"
                setattr(module, name, buffer.to(self.device))

    def found(self) -> HashedBase:
        """Return what has been loaded, after all hashes are computed.

        Returns:
            The fingerprint, and the hashes of what lies on disk.
        """
        tensors = {path: found.result() for path, found in self.four_bit.items()}
        if self.known is not None:  # of what is 4-bit on disk nothing was made here
            fingerprint = self.known.fingerprint
            tensors = tensors or fingerprint.tensors
            return dataclasses.replace(self.known, fingerprint=dataclasses.replace(fingerprint, tensors=tensors))
        packed = {name: tensors[self.plan.four_bit[name]].packed_sha256 for name in self.plan.statistics}
        stored = self.stored | packed  # of a prequantized weight, the packed bytes are what lies on disk
        fingerprint = make_fingerprint(
            self.plan.directory.config_json,
            self.plan.source_dtype,
            tensors,
            {name: found.result() for name, found in self.dense.items()},
            self.plan.original or stored,
            self.plan.renamed,
        )
        return HashedBase(fingerprint, stored)


def quantize_arrival(arrival: Arrival, plan: LoadPlan) -> NF4Weight:
    """Quantize a linear weight to 4 bits, on the device where it arrived; QuantizationError where it is not finite.

    Args:
        arrival: of the weight, (O, I), or (I, O) where the plan says so.
        plan: of the checkpoint.

    Returns:
        The weight, (O, I).
    """
    values = arrival.values.to(plan.source_dtype)
    return quantize_weight(values.T if arrival.info.name in plan.transposed else values, _described(arrival.info))


def check_finite(info: TensorInfo, values: Tensor) -> None:
    """Refuse a tensor that stays dense and holds a value that is not finite.

    Args:
        info: of the tensor.
        values: all of it, of any shape.

    Raises:
        QuantizationError: it holds one.
    """
    if not all_finite(values):
        raise QuantizationError(
            f"{_described(info)} holds values that are not finite. The checkpoint is damaged: fetch it again."
        )


def _described(info: TensorInfo) -> str:
    return f"{info.name} in {info.file.name}"
