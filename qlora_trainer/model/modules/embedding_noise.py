"""Add noise to the input embeddings in training: NEFTune (Jain et al. 2023, arXiv:2310.05914).

Each number gets a draw from [-1, 1) times alpha / sqrt(L H). L is the length of the row as laid out: packed rows keep
their own, so the noise on a row does not depend on its neighbors, and padded ones have that of the longest, as in
transformers. Left out: evaluation and answers, which get none.

Legend: B rows of the batch, T tokens, N documents, L tokens of a document, H hidden size.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.dropout import draw_seed, uniform_noise
from qlora_trainer.data.batching.packing import Pack


class EmbeddingNoise:
    """Give what a model's input embedding returns noise, while a block runs the rows it names.

    Args:
        model: of transformers.
        alpha: the size; 0 for none.
    """

    def __init__(self, model: Any, alpha: float) -> None:
        self.alpha = alpha
        self._rows = threading.local()  # parts of a micro-batch run the model at once, each on its rows
        if alpha:
            model.get_input_embeddings().register_forward_hook(self._add)

    @contextmanager
    def on(self, pack: Pack) -> Iterator[None]:
        """Add noise to the embeddings of a pack's tokens, within the block and in this thread.

        Args:
            pack: on the model's device.
        """
        self._rows.pack = pack
        try:
            yield
        finally:
            self._rows.pack = None

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # (B, T, H)
        pack = getattr(self._rows, "pack", None)
        if pack is None:  # evaluated, or tried out
            return output
        size = self.alpha * token_lengths(pack).mul(output.shape[-1]).rsqrt()
        return output + uniform_noise(output, draw_seed()) * size[..., None].to(output.dtype)


def token_lengths(pack: Pack) -> Tensor:  # (B, T) or (1, T), fp32
    """Return for each token the length of its row as laid out, without waiting for the device.

    Args:
        pack: the rows.

    Returns:
        Tokens.
    """
    rows, length = pack.input_ids.shape
    bounds = pack.cu_seqlens if pack.bounds_on_device is None else pack.bounds_on_device
    if bounds is None:
        return torch.full((rows, 1), float(length), device=pack.input_ids.device)
    ends = torch.bucketize(torch.arange(length, device=bounds.device), bounds, right=True)  # of each token's row
    return (bounds.index_select(0, ends) - bounds.index_select(0, ends - 1))[None].float()
