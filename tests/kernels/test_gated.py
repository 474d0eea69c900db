"""activation(gate) * up: the bits of the formula in autograd, and gradients from gate and up alone."""

import pytest
import torch
import torch.nn.functional as F
from random_tensors import normal
from torch import nn
from transformers.activations import ACT2FN

from qlora_kernels.gated import ACTIVATION_NAMES, Name, activate, gated_gradients, gated_product
from qlora_trainer.model.modules.same_bits import named_activation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATION_NAMES)
@pytest.mark.parametrize("lead", [(), (7,), (2, 3), (0,)])
def test_product_and_gradients_are_autograds_to_the_last_bit(
    activation: Name, dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    gate, up = (normal(*lead, 90, seed=seed, dtype=dtype).requires_grad_() for seed in (0, 1))
    expected = activate(gate, activation) * up
    assert torch.equal(gated_product(gate, up, activation), expected)
    grad = normal(*lead, 90, seed=2, dtype=dtype)
    wanted = torch.autograd.grad(expected, (gate, up), grad)
    found = gated_gradients(grad, gate, up, activation)
    assert found[0] is grad, "where the gradient lay"
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


def test_halves_of_one_tensor_are_taken_as_they_are() -> None:
    both = normal(5, 16)
    gate, up = both.chunk(2, dim=-1)
    assert torch.equal(gated_product(gate, up, "silu"), F.silu(gate) * up)


@pytest.mark.parametrize(("theirs", "name"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh")])
def test_activations_of_the_library_are_known_by_their_numbers(theirs: str, name: str) -> None:
    assert named_activation(ACT2FN[theirs]) == name


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.SiLU(inplace=False), ACT2FN["quick_gelu"]])
def test_another_activation_is_no_name(activation: nn.Module) -> None:
    assert (named_activation(activation) == "silu") == isinstance(activation, nn.SiLU)
