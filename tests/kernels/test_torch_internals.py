"""Torch still has each private name that qlora_kernels.torch_internals uses, and it works as it did there."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spying import Operations
from torch import Tensor, nn

from qlora_kernels import torch_internals
from qlora_kernels.torch_internals import FakeTensor, FakeTensorMode, OpOverload


def test_torch_has_fake_tensors() -> None:
    """A shape, a storage and a device without memory; and a way out of them."""
    with FakeTensorMode() as mode:
        tensor = torch.empty(4, 8)
        made = FakeTensor(mode, torch.empty(2, device="meta"), torch.device("cuda", 0))
        with torch_internals.with_real_tensors():
            real = torch.ones(3)
    assert isinstance(tensor, FakeTensor)
    assert tensor.fake_device == torch.device("cpu")
    assert tensor.constant is None
    assert made.fake_device == torch.device("cuda", 0)
    assert not isinstance(real, FakeTensor)
    assert real.sum() == 3


def test_torch_has_dispatch_modes_and_a_way_round_them() -> None:
    with Operations() as operations:
        torch.ones(2).add_(1)
        with torch_internals.without_dispatch():
            torch.zeros(2)
    names = [torch_internals.operation_schema(operation).name for operation in operations.seen]
    assert names == ["aten::ones", "aten::add_"]
    assert all(isinstance(operation, OpOverload) for operation in operations.seen)
    first = torch_internals.operation_schema(operations.seen[1]).arguments[0]
    assert first.alias_info.is_write


def test_torch_reads_a_number_by_one_operation() -> None:
    with Operations() as operations:
        torch.ones(()).item()
    assert [torch_internals.is_reading_of_a_number(operation) for operation in operations.seen] == [False, True]


def test_torch_has_a_way_round_torch_functions() -> None:
    class Own(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError

    with torch_internals.without_torch_function():
        assert torch.add(torch.ones(2).as_subclass(Own), 1).shape == (2,)


def test_torch_has_leaves_of_nested_results() -> None:
    assert torch_internals.leaves(({"a": 1}, [2, (3,)])) == [1, 2, 3]


def test_torch_has_a_default_device() -> None:
    assert torch_internals.default_device() == "cpu"


def test_torch_has_an_address_for_each_storage() -> None:
    with FakeTensorMode():
        first, second = torch.empty(2), torch.empty(2)
    addresses = [torch_internals.storage_address(t.untyped_storage()) for t in (first, second, first.view(2, 1))]
    assert addresses[0] == addresses[2] != addresses[1]


def test_torch_has_a_way_to_let_go_of_saved_tensors() -> None:
    """In a backward pass that does not keep its graph."""

    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
            ctx.save_for_backward(kept)
            return x.clone()

    class Outer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            with torch.enable_grad():
                ctx.inner = Inner.apply(torch.ones(1, requires_grad=True), torch.ones(2))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            node = ctx.inner.grad_fn
            assert node.saved_tensors[0].sum() == 2
            torch_internals.release_saved_tensors(node)
            with pytest.raises(RuntimeError, match="freed"):
                node.saved_tensors  # noqa: B018 - reading is refused
            return grad

    x = torch.ones(1, requires_grad=True)
    Outer.apply(x).sum().backward()
    assert x.grad is not None


def test_torch_has_a_reshape_that_is_no_view() -> None:
    tensor = torch.arange(6.0)
    shaped = torch_internals.reshaped_without_view(tensor, [2, 3])
    assert shaped.data_ptr() == tensor.data_ptr()
    assert not shaped._is_view()


def test_torch_has_tables_of_parameters_and_modules() -> None:
    outer = nn.Sequential(nn.Linear(2, 2))
    copied = torch_internals.copy_with(outer[0], parameters={"weight": nn.Parameter(torch.zeros(2, 2)), "bias": None})  # type: ignore[dict-item]
    assert torch.equal(copied(torch.ones(2)), torch.zeros(2))
    assert not torch.equal(outer(torch.ones(2)), torch.zeros(2)), "the original is as it was"
    assert torch.equal(torch_internals.copy_with(outer, children={"0": nn.Identity()})(torch.ones(2)), torch.ones(2))
    assert isinstance(outer[0], nn.Linear)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_torch_has_lists_of_a_modules_hooks(register: str) -> None:
    module = nn.Linear(2, 2)
    assert not torch_internals.has_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert torch_internals.has_hooks(module)
    handle.remove()
    assert not torch_internals.has_hooks(module)


def test_torch_has_onednn_linear() -> None:
    assert torch_internals.has_onednn_linear()
    x, weight, bias = torch.randn(64, 8), torch.randn(16, 8), torch.randn(16)
    torch.testing.assert_close(torch_internals.onednn_linear(x, weight, bias), F.linear(x, weight, bias))


def test_torch_has_efficient_attention() -> None:
    """Its kernel is CUDA's; on fake tensors its shapes show, and its backward."""
    with FakeTensorMode(), Operations() as operations:
        query, key, value = (torch.empty(1, 2, 16, 8, requires_grad=True) for _ in range(3))
        output = torch_internals.efficient_attention(query, key, value, scale=0.3, dropout=0.0, for_backward=True)
        output.sum().backward()
    assert output.shape == (1, 2, 16, 8)
    assert torch_internals.efficient_attention_backward() in operations.seen


def test_torch_has_fused_attention_on_a_cpu() -> None:
    with Operations() as operations:
        query = torch.randn(1, 2, 16, 8, requires_grad=True)
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    assert torch_internals.cpu_flash_attention() in operations.seen
    assert torch_internals.cpu_flash_attention_backward() in operations.seen
    names = [
        [argument.name for argument in torch_internals.operation_schema(operation).arguments]
        for operation in (torch_internals.cpu_flash_attention(), torch_internals.cpu_flash_attention_backward())
    ]
    settings = ["dropout_p", "is_causal", "attn_mask", "scale"]
    assert names == [
        ["query", "key", "value", *settings],
        ["grad_out", "query", "key", "value", "out", "logsumexp", *settings],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim", "value_dim"), [(4, 4, 8, 8), (6, 2, 8, 8), (4, 4, 8, 4)])
def test_torch_says_where_it_takes_fused_attention_on_a_cpu(
    heads: int, key_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    query = torch.ones(1, heads, 5, head_dim, dtype=dtype)
    key, value = (torch.ones(1, key_heads, 5, size, dtype=dtype) for size in (head_dim, value_dim))
    with Operations() as operations:
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != key_heads)
    taken = torch_internals.cpu_flash_attention() in operations.seen
    with FakeTensorMode(), Operations() as operations:
        assert torch_internals.takes_cpu_flash_attention(heads, key_heads, head_dim, value_dim, dtype) == taken
    assert operations.seen == []


def test_torch_has_varlen_attention_backward() -> None:
    from torch.nn.attention.varlen import varlen_attn  # its module defines the operation

    assert callable(varlen_attn)

    arguments = torch_internals.operation_schema(torch_internals.varlen_attention_backward()).arguments
    assert [argument.name for argument in arguments[:4]] == ["grad_out", "query", "key", "value"]
    assert arguments[6].name == "cu_seq_q"


def test_torch_has_flash_attention_over_packed_documents() -> None:
    """What is called with them is tested in test_flash_attention.py, and their arguments in test_torch_features.py."""
    forward, backward = torch_internals.flash_attention_operations()
    assert [operation.name() for operation in (forward, backward)] == [
        "aten::_flash_attention_forward",
        "aten::_flash_attention_backward",
    ]


def test_torch_has_a_way_to_release_pinned_memory() -> None:
    assert hasattr(torch.accelerator, "empty_host_cache") or torch_internals.pinned_memory_release() is not None


def test_torch_has_a_sleep_of_the_device() -> None:
    assert callable(torch.cuda._sleep)


def test_torch_counts_what_is_written_into_a_tensor() -> None:
    tensor = torch.zeros(4)
    view, before = tensor[:2], torch_internals.version_of(tensor)
    tensor.add_(1.0)
    view.mul_(2.0)
    assert torch_internals.version_of(tensor) == torch_internals.version_of(view) == before + 2
    torch.add(tensor, 1.0)
    assert torch_internals.version_of(tensor.detach()) == before + 2
