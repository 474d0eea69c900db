"""What a step keeps of a layer for backward where nothing is recomputed: each value once, and no norm's output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from spying import noting, unchanged
from tiny_models import SHAPE
from torch import Tensor

from qlora_kernels.card import Card
from qlora_kernels.torch_internals import storage_address
from qlora_trainer.config.schema import RunConfig
from qlora_trainer.planning.empty_run import ASSUMED_CARD, empty_run
from qlora_trainer.training.memory.activations import Policy
from qlora_trainer.training.step import accumulate_gradients
from qlora_trainer.weights.model_directory import ModelDirectory

RANK = 4


def kept_bytes(directory: Path, config: RunConfig, layers: int, card: Card | None) -> tuple[int, int]:
    """Bytes of all storages that a micro-batch's forward keeps, but for those of the model; and its tokens."""
    dtype = torch.bfloat16 if card else torch.float32
    policy = Policy(config.training.activation_checkpointing)  # type: ignore[arg-type]
    state, pack, fake = empty_run(ModelDirectory.open(directory), config, dtype, policy, layers, card)
    kept: list[Tensor] = []
    with fake, torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        state.model.train()
        accumulate_gradients(state, [pack])
    own = {storage_address(tensor.untyped_storage()) for tensor in (*state.model.parameters(), *state.model.buffers())}
    sizes = {storage_address(t.untyped_storage()): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in sizes.items() if address not in own), pack.tokens


@pytest.mark.parametrize("card", [None, ASSUMED_CARD], ids=["cpu", "card"])
def test_a_layer_keeps_each_value_once_and_no_norms_output(
    tiny_llama: Path, tiny_config: Callable[..., RunConfig], card: Card | None
) -> None:
    config = tiny_config(
        model={"device": "cuda" if card else "cpu"},
        adapter={"rank": RANK},
        training={"activation_checkpointing": "none"},
    )
    (three, tokens), (four, _) = (kept_bytes(tiny_llama, config, layers, card) for layers in (3, 4))
    shape: dict[str, Any] = SHAPE
    hidden, width, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    key_width = hidden // heads * shape["num_key_value_heads"]
    inputs = 2 * hidden  # of the two norms: before attention, and before the MLP
    attention = 2 * hidden + 2 * key_width  # queries and output, keys and values
    mlp = 2 * width  # gate and up
    low_ranks = 7 * RANK
    in_fp32 = heads + 2  # logarithms of attention's sums, and a number of each norm
    size = 2 if card else 4
    a_token, rest = divmod(four - three, tokens)
    assert a_token == size * (inputs + attention + mlp + low_ranks) + 4 * in_fp32
    assert (rest > 0) == bool(card), "there also the documents' bounds and the state of random numbers, once a layer"
