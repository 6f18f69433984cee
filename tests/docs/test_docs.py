"""Every Python block in the README and the docs runs, in order, in one process for each file."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# The README's first example is for a GPU, at the size of a real layer; without one it runs at toy size.
TOY = {'"cuda"': '"cpu"', "M, K = 2560, 9728": "M, K = 64, 256"}
# A block may stand in a tab, and is indented then.
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


def blocks(page: Path) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(code) for _, code in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    code = "\n".join(blocks(page))
    if page.name == "README.md" and not torch.cuda.is_available():
        for real, toy in TOY.items():
            assert real in code
            code = code.replace(real, toy)
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_local_links_of_a_page_lead_somewhere(page: Path) -> None:
    dead = [
        link
        for link in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert not dead


def test_the_readme_has_code_and_the_papers_example_first() -> None:
    first, *others = blocks(ROOT / "README.md")
    assert "M, K = 2560, 9728" in first and "prune_true_obs(nnz=2)" in first
    assert len(others) >= 4


def test_the_pages_show_the_stored_results() -> None:
    script = ROOT / "tools" / "readme_tables.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
