"""Documents to pack, and what a model makes of them packed, padded and alone: loss and gradient."""

from typing import Any

import torch
from torch import Tensor

from qlora_trainer.data.batching.packing import make_packs
from qlora_trainer.data.types import Example
from qlora_trainer.model.forward import find_loss_path, loss_sum


def examples(vocab_size: int) -> list[Example]:
    """Documents longer and shorter than a window of 6, with prompts that are not trained."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in (21, 5, 13, 2, 30)]
    return [Example(row, [-100] * (len(row) // 3) + row[len(row) // 3 :]) for row in rows]


def loss_and_gradient(model: Any, rows: list[Example], packing: bool, limit: int) -> tuple[float, Tensor]:
    """The loss summed over micro-batches of at most `limit` tokens, and the gradient of all that trains."""
    path, total = find_loss_path(model), 0.0
    model.zero_grad()
    for pack in make_packs(rows, limit, packing):
        loss = loss_sum(model, pack, path)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
