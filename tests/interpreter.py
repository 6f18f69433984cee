"""Tests that run in Triton's interpreter, which must be chosen before Triton is imported.

So one test of a file runs the others of that file again, in a process of their own. And what the compiler
is asked for where there is no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(number) for number in triton.__version__.split(".")[:2])


def keep_sums_in_their_dtype() -> None:
    """Mend the interpreter of Triton 3.2: its sums of 32-bit integers have 64 bits, and so what follows.

    ``tl.sum`` is numpy's there, which widens; a GPU sums in the dtype of the result. From Triton 3.3 on the
    kernels of this library agree with it as they are.
    """
    from triton.runtime import interpreter

    if triton_version() >= (3, 3):
        return

    def summed(self: Any, input: Any) -> Any:
        data = input.handle.data
        total = data.sum(axis=self.axis, keepdims=self.keep_dims, dtype=data.dtype)
        return self.to_tensor(total, input.dtype)

    interpreter.ReduceOps.sum = summed


def source_of(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], aligned: Iterable[str]
) -> Any:
    """What ``triton.compile`` takes, by names; ``aligned`` arguments are multiples of 16."""
    from triton.backends import compiler
    from triton.compiler import ASTSource

    names = kernel.arg_names
    places = [names.index(name) for name in names if name in aligned]
    if triton_version() < (3, 3):
        hints = compiler.AttrsDescriptor.from_hints(dict.fromkeys(places, 16))
        return ASTSource(kernel, signature, constants, hints)
    return ASTSource(kernel, signature, *_by_place(names, constants, places))


def gluon_source_of(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], aligned: Iterable[str]
) -> Any:
    """As :func:`source_of`, of a kernel in Gluon."""
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    places = [names.index(name) for name in names if name in aligned]
    return GluonASTSource(kernel, signature, *_by_place(names, constants, places))


def assembled(source: Any, arch: int, warps: int) -> tuple[Any, str, str]:
    """A kernel compiled for ``sm_<arch>``, its SASS, and its use of registers and memory; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True).stdout
            for option in ("-sass", "-res-usage")
        )
    return built, sass, usage


def _by_place(names: list[str], constants: dict[str, Any], places: list[int]) -> tuple[Any, Any]:
    values = {(names.index(name),): value for name, value in constants.items()}
    return values, {(place,): [["tt.divisibility", 16]] for place in places}
