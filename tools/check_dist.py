"""Check what ``python -m build`` made: the wheel and the sdist hold what the repository does, in its place.

    python -m build --no-isolation --outdir build/dist && python tools/check_dist.py build/dist

The wheel must hold every module and data file of ``s3tensor/``, those of ``kernels/`` as
``s3tensor/kernels/``, the licence, and nothing else: a folder that the package list of pyproject.toml forgets
is an error, and so is a top-level ``kernels``, which would shadow the Hugging Face package of that name. The
sdist must hold the sources, and the tests with what they read, so that they run from it.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("s3tensor", "kernels", "tests", "docs", "bench", "examples", "tools")
FILES = ("LICENSE", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "mkdocs.yml")


def files_of(folder: Path) -> set[str]:
    """Files below a folder of the repository, by path from its root; without caches and hidden files."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__" and path.name[0] != "."
    }


def wheel_problems(names: set[str]) -> list[str]:
    """What is missing from the files of a wheel, and what does not belong there."""
    wanted = files_of(ROOT / "s3tensor")
    wanted |= {f"s3tensor/{name}" for name in files_of(ROOT / "kernels")}
    held = {name for name in names if ".dist-info/" not in name}
    problems = [f"the wheel lacks {name}; see [tool.setuptools]" for name in wanted - held]
    problems += [f"the wheel must not hold {name}" for name in held - wanted]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        problems.append("the wheel lacks its LICENSE")
    return sorted(problems)


def sdist_problems(names: set[str]) -> list[str]:
    """What is missing from the files of an sdist, given without its top folder."""
    wanted = {*FILES, "pyproject.toml"}.union(*(files_of(ROOT / source) for source in SOURCES))
    return sorted(f"the sdist lacks {name}; see MANIFEST.in" for name in wanted - names)


def only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"error: {folder} must hold one {pattern}; it holds {len(found)}")
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with one wheel and one sdist")
    folder = parser.parse_args().folder
    with zipfile.ZipFile(only(folder, "*.whl")) as wheel:
        problems = wheel_problems(set(wheel.namelist()))
    with tarfile.open(only(folder, "*.tar.gz")) as sdist:
        members = [member.name.partition("/")[2] for member in sdist if member.isfile()]
    problems += sdist_problems(set(members))
    if problems:
        sys.exit("\n".join(problems))
    print(f"{folder}: the wheel and the sdist are complete")


if __name__ == "__main__":
    main()
