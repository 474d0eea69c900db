"""The private names of torch, transformers and bitsandbytes are in one module a library, and each is still there.

A test that fails here after an upgrade says which name is gone or works otherwise; the module says what it is for.
"""

import ast
import gc
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from qlora_kernels import torch_internals
from qlora_kernels.torch_internals import FakeTensor, FakeTensorMode, OpOverload, TorchDispatchMode
from qlora_trainer.common import transformers_internals
from qlora_trainer.weights import bitsandbytes_internals
from qlora_trainer.weights.nf4 import bitsandbytes

ROOT = Path(__file__).parents[1]
GATHERED = {
    "kernels/qlora_kernels/torch_internals.py",
    "qlora_trainer/common/transformers_internals.py",
    "qlora_trainer/weights/bitsandbytes_internals.py",
}
LIBRARIES = ("torch", "transformers", "bitsandbytes")
DOCUMENTED = {
    *("torch", "torch.autograd.function", "torch.autograd.graph", "torch.nn", "torch.nn.functional", "torch.profiler"),
    *("torch.nn.attention.varlen", "torch.utils", "torch.utils.checkpoint", "torch.utils.cpp_extension"),
    *("torch.utils.tensorboard", "transformers", "transformers.utils", "bitsandbytes", "bitsandbytes.functional"),
}
"""The modules of the libraries that may be imported anywhere."""
UNDOCUMENTED = {
    *("all_tied_weights_keys", "maybe_clear_saved_tensors", "masking_utils", "cextension", "GlobalPageManager"),
    *("Optimizer8bit", "init_state", "optimizer_update_32bit", "optimizer_update_8bit_blockwise"),
}
"""Names of the libraries that have no leading underscore and are private all the same."""
OF_OTHERS = {"_asdict", "_exit", "_fingerprint"}
"""Of Python's named tuples, of `os`, and of a data set of the library `datasets`."""


def is_private(name: str) -> bool:
    return name in UNDOCUMENTED or (
        name.startswith("_") and not name.startswith("__") and name not in {"_", *OF_OTHERS}
    )


def private_names(source: str) -> set[str]:
    """Private names of libraries in a file: what it uses as an attribute or a keyword, and does not define itself."""
    tree = ast.parse(source)
    used, own, ours = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)  # of a class, or of the module
        elif isinstance(node, ast.arg):
            own.add(node.arg)
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            used.add(node.arg)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            used |= {part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).startswith("vars("):
            used.add(str(getattr(node.slice, "value", "")))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = {alias.name for alias in node.names}
            if module is not None and module.partition(".")[0] in LIBRARIES:
                used |= names | ({f"_{module}"} if module not in DOCUMENTED else set())
            elif module is None:
                used |= {f"_{n}" for n in names if n.partition(".")[0] in LIBRARIES and n not in DOCUMENTED}
            else:
                ours |= {alias.asname or alias.name for alias in node.names}
    of_ours = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in ours}
    return {name for name in used - own - of_ours if is_private(name)}


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("module._parameters['weight']", {"_parameters"}),
        ("torch._C._get_default_device()", {"_C", "_get_default_device"}),
        ("class A(nn.Module):\n    def f(self): return self._buffers", {"_buffers"}),
        ("class A:\n    def __init__(self): self._x = 1\n    def f(self, other): return other._x", set()),
        ("getattr(model, '_keep_in_fp32_modules', None)", {"_keep_in_fp32_modules"}),
        ("SimpleNamespace(_experts_implementation='eager')", {"_experts_implementation"}),
        ("vars(module)['_modules']", {"_modules"}),
        ("vars(module).update(_modules={})", {"_modules"}),
        ("from torch._subclasses.fake_tensor import FakeTensor", {"_torch._subclasses.fake_tensor"}),
        ("from transformers import masking_utils", {"masking_utils"}),
        ("from transformers.core_model_loading import rename_source_key", {"_transformers.core_model_loading"}),
        ("import transformers.conversion_mapping", {"_transformers.conversion_mapping"}),
        ("from qlora_trainer.data.batching import packing\npacking._first_fit([])", set()),
        ("model.all_tied_weights_keys", {"all_tied_weights_keys"}),
        ("from torch.utils.checkpoint import checkpoint", set()),
        ("row._asdict(); module.__dict__", set()),
    ],
)
def test_a_private_name_is_seen_however_it_is_written(source: str, found: set[str]) -> None:
    assert private_names(source) == found


def test_no_private_name_of_a_library_outside_the_module_that_gathers_them() -> None:
    files = [
        path for folder in ("qlora_trainer", "kernels", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    found = {
        name: names
        for path in files
        if (name := str(path.relative_to(ROOT))) not in GATHERED and (names := private_names(path.read_text()))
    }
    assert found == {}
    assert all(private_names((ROOT / name).read_text()) for name in GATHERED)


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


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


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
    assert torch_internals.cpu_flash_attention_backward() in operations.seen


def test_torch_has_varlen_attention_backward() -> None:
    from torch.nn.attention.varlen import varlen_attn  # its module defines the operation

    assert callable(varlen_attn)

    arguments = torch_internals.operation_schema(torch_internals.varlen_attention_backward()).arguments
    assert [argument.name for argument in arguments[:4]] == ["grad_out", "query", "key", "value"]
    assert arguments[6].name == "cu_seq_q"


def test_torch_has_a_way_to_release_pinned_memory() -> None:
    assert hasattr(torch.accelerator, "empty_host_cache") or torch_internals.pinned_memory_release() is not None


def test_torch_has_a_sleep_of_the_device() -> None:
    assert callable(torch.cuda._sleep)


def test_transformers_has_chat_templates_with_answer_spans() -> None:
    source = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{{ mark }}{% endfor %}"
    template = transformers_internals.chat_template_environment().from_string(source)
    text, spans = transformers_internals.render_with_answer_spans(template, [{"content": "four"}], None, {"mark": "!"})
    assert (text, spans) == ("<four>!", [(1, 5)])
    with pytest.raises(jinja2.TemplateSyntaxError):
        transformers_internals.chat_template_environment().from_string("{% if %}")


@pytest.fixture(scope="module")
def llama() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def test_transformers_has_a_name_of_the_attention(llama: Any) -> None:
    called = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Any:
        called.append(query.shape)
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("of_a_test", attention)
    before = transformers_internals.attention_name(llama.config)
    transformers_internals.set_attention_name(llama.config, "of_a_test")
    try:
        llama(torch.tensor([[1, 2, 3]]))
    finally:
        transformers_internals.set_attention_name(llama.config, before)
    assert called == [(1, 2, 3, 8)]
    assert transformers_internals.attention_name(llama.config) == before == "sdpa"


def test_transformers_has_a_test_for_tracing() -> None:
    from transformers import masking_utils

    with FakeTensorMode():
        fake = torch.empty(2)
        with transformers_internals.masks_as_for_real_tensors():
            assert not masking_utils.is_tracing(fake)
        assert masking_utils.is_tracing(fake), "else nothing would have to be put in its place"


def test_transformers_has_a_table_of_tied_weights(llama: Any) -> None:
    assert transformers_internals.tied_weight_names(llama) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert transformers_internals.tied_weight_names(nn.Linear(1, 1)) == {}


def test_transformers_has_lists_of_what_a_class_keeps_or_ignores(llama: Any) -> None:
    """With the names as the library declares them: a model that has none of them would hide that one is gone."""
    from transformers import PreTrainedModel

    declared = {"_keep_in_fp32_modules", "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"}
    assert declared <= vars(PreTrainedModel).keys() | PreTrainedModel.__annotations__.keys()
    assert transformers_internals.modules_kept_in_fp32(llama) == set()
    assert transformers_internals.patterns_of_missing(llama) == set()
    assert transformers_internals.patterns_of_extra(llama) == set()


def test_transformers_has_a_conversion_mapping() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    renamings, converters = transformers_internals.conversion_mapping(model)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    new, pattern = transformers_internals.renamed(name, renamings, converters, "model", model.state_dict())
    assert new == "model.layers.0.mlp.experts.down_proj"
    assert pattern is not None


def test_transformers_has_experts_that_run_eagerly() -> None:
    assert hasattr(MixtralConfig(), "_experts_implementation")
    assert transformers_internals.eager_experts_config()._experts_implementation == "eager"


def test_transformers_has_rotary_frequencies(llama: Any) -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, rope_parameters=parameters)
    frequencies = transformers_internals.rope_frequencies("llama3", config, torch.device("cpu"))
    assert frequencies.shape == (4,)
    assert frequencies[0] == 1.0


def test_transformers_has_tables_for_gguf(llama: Any) -> None:
    assert "gpt2" in transformers_internals.gguf_table_architectures()
    assert "lfm2" in transformers_internals.gguf_conversion_architectures()
    process, names = transformers_internals.gguf_table("llama", llama)
    assert callable(process)
    assert names["token_embd.weight"] == "model.embed_tokens.weight"
    config = Lfm2Config(num_hidden_layers=2)
    renamings, converters = transformers_internals.gguf_conversion_mapping("lfm2", config)
    new, pattern = transformers_internals.renamed("blk.0.shortconv.conv.weight", renamings, converters)
    assert new == "model.layers.0.conv.conv.weight"
    assert pattern is not None


def test_bitsandbytes_has_a_native_library() -> None:
    assert hasattr(bitsandbytes_internals.native_library(), "compiled_with_cuda")


def test_bitsandbytes_has_optimizers_that_make_state_early() -> None:
    parameter = nn.Parameter(torch.ones(8))
    optimizer = bitsandbytes.optim.PagedAdamW32bit([parameter])
    assert bitsandbytes_internals.makes_state_early(optimizer)
    assert not bitsandbytes_internals.makes_state_early(torch.optim.AdamW([parameter]))
    bitsandbytes_internals.make_state(optimizer)
    assert optimizer.state[parameter].keys() >= {"state1", "state2", "step"}


def test_bitsandbytes_has_optimizers_that_say_whether_they_page() -> None:
    kinds = (bitsandbytes.optim.PagedAdamW32bit, bitsandbytes.optim.AdamW32bit)
    assert [bitsandbytes_internals.is_paged(kind([nn.Parameter(torch.ones(8))])) for kind in kinds] == [True, False]


def test_bitsandbytes_has_a_list_of_paged_tensors() -> None:
    manager = bitsandbytes.functional.GlobalPageManager.get_instance()
    ours, others = torch.zeros(3), torch.zeros(3)
    manager.paged_tensors += [ours, others]
    try:
        bitsandbytes_internals.forget_paged([ours])
        assert [id(tensor) for tensor in manager.paged_tensors] == [id(others)]
    finally:
        manager.paged_tensors.clear()
        gc.collect()


def test_bitsandbytes_has_operations_that_update_a_parameter() -> None:
    parameter = nn.Parameter(torch.ones(8))
    parameter.grad = torch.ones(8)
    update_32bit, update_8bit = bitsandbytes_internals.update_operations()
    optimizer = bitsandbytes.optim.AdamW32bit([parameter])
    with Operations() as operations:
        optimizer.step()
    assert update_32bit in operations.seen
    for operation in (update_32bit, update_8bit):
        assert torch_internals.operation_schema(operation).arguments[2].name == "p"


def test_bitsandbytes_has_paged_memory() -> None:
    """What training/memory/paged_trial.py calls."""
    assert callable(bitsandbytes.functional.get_paged)
    assert callable(bitsandbytes.functional.fill)
