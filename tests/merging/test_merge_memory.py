"""Promises of a merge's memory: that of a few rows and of one matrix, whatever the vocabulary."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merge_runs import merge_to

from benchmarks.llama_checkpoint import LlamaShape
from benchmarks.merge_7b import (
    FOUR_BIT,
    PLAIN,
    compare_streamed,
    make_inputs,
    merge_inputs,
)
from benchmarks.private_memory import PrivatePeak
from qlora_kernels import head_rows
from qlora_trainer.common.process_memory import private_bytes
from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.merging import logits
from qlora_trainer.merging.streamed_model import load_streamed_model
from qlora_trainer.model.forward import LossPath, loss_sum
from qlora_trainer.weights.model_directory import ModelDirectory

SMALL = LlamaShape(hidden=256, intermediate=512, layers=1, heads=4, key_value_heads=2, vocabulary=600)
VOCABULARY = 120_000
MATRIX = 4 * VOCABULARY * 256  # bytes of the embedding, or the head, in fp32: 123 MB


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The inputs of the benchmark's merges, by vocabulary."""
    made: dict[int, Path] = {}

    def directory(vocabulary: int) -> Path:
        if vocabulary not in made:
            made[vocabulary] = tmp_path_factory.mktemp("base")
            shape = LlamaShape(**{**vars(SMALL), "vocabulary": vocabulary})
            make_inputs(made[vocabulary], shape, seed=0)
        return made[vocabulary]

    return directory


@pytest.mark.slow
@pytest.mark.skipif(private_bytes() is None, reason="the system does not say what a process holds")
@pytest.mark.parametrize("base", [PLAIN, FOUR_BIT])
def test_a_larger_vocabulary_takes_no_more_memory(
    base: str, bases: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to merge, nor to compare logits, nor for the loss."""
    for module in (head_rows, logits):  # a block as they are would be half of this head
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 2**20)
    grown = []
    for vocabulary in (SMALL.vocabulary, VOCABULARY):
        directory = bases(vocabulary)
        output = tmp_path / f"merged-{vocabulary}"
        with PrivatePeak() as memory:
            merge_to(merge_inputs(directory, base), output, max_shard_bytes=10**9)
            if base == PLAIN:
                compare_streamed(directory, output)
                model = load_streamed_model(ModelDirectory.open(output), torch.device("cpu"))
                (pack,) = make_packs([Example(list(range(64)), list(range(64)))], 64, packing=True)
                with torch.no_grad():
                    loss_sum(model, pack, LossPath())
        grown.append(memory.peak - memory.before)
    # The loss has the logits of 64 tokens at a time. Blocks of rows, and what malloc keeps of them, vary with the turns
    # that threads take on a busy machine; a matrix held whole comes on top of that.
    assert grown[1] - grown[0] < MATRIX * 4 // 5 + (4 * 64 * VOCABULARY if base == PLAIN else 0)
