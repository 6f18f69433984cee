"""Tests that run in Triton's interpreter, which must be chosen before Triton is imported.

So one test of a file runs the others of that file again, in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import s3tensor as s3

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("interpreter", pytest.param("cuda", marks=pytest.mark.gpu))


def device_of(where: str) -> str:
    """The torch device of one of ``DEVICES``; skips what runs in the other process."""
    if where == "interpreter" and not INTERPRETED:
        pytest.skip("runs in the process of test_the_interpreter_runs_the_tests_of_this_file")
    return "cpu" if where == "interpreter" else "cuda"


def run_again(file: str, least: int) -> None:
    """Run a file's tests in the interpreter, all but the compiler's; more than ``least`` must pass."""
    if INTERPRETED:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    command += ["-k", "not compile", "-W", "ignore::RuntimeWarning"]
    root = Path(s3.__file__).resolve().parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None and int(found.group(1)) > least, done.stdout[-500:]
