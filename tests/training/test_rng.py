"""Promises of random numbers: they go on after a restart where they were."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qlora_trainer.runs import checkpoint
from qlora_trainer.training.rng import restore_rng, rng_state


def test_random_numbers_continue_after_a_restart(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), float(np.random.standard_normal()), float(torch.randn(()))]

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        draw()  # leaves half a pair in the gaussian generators, which must survive too
        tensors, state = rng_state()
        save_file(tensors, tmp_path / "rng.safetensors")
        expected = [draw() for _ in range(3)]
        restore_rng(checkpoint.load_file(tmp_path / "rng.safetensors"), json.loads(json.dumps(state)))
        assert [draw() for _ in range(3)] == expected
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_on_cuda_continue_after_a_restart() -> None:
    torch.rand(3, device="cuda")
    tensors, state = rng_state()
    expected = torch.rand(3, device="cuda")
    restore_rng(tensors, state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
