"""The examples run, at toy size, and say what they promise. Those of training have tests of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str, folder: Path) -> str:
    """What an example prints, started as a user starts it."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_quickstart(tmp_path: Path) -> None:
    said = run("quickstart.py", "--features", "128", folder=tmp_path)
    errors = {name: float(e) for name, e in re.findall(r"(\w+) +output error ([\d.]+)", said)}
    assert set(errors) == {"magnitude", "wanda", "sparsegpt", "admm"}
    assert errors["admm"] < errors["sparsegpt"] < errors["magnitude"]
    assert "equal bit for bit" in said


def test_custom_pattern(tmp_path: Path) -> None:
    said = run("custom_pattern.py", "--out", "picture.png", folder=tmp_path)
    assert "keeps 8 of 16 blocks" in said
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_inference(tmp_path: Path) -> None:
    pytest.importorskip("torch._inductor")
    said = run("compiled_inference.py", "--hidden", "64", "--layers", "1", folder=tmp_path)
    assert "the graph: 3 products by compressed weights" in said
    assert len(re.findall(r"^batch", said, re.MULTILINE)) == 3


@pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 7),
    reason="torch.export takes no parameter that is a tensor subclass before torch 2.7",
)
def test_export(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    said = run("export.py", "--out", "out", folder=tmp_path)
    assert "answers as the model does" in said and "read without s3tensor" in said
    assert {"model.pt2", "compressed", "dense"} == {
        path.name for path in (tmp_path / "out").iterdir()
    }


def test_llm_pruning(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    said = run("llm_pruning.py", "--steps", "8", "--out", "out", folder=tmp_path)
    assert len(re.findall(r"perplexity +[\d.]+, 21 linears", said)) == 4
    assert "saved in out: 21 weights verified" in said
