"""Rotary embedding is the library's to the last bit, forward and backward, and models take ours where it is theirs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_tensors import normal
from spying import Operations
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from qlora_kernels.rotary import rotary_workspace_bytes, rotate, rotate_torch
from qlora_trainer.planning.live_bytes import LiveBytes
from qlora_trainer.training.rotary import patch_rotary


def heads(dtype: torch.dtype) -> Tensor:
    """(2, 3, 5, 8), in memory token by token, as a projection gives it."""
    return normal(2, 5, 3, 8, dtype=dtype).transpose(1, 2)


def output_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.requires_grad_()
    output = function(x)
    return output, torch.autograd.grad(output, x, normal(*output.shape, seed=2, dtype=output.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2])
def test_output_and_gradient_are_the_librarys_to_the_last_bit(rows: int, dtype: torch.dtype) -> None:
    """With tables whose halves differ, which no model makes: the gradient is the transpose, whatever they hold."""
    cos, sin = normal(rows, 5, 8, seed=3, dtype=dtype), normal(rows, 5, 8, seed=4, dtype=dtype)
    ours = output_and_gradient(lambda x: rotate(x, cos, sin), heads(dtype))
    theirs = output_and_gradient(lambda x: apply_rotary_pos_emb(x, x, cos, sin)[0], heads(dtype))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert mine.stride() == other.stride()


def test_gradient_is_that_of_finite_differences() -> None:
    cos, sin = normal(2, 5, 8, seed=3, dtype=torch.float64), normal(2, 5, 8, seed=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), heads(torch.float64).requires_grad_())


def test_for_a_rotation_the_gradient_is_rotated_back() -> None:
    angles = normal(1, 5, 4, seed=3, dtype=torch.float64).repeat(1, 1, 2)
    x = heads(torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(rotate(x, angles.cos(), angles.sin()), x, normal(2, 3, 5, 8, dtype=torch.float64))
    rotated = rotate(normal(2, 3, 5, 8, dtype=torch.float64), angles.cos(), -angles.sin())
    torch.testing.assert_close(grad, rotated, rtol=1e-14, atol=1e-14)


def test_empty_input_has_an_empty_output() -> None:
    assert rotate(normal(2, 3, 0, 8), normal(1, 0, 8), normal(1, 0, 8)).shape == (2, 3, 0, 8)


def test_what_it_uses_inside_is_what_the_formula_says() -> None:
    x, table = normal(1, 64, 256, 64), normal(1, 256, 64)
    live = LiveBytes()
    live.watch([x, table], "inputs")
    known = live.bytes
    with live:
        rotate_torch(x, table, table, False)
    assert live.peak.bytes - known - x.nbytes == rotary_workspace_bytes(x)  # next to the output


TURNED = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3", "phi3"]


@pytest.mark.parametrize("family", TURNED)
def test_a_listed_familys_attention_takes_it_and_gives_the_same_bits(
    tiny_models: Callable[[str], Path], family: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_models(family), dtype=torch.bfloat16)
    ids = torch.arange(3, 23)[None]
    before = model(ids).logits
    assert patch_rotary(model.modules()) == model.config.num_hidden_layers
    with Operations() as seen:
        after = model(ids).logits
    assert torch.equal(after, before)
    rotated = [name for name in seen.names if name == "qlora_kernels::rotate"]
    without = model.config.no_rope_layers.count(0) if family == "smollm3" else 0
    assert len(rotated) == 2 * (model.config.num_hidden_layers - without)


def test_the_library_stays_as_it_is(tiny_models: Callable[[str], Path]) -> None:
    function, forward = modeling_llama.apply_rotary_pos_emb, LlamaAttention.forward
    patch_rotary(AutoModelForCausalLM.from_pretrained(tiny_models("llama")).modules())
    assert modeling_llama.apply_rotary_pos_emb is function
    assert LlamaAttention.forward is forward


def test_attention_that_rotates_pairs_keeps_its_own() -> None:
    """Cohere's heads are rotated in neighboring pairs, and in fp32."""
    module = CohereAttention.__new__(CohereAttention)
    torch.nn.Module.__init__(module)
    assert patch_rotary([module]) == 0
    assert "forward" not in vars(module)
