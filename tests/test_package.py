"""The shape of the project: imports point one way, each dependency has one owner, and nothing shadows another."""

import ast
import graphlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room imports only from rows above its own, never from a room beside it; so no imports go in circles. Packages are
# rooms too. A new room goes into the first row that is below all it imports.
ROWS = [
    {"machine"},
    {
        "background",
        "caching_allocator",
        "console",
        "demo_data",
        "errors",
        "hashing",
        "logit_comparison",
        "paged_trial",
        "probing",
        "process_memory",
        "progress",
        "quiet",
        "report_plot",
        "report_style",
        "settings",
        "signals",
    },
    {"devices", "findings", "gguf_tensors", "managed_memory"},
    {
        "attention",
        "checkpoint",
        "config",
        "directories",
        "generation",
        "gguf_weights",
        "host_embeddings",
        "memory_tracking",
        "quantization",
        "rotary_embedding",
        "sizes",
    },
    {"bitsandbytes_format", "doctor_machine", "experts"},
    {"adapters", "data", "fake_run", "fingerprint", "output_head", "report", "report_page", "tensor_io", "workspaces"},
    {
        "checkpoint_names",
        "determinism",
        "direct_reading",
        "forward",
        "inspection",
        "lean_modules",
        "model_files",
        "optim",
        "shard_writer",
        "weights_as_trained",
    },
    {"activations", "evaluation", "gguf_import", "load_plan", "merge_plan", "merge_verification", "tensor_stream"},
    {"merging", "model_source", "pretrained", "streaming_load"},
    {"model"},
    {"doctor_packages", "prequantize", "run_directory", "skeleton", "training"},
    {"doctor", "initial_adapter", "planning", "recovery", "streamed_model", "trained"},
    {"estimating", "merge_measurement"},
    {"deployment"},
    {"fitting"},
    {"training_run"},
    {"runs"},
    {"demo"},
    {"commands"},
    {"cli"},
]
OWNERS = {
    "bitsandbytes": {"quantization", "optim", "paged_trial"},
    "transformers": {
        "attention",
        "checkpoint_names",
        "experts",
        "model",
        "model_source",
        "pretrained",
        "quiet",
        "gguf_import",
        "gguf_tensors",
        "generation",
        "data.rendering",
        "data.encoding",
        "data.templates",
        "data.workers",
        "doctor_packages",
    },
    "triton": set(),
    "typer": {
        "cli",
        "commands.arguments",
        "commands.checks",
        "commands.models",
        "commands.results",
        "commands.training",
    },
    "rich": {"console", "inspection"},
    "peft": set(),
    "trl": set(),
}


def imported_modules(source: str) -> set[str]:
    """Every module that a file imports, anywhere in it: `from package import x` counts as package and package.x."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import: {ast.unparse(node)}"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms() -> dict[str, set[str]]:
    """Dotted room name -> modules it imports."""
    package = ROOT / "qlora_trainer"
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): imported_modules(path.read_text())
        for path in sorted(package.rglob("*.py"))
        if path.name != "__init__.py"
    }


def row_of(room: str) -> int:
    top = room.split(".")[0]
    rows = [index for index, row in enumerate(ROWS) if top in row]
    assert rows, f"{top} is not a room in ROWS"
    return rows[0]


def neighbours(room: str, imports: set[str]) -> set[str]:
    """The rooms that a room imports from outside its own package. What qlora_trainer itself offers is for its users."""
    targets = {module.split(".")[1] for module in imports if module.startswith("qlora_trainer.")}
    return targets - {room.split(".")[0]}


def test_an_import_is_seen_however_it_is_written() -> None:
    source = "import a.b\nfrom qlora_trainer import runs\ndef f():\n    from qlora_trainer.data import packing as p\n"
    imports = imported_modules(source)
    assert {"a.b", "qlora_trainer.runs", "qlora_trainer.data.packing"} <= imports
    assert neighbours("data.loader", imports) == {"runs"}
    with pytest.raises(AssertionError, match="relative import"):
        imported_modules("from . import runs")


def test_every_room_has_one_row_and_every_row_its_rooms() -> None:
    named = [room for row in ROWS for room in row]
    assert sorted(named) == sorted({room.split(".")[0] for room in rooms()})


def test_packages_import_no_room_by_themselves() -> None:
    """An __init__ that imported at once would be an arrow from every room to what it names."""
    for path in (ROOT / "qlora_trainer").rglob("__init__.py"):
        at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = imported_modules("\n".join(map(ast.unparse, at_once)))
        assert [module for module in modules if module.startswith("qlora_trainer")] == [], path


def test_imports_point_one_way() -> None:
    wrong = [
        f"{room} (row {row_of(room)}) imports {target} (row {row_of(target)})"
        for room, imports in rooms().items()
        for target in sorted(neighbours(room, imports))
        if row_of(target) >= row_of(room)
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["adapters", "commands", "data"])
def test_imports_inside_a_package_do_not_go_round(package: str) -> None:
    inside = {room: imports for room, imports in rooms().items() if room.startswith(f"{package}.")}
    arrows = {
        room: {other for other in inside if f"qlora_trainer.{other}" in imports} for room, imports in inside.items()
    }
    tuple(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError with the circle


def test_kernels_know_nothing_of_models() -> None:
    for path in (ROOT / "kernels" / "qlora_kernels").glob("*.py"):
        text = path.read_text()
        for name in ("transformers", "bitsandbytes", "qlora_trainer"):
            assert f"import {name}" not in text, f"{path.name} imports {name}"
            assert f"from {name}" not in text, f"{path.name} imports {name}"


@pytest.mark.parametrize("package", sorted(OWNERS))
def test_each_dependency_has_its_owners(package: str) -> None:
    users = {room for room, imports in rooms().items() if any(m.split(".")[0] == package for m in imports)}
    assert users <= OWNERS[package]


def test_no_module_that_only_unix_has_is_needed_to_import_ours() -> None:
    """At the top of a file, outside a `try`."""
    for path in [*(ROOT / "qlora_trainer").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = imported_modules("\n".join(map(ast.unparse, at_once)))
        assert not {"fcntl", "grp", "pwd", "resource", "termios"} & modules, path


def test_bitsandbytes_is_not_asked_to_move_paged_memory_to_the_host() -> None:
    """It would ask CUDA about device -1, and end the process."""
    for path in (ROOT / "qlora_trainer").rglob("*.py"):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not {"prefetch_tensor", "prefetch_all"} & names, path


def version_questions(source: str) -> set[str]:
    """How a file asks which torch it has: by names that not every version has, or by its version number.

    The number itself may be kept or written, shortened inside an f-string too; it may not be compared or parsed.
    """
    tree, number = ast.parse(source), "torch.__version__"
    written = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        names = {getattr(node, field, None) for field in ("attr", "id", "value", "name")}
        found |= {name for name in ("empty_host_cache", "_host_emptyCache") if name in names}
        asked: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            asked = [node.value]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called.endswith("signature") and "varlen_attn" in map(ast.unparse, node.args):
                found.add("signature(varlen_attn)")
            if called not in ("print", "str") and node not in written:
                asked = [*node.args, getattr(node.func, "value", node.func)]
        if any(ast.unparse(part) == number for part in asked):
            found.add(number)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.accelerator.empty_host_cache()", {"empty_host_cache"}),
        ("getattr(torch._C, '_host_emptyCache', None)", {"_host_emptyCache"}),
        ("from torch.accelerator import empty_host_cache", {"empty_host_cache"}),
        ("inspect.signature(varlen_attn)", {"signature(varlen_attn)"}),
        ("if Version(torch.__version__) >= Version('2.12'): pass", {"torch.__version__"}),
        ("torch.__version__ < '2.12'", {"torch.__version__"}),
        ("torch.__version__.startswith('2.1')", {"torch.__version__"}),
        ("torch.__version__.split('.')", {"torch.__version__"}),
        ("f'{torch.__version__ >= chosen}'", {"torch.__version__"}),
        ("torch.__version__[:4]", {"torch.__version__"}),
        ("json.dumps({'torch': str(torch.__version__)})", set()),
        ("record = {'torch': torch.__version__}", set()),
        ("say(f'torch {torch.__version__.split(chr(43))[0]}')", set()),
    ],
)
def test_a_question_for_torchs_version_is_seen_however_it_is_written(source: str, found: set[str]) -> None:
    assert version_questions(source) == found


def test_which_torch_there_is_is_asked_in_one_file() -> None:
    asking = {
        str(path.relative_to(ROOT)): found
        for folder in ("qlora_trainer", "kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if (found := version_questions(path.read_text()))
    }
    assert asking.keys() == {"kernels/qlora_kernels/torch_features.py"}, asking


def test_nothing_is_pickled_or_run_from_a_checkpoint() -> None:
    for path in [*(ROOT / "qlora_trainer").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "cloudpickle"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"torch.load", "torch.save", "eval", "exec"}, f"{path}: {called}"
                remote = [k for k in node.keywords if k.arg == "trust_remote_code"]
                assert all(ast.unparse(k.value) == "False" for k in remote), path
                strict = [k for k in node.keywords if k.arg == "strict" and called.endswith("load_state_dict")]
                assert all(ast.unparse(k.value) == "True" for k in strict), path


def test_a_package_called_kernels_is_neither_shadowed_nor_run(tmp_path: Path) -> None:
    """transformers and bitsandbytes look for a package `kernels`; our folder of that name must not be taken for it."""
    stub = tmp_path / "kernels"
    stub.mkdir()
    (stub / "__init__.py").write_text(
        "__version__ = '0.18.5'\n"
        "def get_kernel(*args, **kwargs):\n"
        "    raise SystemExit('a kernel was fetched')\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return lambda *args, **kwargs: (lambda wrapped: wrapped)\n"
    )
    info = tmp_path / "kernels-0.18.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    code = (
        "import sys; sys.path.append(sys.argv[1]); import qlora_trainer.quantization; "
        "from transformers import LlamaForCausalLM; import kernels; print(kernels.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(stub / "__init__.py")


def test_the_wheel_ships_no_package_called_kernels(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"qlora_trainer", "qlora_kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists()
