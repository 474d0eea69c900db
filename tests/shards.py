"""Write a checkpoint of a few tensors of every kind, rows at a time."""

from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.weights.reading import row_blocks
from qlora_trainer.weights.shard_writer import ShardWriter
from qlora_trainer.weights.tensors import TensorSpec

TENSORS = {
    "flags": torch.tensor([True, False, True]),  # three bytes, which would leave what follows unaligned
    "weight": torch.randn(700, 8, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).half(),
    "brain": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "steps": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "ids": torch.arange(9),
}


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write_all(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 10**9) -> None:
    with ShardWriter(directory, specs_of(tensors), max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            for rows in row_blocks(tuple(tensor.shape), block_elements=1, minimum_rows=100):
                writer.write(name, tensor if rows is None else tensor[rows])
