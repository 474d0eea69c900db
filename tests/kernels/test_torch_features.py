"""What differs between versions of torch is found by what this one has, with stand-ins for the others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from qlora_kernels import torch_features, torch_internals, varlen_attention
from qlora_kernels.varlen_attention import _flash_varlen
from qlora_trainer.model import device


@pytest.fixture(autouse=True)
def forget() -> Any:
    cached = (torch_features.varlen_attention_arguments, torch_features.has_flash_attention)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    return query


def of_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa
    return query


@pytest.mark.parametrize("has_public", [True, False])
def test_pinned_memory_is_released_by_whichever_function_there_is(
    monkeypatch: pytest.MonkeyPatch, has_public: bool
) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: called.append("binding"), raising=False)
    if has_public:
        monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: called.append("public"), raising=False)
    else:
        monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    torch_features.release_pinned_memory()
    assert called == ["public" if has_public else "binding"]


def test_memory_is_given_back_under_a_torch_without_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("device"))
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: called.append("pinned"), raising=False)
    device.give_back_memory()
    assert called == ["wait", "device", "pinned"]


def test_without_any_function_for_pinned_memory_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    monkeypatch.delattr(torch._C, "_host_emptyCache", raising=False)
    torch_features.release_pinned_memory()
    assert not hasattr(torch._C, "_host_emptyCache")


@pytest.mark.parametrize(
    ("version", "has_scale", "has_grouping"), [(of_2_10, False, False), (of_2_11, True, False), (of_2_13, True, True)]
)
def test_varlen_attention_is_known_by_its_arguments(
    monkeypatch: pytest.MonkeyPatch, version: Any, has_scale: bool, has_grouping: bool
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", version)
    found = torch_features.varlen_attention_arguments()
    assert ("scale" in found, "window_size" in found, "enable_gqa" in found) == (has_scale, has_scale, has_grouping)


@pytest.mark.parametrize("version", [of_2_11, of_2_13])
def test_grouped_heads_go_to_torchs_function_as_this_version_takes_them(
    monkeypatch: pytest.MonkeyPatch, version: Any
) -> None:
    """2.11 knows no `enable_gqa` and takes grouped heads all the same; later ones refuse them without it."""
    monkeypatch.setattr(varlen, "varlen_attn", version)
    monkeypatch.setattr(varlen_attention, "has_flash_attention", lambda: False)
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    output = _flash_varlen(query, key, key, torch.tensor([0, 2, 6], dtype=torch.int32), 4, 0.3, None)
    assert torch.equal(output[0], query[0].transpose(0, 1))


def changed(schema: Any, *, without: str = "", renamed: str = "", more: Any = None, results: int = 9) -> Any:
    """An operation's schema without an argument, with a result of another name, one argument more, or fewer results."""
    arguments = [argument for argument in schema.arguments if argument.name != without]
    returns = [SimpleNamespace(name="other" if result.name == renamed else result.name) for result in schema.returns]
    return SimpleNamespace(arguments=[*arguments, *([more] if more else [])], returns=returns[:results])


def argument(has_default: bool) -> Any:
    return SimpleNamespace(name="sink", has_default_value=lambda: has_default)


@pytest.mark.parametrize(
    ("place", "change", "known"),
    [
        (0, {}, True),
        (0, {"more": argument(has_default=True)}, True),
        (0, {"more": argument(has_default=False)}, False),
        (0, {"without": "window_size_right"}, False),
        (0, {"without": "max_k"}, False),
        (0, {"renamed": "rng_state"}, False),
        (1, {"without": "window_size_left"}, False),
        (1, {"without": "rng_state"}, False),
        (1, {"more": argument(has_default=False)}, False),
        (1, {"results": 2}, False),
    ],
)
def test_flash_attention_is_called_directly_only_where_it_takes_what_it_is_called_with(
    monkeypatch: pytest.MonkeyPatch, place: int, change: dict[str, Any], known: bool
) -> None:
    schemas = [torch_internals.operation_schema(one) for one in torch_internals.flash_attention_operations()]
    schemas[place] = changed(schemas[place], **change)
    monkeypatch.setattr(torch_features, "flash_attention_operations", lambda: (0, 1))
    monkeypatch.setattr(torch_features, "operation_schema", schemas.__getitem__)
    assert torch_features.has_flash_attention() == known


def test_a_torch_without_the_operations_has_no_flash_attention_to_call_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> Any:
        return torch.ops.aten.no_such_operation

    monkeypatch.setattr(torch_features, "flash_attention_operations", missing)
    assert not torch_features.has_flash_attention()
