"""Read back what was written: exactly the expected tensors, finite, with the bytes they had in memory.

Loaders accept too much: a missing tensor becomes random with a warning, NaN loads silently. So every key, shape and
dtype is compared, and every byte by the CRC-32 taken when it was computed.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_trainer.common.errors import MergeError, ModelError
from qlora_trainer.common.progress import Progress, silent
from qlora_trainer.common.units import counted
from qlora_trainer.weights.model_directory import ModelDirectory
from qlora_trainer.weights.nf4 import all_finite
from qlora_trainer.weights.reading import tensor_bytes
from qlora_trainer.weights.tensors import TensorSpec


def verify_files(
    directory: Path,
    expected: Sequence[TensorSpec],
    checksums: Mapping[str, int],
    progress: Progress = silent,
    what: str = "merged model",
) -> None:
    """Read back every tensor, and compare keys, shapes, dtypes, and the CRC-32 of the bytes with those in memory.

    Args:
        directory: the written checkpoint.
        expected: its tensors.
        checksums: CRC-32 of each tensor's bytes, by name.
        progress: gets bytes.
        what: of which the message speaks.

    Raises:
        MergeError: a tensor is missing, unexpected or damaged; the message names it.
    """
    failed = f"The {what} failed its verification"
    try:
        found = ModelDirectory.open(directory).tensors
        wanted = {spec.name: spec for spec in expected}
        if differing := sorted(found.keys() ^ wanted.keys()):
            state = "missing" if differing[0] in wanted else "not expected"
            raise MergeError(
                f"{failed}: {counted(len(differing), 'tensor')} missing or unexpected; {differing[0]} is {state}."
            )
        total = sum(spec.nbytes for spec in expected)
        done = 0
        for name, info in found.items():
            spec = wanted[name]
            if (info.dtype, info.shape) != (spec.dtype, spec.shape):
                raise MergeError(f"{failed}: {name} is {info.dtype} {info.shape}, not {spec.dtype} {spec.shape}.")
            tensor = info.read()
            if zlib.crc32(tensor_bytes(tensor)) != checksums[name]:
                damage = "is not what was written" if all_finite(tensor) else "holds values that are not finite"
                raise MergeError(f"{failed}: {name} {damage}. The disk or the memory may be failing.")
            done += tensor.nbytes
            progress("verifying files", done, total)
    except ModelError as error:
        raise MergeError(f"{failed}: {error}") from error
