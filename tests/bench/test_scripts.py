"""Every name of s3tensor that the scripts use exists, also in those that only a GPU can run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    path
    for folder in ("bench", "tools", "examples")
    for path in sorted((ROOT / folder).glob("*.py"))
]


def imported(node: ast.AST) -> dict[str, Any]:
    """What an import of s3tensor binds, by name; nothing of other imports."""
    if isinstance(node, ast.Import):
        ours = [alias for alias in node.names if alias.name.partition(".")[0] == "s3tensor"]
        modules = {alias: importlib.import_module(alias.name) for alias in ours}
        return {a.asname: m for a, m in modules.items() if a.asname}
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("s3tensor"):
        return {}
    module = importlib.import_module(node.module or "")
    found = {}
    for alias in node.names:
        value = getattr(module, alias.name, None)
        if value is None:
            value = importlib.import_module(f"{node.module}.{alias.name}")
        found[alias.asname or alias.name] = value
    return found


def value_of(node: ast.AST, names: dict[str, Any]) -> Any:
    """What a name, or an attribute of a module, stands for; None where it is something else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = value_of(node.value, names)
        if isinstance(owner, ModuleType):
            return getattr(owner, node.attr)
    return None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_names_of_s3tensor_that_a_script_uses_exist(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    if "kernels" in text and importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    nodes = list(ast.walk(ast.parse(text)))
    names: dict[str, Any] = {}
    for node in nodes:
        names |= imported(node)
    for node in nodes:
        value_of(node, names)
