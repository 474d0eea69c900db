"""The shape of the project: imports point one way, each dependency has one owner, and nothing shadows another."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Import only from rows below. A room is named by its path under its package.
ROWS = [
    {"qlora_kernels"},
    {"errors", "config", "progress", "demo_data"},
    {"directories", "memory_tracking", "quantization", "fingerprint", "tensor_io"},
    {"adapters"},
    {"attention", "data", "gguf_import", "gguf_tensors", "model"},
    {"activations", "checkpoint", "forward", "generation", "optim", "report", "report_page", "report_plot"},
    {"evaluation", "run_directory"},
    {"merge_plan", "merge_verification", "merging", "training"},
    {"planning"},
    {"fitting"},
    {"runs", "trained", "doctor"},
    {"deployment"},
    {"console", "demo", "inspection"},
    {"cli"},
]
OWNERS = {
    "bitsandbytes": {"quantization", "optim"},
    "transformers": {
        "attention",
        "model",
        "gguf_import",
        "gguf_tensors",
        "generation",
        "data.rendering",
        "data.encoding",
        "data.templates",
        "data.preparation",  # for types only
        "doctor",
    },
    "triton": set(),
    "typer": {"cli"},
    "rich": {"cli", "console", "inspection"},
    "peft": set(),
    "trl": set(),
}


def rooms() -> dict[str, list[str]]:
    """Dotted room name -> modules it imports, anywhere in the file."""
    found = {}
    for path in sorted((ROOT / "qlora_trainer").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / "qlora_trainer").with_suffix("").parts)
        imports = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imports += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                imports += [node.module]
        found[name] = imports
    return found


def row_of(room: str) -> int:
    top = room.split(".")[0]
    return next(index for index, row in enumerate(ROWS) if top in row)


def test_every_room_has_a_row() -> None:
    known = set().union(*ROWS)
    assert {room.split(".")[0] for room in rooms()} - known == {"__init__"}


def test_imports_point_downwards() -> None:
    upwards = []
    for room, imports in rooms().items():
        if room.endswith("__init__"):
            continue
        for module in imports:
            target = module.removeprefix("qlora_trainer.") if module.startswith("qlora_trainer.") else None
            # Rooms of one row may know each other; only the other way is forbidden.
            if target and row_of(target) > row_of(room):
                upwards.append(f"{room} imports {target}")
    assert upwards == []


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
