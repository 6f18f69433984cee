"""Kernels for any N:M and for blocks: numbers on a CPU, compilation where Triton is, numbers on a GPU.

On a CPU the plain Triton kernels run in Triton's interpreter, in a process of its own, for it is chosen when
Triton is imported. It does not know Gluon: ``Tile`` and ``Pointer`` below are what runs ``runs_kernel`` as
ordinary Python, on torch tensors, and they refuse a read out of bounds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from s3tensor.mask import project
from s3tensor.packing import pack, unpack
from s3tensor.pattern import BoundPattern, Pattern

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)


def random_packed(
    pattern: str, rows: int, columns: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[BoundPattern, Tensor, Tensor, Tensor]:
    """The bound pattern, values, indices, and the dense weight they stand for."""
    bound = Pattern.parse(pattern).bind((rows, columns))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    values, indices = pack(weight.to(dtype), project(weight, pattern), bound)
    dense = unpack(values, indices, bound)
    return bound, values.to(device), indices.to(device), dense.to(device)


def close(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """Within the rounding of one float32 sum to the dtype of y."""
    exact = x.double() @ dense.double().t()
    terms = x.double().abs() @ dense.double().abs().t()
    if bias is not None:
        exact = exact + bias.double()
        terms = terms + bias.double().abs()
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}[y.dtype]
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + 2e-6 * terms + 1e-7).all()


# Gluon as ordinary Python -----------------------------------------------------------------------------


class Tile:
    """What a Gluon tensor can do, on a torch tensor; layouts are ignored."""

    def __init__(self, t: Tensor) -> None:
        self.t = t
        self.type = SimpleNamespace(layout=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.t.shape)

    def __getitem__(self, index: Any) -> Tile:
        return Tile(self.t[index])

    def reshape(self, shape: list[int]) -> Tile:
        return Tile(self.t.reshape(shape))

    def permute(self, *dims: int) -> Tile:
        return Tile(self.t.permute(dims))

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tile:
        return Tile(self.t.contiguous().view(dtype) if bitcast else self.t.to(dtype))


class Pointer:
    """Addresses within a flat tensor; a load or store outside of it fails."""

    def __init__(self, flat: Tensor, at: Any = 0) -> None:
        self.flat, self.at = flat, at
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.at + raw(offset))

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        at, live = torch.broadcast_tensors(torch.as_tensor(self.at), torch.as_tensor(raw(mask)))
        inside = (at >= 0) & (at < self.flat.numel())
        assert bool((inside | ~live).all()), "an address out of bounds"
        return torch.where(live, at, 0).long(), live


def raw(value: Any) -> Any:
    return value.t if isinstance(value, Tile) else value


def _define(name: str) -> None:
    function: Callable[[Any, Any], Any] = getattr(operator, name)
    word = name.rstrip("_")

    def reflected(a: Tile, b: int) -> Tile:
        return Tile(function(torch.tensor(b, dtype=a.t.dtype), a.t))

    setattr(Tile, f"__{word}__", lambda a, b: Tile(function(a.t, raw(b))))
    setattr(Tile, f"__r{word}__", reflected)


for _name in ("add", "sub", "mul", "floordiv", "mod", "and_", "or_", "xor", "rshift", "lshift"):
    _define(_name)
for _name in ("lt", "le", "ge", "gt", "eq"):
    _define(_name)


class CPU:
    """Stands in for ``gluon.language`` in a program of a grid."""

    int16, int32, int64, float32 = torch.int16, torch.int32, torch.int64, torch.float32

    def __init__(self, *program: int) -> None:
        self.program_id = lambda axis: program[axis]

    def __getattr__(self, name: str) -> Any:  # layouts
        return lambda *_, **__: None

    def arange(self, start: int, end: int, layout: None) -> Tile:
        return Tile(torch.arange(start, end, dtype=torch.int32))

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, layout: None) -> Tile:
        return Tile(torch.zeros(shape, dtype=dtype))

    def load(self, pointer: Pointer, mask: Any = True, other: Any = None) -> Tile:
        at, live = pointer.places(mask)
        # What is masked and has no value of its own must not matter: NaN in each half, or all codes one.
        masked = (
            (0x7FFF7FFF if self.int32 == pointer.flat.dtype else -1) if other is None else other
        )
        if pointer.flat.dtype == torch.uint8:
            masked &= 255
        return Tile(torch.where(live, pointer.flat[at], masked))

    def store(self, pointer: Pointer, value: Tile, mask: Any = True) -> None:
        at, live = pointer.places(mask)
        pointer.flat[at[live]] = value.t.expand(at.shape)[live]

    def join(self, a: Tile, b: Tile) -> Tile:
        return Tile(torch.stack((a.t, b.t), -1))

    def split(self, a: Tile) -> tuple[Tile, Tile]:
        return Tile(a.t[..., 0]), Tile(a.t[..., 1])

    def where(self, condition: Tile, a: Tile, b: Tile) -> Tile:
        return Tile(torch.where(condition.t, a.t, b.t))

    def minimum(self, a: Tile, b: int) -> Tile:
        return Tile(a.t.clamp(max=b))

    def sum(self, a: Tile, axis: int) -> Tile:
        return Tile(a.t.sum(axis))

    def convert_layout(self, a: Tile, layout: None, assert_trivial: bool = False) -> Tile:
        return a


def permute_bytes(a: Any, b: Any, selector: Tile) -> Tile:
    """``prmt`` in its default mode: a selector's fourth bit spreads the sign of the byte."""
    a, b = (torch.as_tensor(raw(v)).long() & 0xFFFFFFFF for v in (a, b))
    both = a | b << 32
    found = torch.zeros_like(selector.t, dtype=torch.int64)
    for i in range(4):
        nibble = selector.t.long() >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 255
        byte = torch.where(nibble > 7, 255 * (byte >> 7), byte)
        found |= byte << 8 * i
    return Tile(found.to(torch.int32))


def shift_left(bits: int, shift: Tile) -> Tile:
    """``shl``: nothing is left by a shift of 32 or more, nor by a negative one, which is a large one."""
    inside = (shift.t >= 0) & (shift.t < 32)
    return Tile(torch.where(inside, torch.tensor(bits) << shift.t.clamp(0, 31).long(), 0).int())


@pytest.fixture
def runs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``launch`` of the Gluon kernel, which runs each program as Python."""
    pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")
    from s3tensor.kernels import expand, runs

    kernel = runs.runs_kernel.fn
    for module in (expand, runs):
        for name, value in list(vars(module).items()):
            if hasattr(value, "fn") and hasattr(value, "arg_names"):
                monkeypatch.setattr(module, name, value.fn)
    spread = {(): 0x1100, (1,): 0x3322}
    monkeypatch.setattr(runs, "_permute", permute_bytes)
    monkeypatch.setattr(runs, "_permute_or_zero", lambda a, s: permute_bytes(a, 0, s))
    monkeypatch.setattr(
        runs,
        "_spread_pairs",
        lambda a: tuple(
            permute_bytes(a, 0, Tile(torch.full_like(a.t, s))) for s in spread.values()
        ),
    )
    monkeypatch.setattr(runs, "_place", shift_left)
    monkeypatch.setattr(
        runs, "halves", lambda a: Tile(a.t.contiguous().view(torch.int16).reshape(*a.shape, 2))
    )
    monkeypatch.setattr(
        runs,
        "mma_v2",
        lambda a, b, acc: Tile(acc.t + (a.t.double() @ b.t.double()).float()),
    )

    class Launched:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            def call(*arguments: Any, num_warps: int, **constants: Any) -> None:
                tensors = [Pointer(a.view(-1)) if isinstance(a, Tensor) else a for a in arguments]
                for pm in range(grid[0]):
                    for pn in range(grid[1]):
                        for module in (expand, runs):
                            monkeypatch.setattr(module, "gl", CPU(pm, pn))
                        kernel(*tensors, **constants)

            return call

    monkeypatch.setattr(runs, "runs_kernel", Launched())
    launch: Callable[..., None] = runs.launch
    return launch


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "8:16", "1:4", "2:8", "4:16"])
def test_runs_are_expanded_to_the_dense_product(
    runs_on_cpu: Callable[..., None], pattern: str, dtype: torch.dtype
) -> None:
    from s3tensor.kernels.runs import Runs

    for rows, columns, n, config in (
        (16, 256, 5, Runs(2, 1, 1, 8, ahead=True)),
        (33, 160, 3, Runs(1, 2, 2, 8, ahead=False)),
        (19, 416, 20, Runs(2, 1, 1, 16, ahead=True)),
    ):
        bound, values, indices, dense = random_packed(pattern, rows, columns, dtype)
        x = torch.randn(n, columns).to(dtype)
        bias = torch.randn(rows).to(dtype)
        y = torch.full((n, rows), float("nan"), dtype=dtype)
        keep, group = bound.keep, bound.blocks_per_scope
        bits = bound.index_bits if bound.index_code == "index" else 0
        words = x.view(torch.int32), values.view(-1).view(torch.int32)
        runs_on_cpu(config, *words, indices, bias, y, keep, group, bits)
        close(y, x, dense, bias)
