"""Gluon kernels on numpy arrays: what they compute, with layouts left out and PTX as written.

Triton's interpreter takes no Gluon and no inline assembly. Here a kernel's source runs as Python over arrays:
a layout is nothing, a conversion of one is the identity, and the assembly is read instruction by instruction.
Every load and store is checked to be inside its array; what a mask leaves out of a load is garbage. Whether a
layout is what the hardware wants, only the compiler (``assert_trivial``) and a GPU can tell.
"""

from __future__ import annotations
import __future__

import ast
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import s3tensor.kernels
import torch
from torch import Tensor

KERNELS = Path(s3tensor.kernels.__file__).resolve().parent
BFLOAT16, FLOAT16 = "bfloat16", "float16"
_KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_PROGRAM = threading.local()
_LOCK = threading.Lock()


def _bits_to_float(bits: Any, kind: str) -> Any:
    bits = np.ascontiguousarray(bits).view(np.uint16)
    if kind == BFLOAT16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def _float_to_bits(values: Any, kind: str) -> Any:
    dtype = torch.bfloat16 if kind == BFLOAT16 else torch.float16
    rounded = torch.from_numpy(np.array(values, dtype=np.float64)).to(dtype)
    return rounded.view(torch.int16).numpy()


class Array(np.ndarray):
    """A tensor of Gluon."""

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]  # a new tensor, as in Gluon
        return self + other

    def permute(self, *order: int) -> Any:
        return self.transpose(*order)

    def to(self, kind: Any, bitcast: bool = False) -> Any:
        if bitcast:
            return _bits_to_float(self, kind).view(Array)
        return self.view(Array) if isinstance(kind, str) else self.astype(kind)


@dataclass
class Pointer:
    """Offsets into an array of one dim."""

    data: Any
    at: Any
    kind: Any  # of the elements: a numpy dtype, or the name of a 16-bit float

    @staticmethod
    def of(tensor: Tensor) -> Pointer:
        kind = _KINDS.get(tensor.dtype)
        flat = tensor.detach().reshape(-1)
        data = (flat.view(torch.int16) if kind else flat).numpy()
        return Pointer(data, 0, kind or data.dtype)

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.kind)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.at + offset, self.kind)


def _places(pointer: Pointer, mask: Any) -> tuple[Any, Any]:
    at = np.asarray(pointer.at, dtype=np.int64)
    mask = np.broadcast_to(np.asarray(True if mask is None else mask), at.shape)
    inside = (at >= 0) & (at < pointer.data.size)
    assert bool((inside | ~mask).all()), "an access outside of the array"
    return np.where(mask, at, 0), mask


def _load(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Any:
    at, mask = _places(pointer, mask)
    found = pointer.data[at] if pointer.data.size else np.zeros(at.shape, pointer.data.dtype)
    garbage = np.full(at.shape, 0x7B7B7B7B if found.dtype.itemsize == 4 else 0x7B, np.int64)
    rest = garbage.astype(found.dtype) if other is None else np.asarray(other, found.dtype)
    found = np.where(mask, found, rest)
    if isinstance(pointer.kind, str):
        found = _bits_to_float(found, pointer.kind)
    return found.view(Array)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at, mask = _places(pointer, mask)
    value = np.broadcast_to(value, at.shape)
    if isinstance(pointer.kind, str):
        value = _float_to_bits(value, pointer.kind)
    pointer.data[at[mask]] = value[mask]


def _atomic_add(cell: Pointer, value: int, **_: Any) -> int:
    with _LOCK:
        before = int(cell.data[cell.at])
        cell.data[cell.at] += value
    if not value:
        time.sleep(0.001)  # a program that waits for others
    return before


# PTX --------------------------------------------------------------------------------------------------


def _u32(x: Any) -> Any:
    return np.asarray(x).astype(np.int64) & 0xFFFFFFFF


def _float32(x: Any) -> Any:
    return np.ascontiguousarray(_u32(x).astype(np.uint32)).view(np.float32)


def _pairs(x: Any, kind: str) -> Any:
    """Two 16-bit floats of each word, low one first."""
    return [_bits_to_float((_u32(x) >> s & 0xFFFF).astype(np.uint16), kind) for s in (0, 16)]


def _join_pairs(pairs: list[Any], kind: str) -> Any:
    low, high = (_float_to_bits(p, kind).astype(np.int64) & 0xFFFF for p in pairs)
    return low | high << 16


def _prmt(a: Any, b: Any, selector: Any) -> Any:
    a, b, selector = np.broadcast_arrays(_u32(a), _u32(b), _u32(selector))
    both, out = a | b << 32, np.zeros(a.shape, np.int64)
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = both >> 8 * (nibble & 7) & 0xFF
        byte = np.where(nibble & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        out |= byte << 8 * place
    return out


def _f16x2(kind: str, *terms: Any) -> Any:
    """The last one plus the product of the others, each half exactly, then rounded."""
    halves = [_pairs(t, kind) for t in terms]
    if len(terms) == 2:
        return _join_pairs([x.astype(np.float64) + y for x, y in zip(*halves, strict=True)], kind)
    return _join_pairs(
        [x.astype(np.float64) * y + z for x, y, z in zip(*halves, strict=True)], kind
    )


def _add_f32(a: Any, b: Any) -> Any:
    return (_float32(a) + _float32(b)).view(np.uint32).astype(np.int64)


OPERATIONS: dict[str, Any] = {
    "prmt.b32": _prmt,
    "xor.b32": lambda a, b: _u32(a) ^ _u32(b),
    "and.b32": lambda a, b: _u32(a) & _u32(b),
    "mul.lo.u32": lambda a, b: _u32(_u32(a) * _u32(b)),
    "mad.lo.u32": lambda a, b, c: _u32(_u32(a) * _u32(b) + _u32(c)),
    "add.rn.f32": _add_f32,
    "add.rn.f16x2": lambda a, b: _f16x2(FLOAT16, a, b),
    "fma.rn.bf16x2": lambda a, b, c: _f16x2(BFLOAT16, a, b, c),
    "mov.b32": lambda a: _u32(a),
}


def run_assembly(text: str, constraints: str, inputs: list[Any]) -> list[Any]:
    """The outputs of inline assembly, int32 or int16 each, for arrays of inputs that broadcast."""
    kinds = [c for c in constraints.split(",") if c.startswith("=")]
    values: dict[str, Any] = {}
    shape = np.broadcast_shapes(*(np.shape(x) for x in inputs)) if inputs else ()
    for number, given in enumerate(inputs, len(kinds)):
        values[f"${number}"] = np.broadcast_to(_u32(given), shape)

    def read(name: str) -> Any:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return values[name] if name in values else int(name, 0)

    for line in re.sub(r"//.*", "", text).replace("\n", " ").split(";"):
        line = re.sub(r"^[{}\s]*(?=[a-z.])", "", line.strip()).strip()
        if not line.strip("{} ") or line.startswith((".reg", "griddepcontrol")):
            continue
        name, _, rest = line.partition(" ")
        targets, *sources = re.findall(r"\{[^}]*\}|[^,\s{}]+", rest)
        result = OPERATIONS[name](*(read(source) for source in sources))
        if targets.startswith("{"):
            low, high = (target.strip() for target in targets[1:-1].split(","))
            values[low], values[high] = result & 0xFFFF, result >> 16
        else:
            values[targets] = result
    out = []
    for number, kind in enumerate(kinds):
        found = np.broadcast_to(values.get(f"${number}", 0), shape)
        sized = (np.uint16, np.int16) if kind == "=h" else (np.uint32, np.int32)
        out.append(found.astype(sized[0]).view(sized[1]).view(Array))
    return out


def _inline_asm(asm: str, constraints: str, args: list[Any], dtype: Any, **_: Any) -> Any:
    found = run_assembly(asm, constraints, args)
    return tuple(found) if isinstance(dtype, tuple) else found[0]


# kernels ----------------------------------------------------------------------------------------------


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _jit(fn: Any = None, **_: Any) -> Any:
    return fn if fn is not None else _jit


def _assert(holds: Any, text: str = "") -> None:
    assert holds, text


def _stack(left: Any, right: Any) -> Any:
    return np.stack(np.broadcast_arrays(left, right), -1).view(Array)


def _mma(a: Any, b: Any, acc: Any) -> Any:
    return (np.matmul(a.astype(np.float64), b.astype(np.float64)) + acc).view(Array)


_GL = SimpleNamespace(
    constexpr=lambda value: value,
    arange=lambda start, stop, layout=None: np.arange(start, stop, dtype=np.int32).view(Array),
    zeros=lambda shape, dtype, layout=None: np.zeros(shape, np.float64).view(Array),
    sum=lambda x, axis: x.sum(axis),
    where=lambda condition, a, b: np.where(condition, a, b),
    join=_stack,
    split=lambda x: (x[..., 0], x[..., 1]),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
    inline_asm_elementwise=_inline_asm,
    static_assert=_assert,
    static_range=range,
    program_id=lambda axis: _PROGRAM.ids[axis],
    num_programs=lambda axis: _PROGRAM.grid[axis],
    barrier=_nothing,
    bfloat16=BFLOAT16,
    float16=FLOAT16,
    float32=np.float64,  # sums are kept wider than on a GPU
    int32=np.int32,
    int16=np.int16,
    **dict.fromkeys(
        (
            "SliceLayout",
            "DistributedLinearLayout",
            "BlockedLayout",
            "NVMMADistributedLayout",
            "DotOperandLayout",
        ),
        _nothing,
    ),
)


def load(*files: str) -> SimpleNamespace:
    """The names of the last of some kernel files, each after those that it imports from, as plain Python."""
    spaces: dict[str, dict[str, Any]] = {}
    for file in files:
        space = spaces[file] = {
            "gl": _GL,
            "gluon": SimpleNamespace(jit=_jit),
            "constexpr_function": lambda fn: fn,
            "mma_v2": _mma,
            "Any": Any,
            "dataclass": dataclass,
            "Tensor": Tensor,
            "__name__": __name__,
        }
        tree = ast.parse((KERNELS / f"{file}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            # What is not among them, as the start of a launch, is the host's.
            if isinstance(node, ast.ImportFrom) and node.level and node.module in spaces:
                space.update({alias.name: spaces[node.module][alias.name] for alias in node.names})
        tree.body = [n for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom))]
        flags = __future__.annotations.compiler_flag
        exec(compile(tree, f"{file}.py", "exec", flags=flags), space)
    return SimpleNamespace(**spaces[files[-1]])


def launch(kernel: Any, grid: tuple[int, int], arguments: list[Any], constants: Any) -> None:
    """Run all programs of a grid, each in a thread of its own: those of a split wait for each other."""
    errors: list[BaseException] = []

    def program(first: int, second: int) -> None:
        _PROGRAM.ids, _PROGRAM.grid = (first, second), grid
        try:
            with np.errstate(all="ignore"):
                kernel(*arguments, **constants)
        except BaseException as error:
            errors.append(error)

    for second in range(grid[1]):
        threads = [threading.Thread(target=program, args=(i, second)) for i in range(grid[0])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    if errors:
        raise errors[0]
