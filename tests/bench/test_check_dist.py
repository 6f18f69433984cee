"""tools/check_dist.py: a wheel that lacks a folder, or has one too many, does not pass."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_dist

    return check_dist


@pytest.fixture
def wheel(tool: ModuleType) -> set[str]:
    """The files of a complete wheel."""
    held = tool.files_of(ROOT / "s3tensor")
    held |= {f"s3tensor/{name}" for name in tool.files_of(ROOT / "kernels")}
    return held | {"s3tensor-1.dist-info/METADATA", "s3tensor-1.dist-info/licenses/LICENSE"}


def test_a_complete_wheel_has_no_problems(tool: ModuleType, wheel: set[str]) -> None:
    assert {
        "s3tensor/kernels/matmul.py",
        "s3tensor/py.typed",
        "s3tensor/pattern/presets.py",
    } < wheel
    assert tool.wheel_problems(wheel) == []


@pytest.mark.parametrize(
    "missing", ["s3tensor/kernels/", "s3tensor/mask/", "s3tensor/tensor/data/", "s3tensor/py.typed"]
)
def test_what_a_wheel_lacks_is_named(tool: ModuleType, wheel: set[str], missing: str) -> None:
    left_out = {name for name in wheel if name.startswith(missing)}
    problems = tool.wheel_problems(wheel - left_out)
    assert left_out and len(problems) == len(left_out)
    assert all(name in " ".join(problems) for name in left_out)


@pytest.mark.parametrize("extra", ["kernels/__init__.py", "tests/limits.py", "bench/measure.py"])
def test_a_wheel_holds_nothing_but_the_package(
    tool: ModuleType, wheel: set[str], extra: str
) -> None:
    assert tool.wheel_problems(wheel | {extra}) == [f"the wheel must not hold {extra}"]


def test_a_wheel_has_its_licence_and_an_sdist_the_fixtures_of_its_tests(
    tool: ModuleType, wheel: set[str]
) -> None:
    bare = {name for name in wheel if "LICENSE" not in name}
    assert tool.wheel_problems(bare) == ["the wheel lacks its LICENSE"]
    whole = {*tool.FILES, "pyproject.toml"}.union(*(tool.files_of(ROOT / s) for s in tool.SOURCES))
    assert tool.sdist_problems(whole) == []
    fixtures = {name for name in whole if name.startswith("tests/written_before/")}
    assert len(tool.sdist_problems(whole - fixtures)) == len(fixtures) > 0


def test_the_package_list_names_every_folder_with_modules() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "s3tensor").rglob("*.py")}
    names = {".".join(folder.parts) for folder in folders} | {"s3tensor.kernels"}
    assert set(settings["tool"]["setuptools"]["packages"]) == names
