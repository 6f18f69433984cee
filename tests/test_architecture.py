"""The house: who may import whom, what a plain import costs, and that every docstring's example runs."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import s3tensor as s3

PACKAGE = Path(s3.__file__).resolve().parent
KERNELS = PACKAGE.parent / "kernels"
if not KERNELS.is_dir():  # not a checkout: the installed place
    KERNELS = PACKAGE / "kernels"

# Floors from the ground up. A room, which is a folder or a file of s3tensor/, imports rooms of lower floors.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "version", "moved"),
    ("files", "modes", "pattern"),
    ("kernels",),
    ("mask", "text"),
    ("tensor",),
    ("prune",),
    ("paper",),
    ("model", "draw", "benchmark", "testing"),
    ("train",),
    ("io",),
    ("llm",),
    ("evaluate",),
    ("cli",),
    ("__main__",),
)

# What only these rooms may import, and only inside functions where they are optional.
GUESTS = {
    "transformers": {"llm", "io", "cli", "evaluate", "train"},
    "accelerate": {"io"},
    "datasets": {"text", "evaluate"},
    "lm_eval": {"evaluate"},
    "matplotlib": {"draw"},
    "hypothesis": {"testing"},
    "triton": {"kernels"},
    "peft": {"train"},
}
STDLIB_ONLY = {"errors", "version", "moved", "pattern"}
GATE = (
    PACKAGE / "mask" / "backend.py"
)  # the only module that imports kernels or asks for HIP and Triton


def sources() -> list[tuple[str, Path]]:
    """(room, file) of every module; a room is the first name below s3tensor."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name not in ("__init__", "kernels"):
            found.append((name, path))
    return found + [("kernels", path) for path in sorted(KERNELS.rglob("*.py"))]


def module_name(path: Path) -> str:
    top = KERNELS.parent if path.is_relative_to(KERNELS) else PACKAGE.parent
    parts = path.relative_to(top).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    return name if name.startswith("s3tensor") else f"s3tensor.{name}"


def imports(path: Path) -> list[str]:
    """Absolute names of what a file imports, ``if TYPE_CHECKING`` left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert path.is_relative_to(KERNELS), f"{path.name}: imports are absolute"
                below = f"s3tensor.kernels.{node.module}" if node.module else "s3tensor.kernels"
                names.extend([below, *(f"{below}.{alias.name}" for alias in node.names)])
            else:
                names.append(node.module or "")
            if (node.module or "").startswith("s3tensor"):
                names.extend(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


def floor_of(room: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if room in rooms:
            return number
    raise AssertionError(f"{room} has no floor; give it one in tests/test_architecture.py")


def rooms_imported(path: Path) -> set[str]:
    names = imports(path)
    return {name.split(".")[1] for name in names if name.startswith("s3tensor.")}


@pytest.mark.parametrize(
    ("room", "path"), sources(), ids=lambda value: getattr(value, "name", value)
)
def test_a_room_imports_lower_floors_only(room: str, path: Path) -> None:
    others = rooms_imported(path) - {room}
    above = {other for other in others if floor_of(other) >= floor_of(room)}
    assert not above, f"{path.name} imports {sorted(above)}, not below it"


def test_a_file_imports_before_all_else() -> None:
    for _, path in sources():
        body = ast.parse(path.read_text(encoding="utf-8")).body
        kinds = (ast.FunctionDef, ast.ClassDef)
        first = next((i for i, node in enumerate(body) if isinstance(node, kinds)), len(body))
        late = [n for n in body[first:] if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not late, f"{path.name}:{late[0].lineno} imports behind a definition"


def test_only_the_gate_imports_kernels_and_kernels_import_nothing_of_s3tensor() -> None:
    for room, path in sources():
        names = imports(path)
        if room == "kernels":
            others = {name for name in names if name.startswith("s3tensor")}
            assert all(name.startswith("s3tensor.kernels") for name in others), path.name
            continue
        assert not {name for name in names if name.startswith("s3tensor.kernels")}, path.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = getattr(node, "attr", getattr(node, "value", None))
            asks = text == "hip" or re.fullmatch(r"s3tensor\.kernels(\.\w*)?", str(text))
            assert path == GATE or not asks, (
                f"{path.name}:{node.lineno} has {text}; use {GATE.name}"
            )
    assert "s3tensor.kernels" not in loaded_modules("import s3tensor.mask.backend")


def test_pruners_know_nothing_of_the_tensor() -> None:
    for room, path in sources():
        if room == "prune":
            assert not rooms_imported(path) & {"tensor", "train"}, path.name


def test_guests_stay_in_their_rooms() -> None:
    for room, path in sources():
        for name in imports(path):
            guest = name.split(".")[0]
            assert room in GUESTS.get(guest, {room}), f"{path.name} imports {guest}"


def test_the_ground_floor_needs_the_standard_library_only() -> None:
    for room, path in sources():
        if room in STDLIB_ONLY:
            foreign = {
                name.split(".")[0]
                for name in imports(path)
                if name.split(".")[0] not in (*sys.stdlib_module_names, "s3tensor")
            }
            assert not foreign, f"{path.name} imports {foreign}"


def loaded_modules(statement: str) -> set[str]:
    """Modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def loaded_after(statement: str) -> set[str]:
    """The top-level ones of them."""
    return {name.split(".")[0] for name in loaded_modules(statement)}


def test_a_plain_import_loads_no_torch_and_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "transformers", "triton", "pandas", "matplotlib", "datasets", "rich"}
    assert not loaded_after("import s3tensor") & heavy


def test_the_tensor_needs_neither_transformers_nor_triton() -> None:
    # torch itself may look for triton; s3tensor must not be what loads it.
    before = loaded_after("import torch")
    after = loaded_after("import s3tensor as s3; s3.StructuredSparseTensor, s3.prune, s3.S3Sparse")
    assert not (after - before) & {"transformers", "triton", "pandas", "matplotlib", "datasets"}


def test_every_module_imports_where_the_optional_packages_are_missing() -> None:
    # The last is imported by transformers' side alone, and defines classes of it.
    left_out = {"s3tensor.testing", "s3tensor.cli.__main__", "s3tensor.io.transformers_quantizer"}
    names = sorted({module_name(path) for room, path in sources() if room != "kernels"} - left_out)
    optional = ("triton", "transformers", "accelerate", "datasets", "pandas", "matplotlib", "gguf")
    # None in sys.modules makes an import fail, as on a machine without the package.
    blocked = f"import sys; sys.modules.update(dict.fromkeys({optional}))"
    imported = "; ".join(f"import {name}" for name in names)
    assert "s3tensor" in loaded_after(f"{blocked}; {imported}")


def test_files_do_not_import_each_other_in_a_circle() -> None:
    files = {module_name(path): path for _, path in sources() if path.name != "__init__.py"}
    needs = {name: set(imports(path)) & set(files) for name, path in files.items()}
    try:
        list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_the_folder_of_kernels_is_no_top_level_module() -> None:
    assert importlib.import_module("s3tensor.kernels").__file__
    spec = importlib.util.find_spec("kernels")
    assert spec is None or KERNELS not in map(Path, spec.submodule_search_locations or [])


API = (
    "Pattern PatternError Layout composition coalesce complement right_inverse project satisfies prune "
    "Hessian output_error StructuredSparseTensor S3Sparse finalize sparsify_ llm save_pretrained "
    "from_pretrained perplexity View BlockSpec BlockCoupling ScopeSpec ScopeCoupling SparsityBuilder "
    "StructuredOBS kth_largest mid_kth_largest draw_layout compute_hessian ModuleInputCatcher "
    "transfer_to_device get_c4 Density sparsify_training_ step freeze quantize_ Int8SparseTensor"
)


@pytest.mark.parametrize("name", API.split())
def test_every_public_name_is_there_and_listed(name: str) -> None:
    assert getattr(s3, name) is not None
    assert name in dir(s3)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = s3.nothing


def modules_with_examples() -> list[str]:
    return [
        module_name(path)
        for room, path in sources()
        if room != "kernels" and ">>> " in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_docstrings_run(name: str) -> None:
    import torch

    module = importlib.import_module(name)
    names = {"torch": torch, "nn": torch.nn, "parametrize": torch.nn.utils.parametrize, "s3": s3}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=flags)
    ran = 0
    for test in finder.find(module, extraglobs=names):
        report: list[str] = []
        result = runner.run(test, out=report.append)
        assert result.failed == 0, "".join(report)
        ran += result.attempted
    assert ran > 0
