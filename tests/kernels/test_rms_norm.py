"""RMS normalization: the library's own numbers, exact gradients, and almost nothing kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_tensors import normal
from spying import Operations, noting, unchanged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qlora_kernels import rms_norm as module
from qlora_kernels.rms_norm import Form, rms_norm
from qlora_trainer.planning.live_bytes import LiveBytes

LIBRARY: dict[Form, type[nn.Module]] = {
    "scale_after_cast": LlamaRMSNorm,
    "scale_before_cast": Gemma2RMSNorm,
    "weight_before_cast": Olmo2RMSNorm,
}
FORMS = list(LIBRARY)
EPS = 1e-5


def formula(x: Tensor, weight: Tensor, form: Form) -> Tensor:
    x_hat = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x_hat * (1.0 + weight) if form == "scale_before_cast" else x_hat * weight


def output_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    output = function(x)
    return output, torch.autograd.grad(output, x, normal(*output.shape, seed=2, dtype=output.dtype))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_output_is_the_librarys_to_the_last_bit(form: Form, dtype: torch.dtype) -> None:
    theirs: Any = LIBRARY[form](96, eps=EPS)
    theirs.weight.data = normal(96, seed=1, dtype=dtype)
    x = normal(3, 5, 96, dtype=dtype) * 3.0
    with torch.no_grad():
        assert torch.equal(rms_norm(x, theirs.weight.detach(), EPS, form), theirs(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)])
def test_gradient_is_the_plain_formulas(form: Form, lead: tuple[int, ...]) -> None:
    weight, x = normal(96, seed=1, dtype=torch.float64), normal(*lead, 96, dtype=torch.float64).requires_grad_()
    ours = output_and_gradient(lambda x: rms_norm(x, weight, EPS, form), x)
    plain = output_and_gradient(lambda x: formula(x, weight, form), x)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_finite_differences(form: Form) -> None:
    weight = normal(8, seed=1, dtype=torch.float64)
    x = normal(2, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, EPS, form), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_errs_no_more_than_autograds_of_the_librarys(form: Form, dtype: torch.dtype) -> None:
    theirs: Any = LIBRARY[form](96, eps=EPS).requires_grad_(False)
    theirs.weight.data = normal(96, seed=1, dtype=dtype)
    x = normal(300, 96, dtype=dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    exact = output_and_gradient(lambda x: formula(x, theirs.weight.double(), form), exact_x)[1]
    ours = output_and_gradient(lambda x: rms_norm(x, theirs.weight, EPS, form), x)[1]
    plain = output_and_gradient(theirs, x)[1]
    error, allowed = ((value.double() - exact).pow(2).mean().sqrt() for value in (ours, plain))
    assert error <= 1.1 * allowed


def test_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = normal(96, seed=1), normal(70, 96).requires_grad_()
    whole = output_and_gradient(lambda x: rms_norm(x, weight, EPS, "scale_after_cast"), x)
    monkeypatch.setattr(module, "NORM_CHUNK_ELEMENTS", 96 * 32)
    parts = output_and_gradient(lambda x: rms_norm(x, weight, EPS, "scale_after_cast"), x)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_the_input_and_one_number_a_row_are_all_that_is_saved() -> None:
    kept: list[Tensor] = []
    x = normal(4, 5, 96, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(noting(unchanged, kept.append), unchanged):
        output = rms_norm(x, normal(96, dtype=torch.bfloat16), EPS, "scale_after_cast")
    assert output.grad_fn is not None
    assert [tensor.shape for tensor in kept] == [(4, 5, 96), (20, 1)]
    assert kept[0].data_ptr() == x.data_ptr()


def test_a_norm_is_one_operation_in_each_direction() -> None:
    """Rows need not be a matrix; what autograd does with what it saved is not counted."""
    weight, x = normal(96, seed=1), normal(2, 3, 96).requires_grad_()
    grad = normal(2, 3, 96, seed=2)
    with Operations() as seen:
        torch.autograd.grad(rms_norm(x, weight, EPS, "scale_after_cast"), x, grad)
    ours = ["qlora_kernels::rms_norm", "qlora_kernels::rms_norm_backward"]
    assert [name for name in seen.names if name != "aten::detach"] == ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit_and_no_input(dtype: torch.dtype) -> None:
    weight, x = normal(96, seed=1, dtype=dtype), normal(7, 96, dtype=dtype).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return rms_norm(torch.sin(x), weight, EPS, "scale_before_cast").cos()

    kept = output_and_gradient(block, x)
    again = output_and_gradient(lambda x: checkpoint(block, x, use_reentrant=False), x)
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    assert torch.equal(x, normal(7, 96, dtype=dtype))
    assert torch.equal(weight, normal(96, seed=1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_what_it_uses_inside_is_little_more_than_the_formula_says(form: Form, dtype: torch.dtype) -> None:
    """In several chunks; small tensors, of a row or of the weight's size, are left out of it."""
    rows, weight = normal(20_000, 960, dtype=dtype), normal(960, dtype=dtype)
    inverse = normal(20_000, 1).exp()
    for backward in (False, True):
        live = LiveBytes()
        live.watch([rows, weight, inverse], "inputs")
        known = live.bytes
        with live:
            if backward:
                module.backward_torch(rows, rows, inverse, weight, form)
            else:
                module.normalize_torch(rows, weight, EPS, form)
        inside = live.peak.bytes - known - rows.nbytes  # the output
        assert 0.8 * inside <= module.norm_workspace_bytes(rows, backward=backward) <= 1.25 * inside
