"""The shape of the project: imports point one way, each dependency has one owner, and nothing shadows another."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"


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


def test_no_folder_but_the_command_lines_may_draw() -> None:
    """The contract lists folders by hand; a new one, which `exhaustive` wants among the layers, must come here too."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contracts = {contract["id"]: contract for contract in settings["contracts"]}
    folders = {folder for layer in contracts["layers"]["layers"] for folder in layer.split(" | ")}
    others = {f"qlora_trainer.{folder}" for folder in folders - {"cli"}}
    assert set(contracts["drawing"]["source_modules"]) == others | {"qlora_kernels"}


def test_packages_import_no_module_by_themselves() -> None:
    """An __init__ that imported at once would be an arrow from every module to what it names."""
    for path in (ROOT / "qlora_trainer").rglob("__init__.py"):
        at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = imported_modules("\n".join(map(ast.unparse, at_once)))
        assert [module for module in modules if module.startswith("qlora_trainer")] == [], path


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


TYPED = ("qlora_trainer", "kernels/qlora_kernels")
OURS = [*(ROOT / "qlora_trainer").rglob("*.py"), *(ROOT / "kernels" / "qlora_kernels").rglob("*.py")]


def test_each_folder_says_in_six_lines_what_it_is_for() -> None:
    for folder in {path.parent for path in OURS}:
        docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert docstring, folder
        assert len(docstring.splitlines()) <= 6, folder


def test_no_folder_and_no_file_grows_beyond_what_a_reader_can_survey() -> None:
    """At most 16 files a folder; of the command line, with one file a command, 24."""
    for folder in {path.parent for path in OURS if path.is_relative_to(ROOT / "qlora_trainer")}:
        assert len(list(folder.glob("*.py"))) <= (24 if folder.name == "cli" else 16), folder
    long = {str(path): lines for path in OURS if (lines := len(path.read_text().splitlines())) > 350}
    assert long == {}


PROVED_BY_THEIR_USERS = {
    "qlora_kernels.probe_triton",
    "qlora_trainer.model.pretrained",
    "qlora_trainer.model.sentencepiece_model",
    "qlora_trainer.runs.report.style",
}
"""Modules that no test names, though each could be tested alone; what a test names is taken out here."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("kernels.").removesuffix(".__init__")


def test_no_file_of_tests_grows_beyond_what_a_reader_can_survey() -> None:
    files = {str(path.relative_to(TESTS)): path.read_text() for path in TESTS.rglob("*.py")}
    assert {name for name, text in files.items() if len(text.splitlines()) > 350} == set()


def test_each_module_has_a_test_that_names_it() -> None:
    """By an import or a file of its name; but for commands, which the command line runs, and files of 40 lines."""
    paths = list(TESTS.rglob("*.py"))
    sources = [*(path.read_text() for path in paths), (ROOT / "qlora_trainer" / "cli" / "app.py").read_text()]
    named = set().union(*map(imported_modules, sources))
    stems = {path.stem for path in paths}
    large = [path for path in OURS if len(list(filter(str.strip, path.read_text().splitlines()))) > 40]
    unnamed = {path for path in large if module_name(path) not in named and f"test_{path.stem}" not in stems}
    assert {module_name(path) for path in unnamed} == PROVED_BY_THEIR_USERS


def public_names(source: str) -> set[str]:
    """List the functions, classes and constants that a file defines at its top level without an underscore."""
    names = set()
    statements: list[ast.stmt] = ast.parse(source).body
    while statements:
        node = statements.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names |= {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        else:  # what is defined in one of the ways that a file may take
            statements += [inner for inner in ast.walk(node) if isinstance(inner, ast.stmt) and inner is not node]
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def load(): local = 1", {"load"}),
        ("class Row: field = 1", {"Row"}),
        ("LONG = TALL = 1", {"LONG", "TALL"}),
        ("LEFT, (RIGHT, _inner) = 1, (2, 3)", {"LEFT", "RIGHT"}),
        ("limit: int = 3", {"limit"}),
        ("table[key].field = 1", set()),
        ("try: fast = 1\nexcept ImportError: slow = 2", {"fast", "slow"}),
        ("if windows:\n def load(): pass\nelse: load = None", {"load"}),
        ("from other import load", set()),
    ],
)
def test_public_names_are_seen_however_they_are_assigned(source: str, names: set[str]) -> None:
    assert public_names(source) == names


def test_no_public_name_is_defined_in_two_files() -> None:
    homes: dict[str, list[str]] = {}
    for path in OURS:
        for name in public_names(path.read_text()):
            homes.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


# What a first line may begin with; add the verb that is missing.
VERBS = """
Adapt Add Advise Allocate Allow Answer Append Apply Ask Assert Assign Attach Attend Average Begin Bind Build Cache Call
Cast Check Choose Clear Clip Clone Close Collect Combine Compare Compile Compute Concatenate Configure Connect Continue
Convert Copy Count Create Cut Decide Declare Decode Define Delete Dequantize Derive Describe Detect Determine
Digest Disable Divide Download Draw Drop Emit Enable Encode End Ensure Enter Escape Estimate Evaluate Examine
Execute Exit Expand Experiment Explain Export Extend Extract Fetch Fill Filter Find Fine-tune Finish Flatten
Flush Fold Follow Forget Format Free Freeze Gather Generate Give Group Guess Hand Handle Hash Hide Hold Identify
Ignore Import Infer Initialize Insert Inspect Install Invert Join Keep Launch Lay Leave Let Limit List Load
Locate Lock Log Look Lower Make Map Mark Mask Match Measure Merge Mix Move Multiply Name Normalize Note Open
Order Pack Pad Page Parse Pass Pause Pick Plan Predict Prepare Pretend Print Process Prune Pull Push Put
Quantize Query Raise Rank Read Rebuild Receive Recognize Recompute Record Reduce Refuse Register Reject Release
Remember Remove Rename Render Repeat Replace Report Represent Reset Resolve Restore Resume Return Reverse Rotate
Round Run Sample Save Say Scale Seal Search Seed Select Send Serve Set Share Shift Show Shuffle Silence Simulate
Skip Smooth Sort Split Start Stop Store Stream Strip Suggest Sum Summarize Swap Switch Take Test Thin Time
Tokenize Trace Track Train Transform Translate Transpose Trim Truncate Try Turn Undo Unpack Update Upload Use
Validate Verify Visit Wait Walk Warn Wrap Write Yield Zero
"""


def begins_with_a_verb(docstring: str) -> bool:
    """Compare the first word with the list: by its form alone, "Optimizer steps of an epoch" would pass."""
    first = re.match(r"[\w-]+(?=[ ,.:])", docstring)
    return first is not None and first[0] in VERBS.split()


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the rows.", True),
        ("Pass the value on.", True),
        ("Read, render and tokenize.", True),
        ("What a row holds.", False),
        ("The rows of a file.", False),
        ("Rows of a file.", False),
        ("Returns the rows.", False),
        ("`weight`, dequantized.", False),
        ("config.json of a model.", False),
        ("Optimizer steps of an epoch.", False),
    ],
)
def test_a_verb_is_known_by_the_list(docstring: str, expected: bool) -> None:
    assert begins_with_a_verb(docstring) == expected


def test_docstrings_begin_with_a_verb() -> None:
    """Of modules, classes, functions, methods and properties; a folder's says its subject."""
    found = []
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module) and path.name == "__init__.py":
                continue
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring and not begins_with_a_verb(docstring):
                    name = getattr(node, "name", "the file itself")
                    found.append(f"{path.relative_to(ROOT)}: {name}: {docstring.splitlines()[0]}")
    assert found == [], "\n" + "\n".join(found)


def test_a_docstring_lists_what_its_function_raises_itself() -> None:
    """By pydoclint's DOC501 alone: its other rules know nothing of what a call raises."""
    command = [sys.executable, "-m", "pydoclint.main", "--quiet", "--skip-checking-raises=False", *TYPED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = done.stdout + done.stderr
    assert "DOC50" in found  # of the other rules: it has run
    assert [line for line in found.splitlines() if "DOC501" in line] == []


def version_questions(source: str) -> set[str]:
    """How a file asks which torch it has: by names that not every version has, or by its version number.

    The number itself may be kept or written, shortened inside an f-string too; it may not be compared or parsed.
    """
    tree, number = ast.parse(source), "torch.__version__"
    written = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        names = {getattr(node, field, None) for field in ("attr", "id", "value", "name")}
        found |= {name for name in ("empty_host_cache",) if name in names}
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


@pytest.mark.slow
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
        "import sys; sys.path.append(sys.argv[1]); import qlora_trainer.model.modules.nf4_linear; "
        "from transformers import LlamaForCausalLM; import kernels; print(kernels.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(stub / "__init__.py")


def test_the_wheel_ships_types_configs_and_the_demos_rows_and_no_package_called_kernels(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"qlora_trainer/cli/demo_rows/{name}.jsonl" for name in ("train", "eval")} < set(names)
    assert {"qlora_trainer/py.typed", "qlora_kernels/py.typed"} < set(names)
    configs = {f"qlora_trainer/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert configs == {name for name in names if name.startswith("qlora_trainer/configs/")}
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"qlora_trainer", "qlora_kernels"}
    assert not (ROOT / "kernels" / "__init__.py").exists()
