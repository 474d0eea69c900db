"""The private names of torch, transformers and bitsandbytes are in one module a library.

Each is shown to be still there by the test file of the module that gathers it.
"""

import ast
from pathlib import Path

import pytest

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
    *("prefetch_state", "update_step"),
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
