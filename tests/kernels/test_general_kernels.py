"""Kernels for any N:M and for blocks: numbers on a CPU, compilation where Triton is, numbers on a GPU.

On a CPU the plain Triton kernels run in Triton's interpreter. It does not know Gluon: ``runs_kernel`` runs
as ordinary Python on ``Tile`` and ``Pointer`` below, which refuse an address out of bounds.
"""

from __future__ import annotations

import itertools
import operator
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import assembled, gluon_source_of, source_of, triton_version
from torch import Tensor

from s3tensor.mask.packing import pack, unpack
from s3tensor.mask.projection import project
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
    of_sum = 2e-6 if y.dtype == torch.float32 else 1e-5  # tensor cores cut off what they add
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + of_sum * terms + 1e-7).all()


def need_triton() -> None:
    """Skip without a Triton that compiles the kernels: 3.5 or later."""
    pytest.importorskip("triton", reason="needs Triton")
    if triton_version() < (3, 5):
        pytest.skip("the kernels for N:M of columns and for blocks need Triton 3.5")


def need_gluon() -> None:
    """Skip where ``gather`` does all the work."""
    need_triton()
    from s3tensor.kernels import columns as column_kernels

    if column_kernels.runs is None:
        pytest.skip("needs Triton 3.6")


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


def memory(t: Tensor) -> Tensor:
    """From the first element of a tensor to its last, whatever lies between."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((last + 1,), (1,))


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
    need_gluon()
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
                tensors = [Pointer(memory(a)) if isinstance(a, Tensor) else a for a in arguments]
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
        x = torch.randn(n, columns + 16).to(dtype)[:, 8:-8]
        bias = torch.randn(rows).to(dtype)
        y = torch.full((n, rows), float("nan"), dtype=dtype)
        keep, group = bound.keep, bound.blocks_per_scope
        bits = bound.index_bits if bound.index_code == "index" else 0
        words = x.view(torch.int32), values.view(-1).view(torch.int32)
        runs_on_cpu(config, *words, indices, bias, y, keep, group, bits)
        close(y, x, dense, bias)


OLD_TRITON = """
import warnings, torch, triton
triton.__version__ = "3.4.0"
from s3tensor.tensor import linear as paths
from s3tensor.pattern import Pattern
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for pattern in ("4:8", "block:16x16@0.5"):
        bound = Pattern.parse(pattern).bind((64, 128))
        assert paths.general(bound, torch.bfloat16, torch.device("cuda")) is None
(only,) = (str(warning.message) for warning in said)
assert "need Triton 3.5; this is 3.4.0: each call unpacks" in only, only
"""


def test_an_old_triton_leaves_the_kernels_out_and_says_so_once() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    done = subprocess.run([sys.executable, "-c", OLD_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# Triton's interpreter ---------------------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plain Triton kernels, and what they call, run in Triton's interpreter."""
    need_triton()
    from s3tensor.kernels import blocks, gather
    from triton import language
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    # A function that an interpreted one calls leaves the language patched.
    places = (language, language.core, language.core.tensor, language.math)
    before = [dict(vars(place)) for place in places]
    for module in (language, language.standard, gather, blocks):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                monkeypatch.setattr(module, name, interpreter.InterpretedFunction(value.fn))
    patch = interpreter._patch_lang_tensor

    def with_loops(tensor: Any, *scope: Any) -> None:  # numpy 2.4 makes no int of an array of one
        patch(tensor, *scope)
        set_attr = scope[0].set_attr if scope else setattr  # Triton 3.2 has no scopes
        set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_loops)
    yield
    monkeypatch.undo()
    for place, names in zip(places, before, strict=True):
        for name, value in list(vars(place).items()):
            if name not in names:
                delattr(place, name)
            elif value is not names[name]:
                setattr(place, name, names[name])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("pattern", "rows", "columns", "n", "batch"),
    [
        ("1:4", 9, 256, 1, 1), ("1:4", 3, 36, 3, 2), ("4:8", 8, 264, 5, 4), ("2:4", 8, 256, 2, 2),
        ("2:8", 11, 200, 1, 1), ("3:8", 5, 88, 9, 8), ("8:16", 5, 160, 1, 1), ("16:32", 4, 96, 2, 2),
        ("1:32", 4, 320, 1, 1), ("3:5", 7, 45, 3, 4), ("1:3", 7, 51, 1, 1), ("31:32", 2, 64, 1, 1),
    ],
)  # fmt: skip
def test_a_gather_of_columns_is_the_dense_product(
    pattern: str, rows: int, columns: int, n: int, batch: int, dtype: torch.dtype
) -> None:
    from s3tensor.kernels import columns as column_kernels
    from s3tensor.kernels.gather import Gather

    bound, values, indices, dense = random_packed(pattern, rows, columns, dtype)
    x = torch.randn(n, columns + 5).to(dtype)[:, 3:-2]
    bias = torch.randn(rows).to(dtype)
    y = column_kernels.launch(
        Gather(2, batch),
        x,
        values,
        indices,
        bias,
        bound.keep,
        bound.blocks_per_scope,
        rows,
        columns,
    )
    close(y, x, dense, bias)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("pattern", "rows", "columns"),
    [
        ("block:16x16@0.5", 32, 128), ("block:32x32@0.5", 64, 160), ("block:16x16@0.05", 16, 1024),
        ("block:4x4@0.5", 12, 40), ("block:24x24@0.5", 48, 96), ("block:16x1@0.5", 32, 64),
        ("block:8x3@0.4", 16, 45), ("block:1x4@0.5", 3, 64), ("block:48x128@0.5", 48, 512),
    ],
)  # fmt: skip
def test_blocks_give_the_dense_product(
    pattern: str, rows: int, columns: int, dtype: torch.dtype
) -> None:
    from s3tensor.kernels import blocks
    from s3tensor.kernels.blocks import Blocks

    bound, values, indices, dense = random_packed(pattern, rows, columns, dtype)
    for n, config in ((1, Blocks(2, 16, 32, 8, 1)), (9, Blocks(1, 32, 64, 16, 3))):
        x = torch.randn(n, columns + 5).to(dtype)[:, 3:-2]
        bias = torch.randn(rows).to(dtype)
        y = blocks.launch(config, x, values, indices, bias, *bound.block, bound.keep, rows)
        close(y, x, dense, bias)


def test_code_bytes_are_those_of_the_pattern() -> None:
    need_triton()
    from s3tensor.kernels import blocks
    from s3tensor.kernels import columns as column_kernels

    for group in range(2, 33):
        for keep in range(1, group):
            bound = Pattern.parse(f"{keep}:{group}").bind((5, 3 * group))
            bits = bound.index_bits if bound.index_code == "index" else 0
            assert column_kernels.index_bits(keep, group) == bits
            assert column_kernels.code_bytes(keep, group, *bound.shape) == bound.index_bytes
    for density in (0.02, 0.1, 0.5, 0.9):
        bound = Pattern.parse(f"block:4x8@{density}").bind((20, 1000))
        bits = bound.index_bits if bound.index_code == "index" else 0
        assert blocks.index_bits(bound.keep, bound.blocks_per_scope) == bits
        assert blocks.code_bytes(4, 8, bound.keep, *bound.shape) == bound.index_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cut_is_always_one_that_can_run(dtype: torch.dtype) -> None:
    need_triton()
    from s3tensor.kernels import blocks
    from s3tensor.kernels import columns as column_kernels
    from s3tensor.kernels.gather import Gather

    for keep, group in ((1, 2), (2, 4), (1, 4), (2, 8), (4, 8), (8, 16), (4, 16), (3, 7), (31, 32)):
        for n, rows, scopes, processors in itertools.product(
            (1, 2, 3, 8, 9, 16, 17, 64), (1, 100, 4096, 10**6), (1, 7, 16, 512, 4096), (1, 132)
        ):
            columns = scopes * group
            cut = column_kernels.choose(keep, group, dtype, n, rows, columns, processors)
            assert cut.warps in (1, 2, 4, 8)
            if isinstance(cut, Gather):
                assert cut.batch in (1, 2, 4, 8)
                continue
            assert column_kernels.runs_take(keep, group, dtype, columns)
            assert cut.batch >= min(n, 32) and cut.units in (1, 2) and cut.tiles in (1, 2)
            assert (
                cut.warps == 1 or cut.warps * 4 * column_kernels.runs.RUNS[keep, group] <= columns
            )
    for n, rows in itertools.product(range(1, 65), (16, 4096, 10**6)):
        wide = blocks.choose(dtype, n, rows, 132)
        assert wide.batch >= min(n, 32 if dtype == torch.float32 else 64)
        assert wide.columns >= 16  # of a product on tensor cores
        stage = wide.warps * wide.columns * (wide.rows + wide.batch) * dtype.itemsize
        assert stage * max(1, wide.stages - 3) <= 99 * 1024


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"keep": 4}, "4:4: a group is 2 to 32 columns"),
        ({"group": 40}, "2:40: a group is 2 to 32 columns"),
        ({"columns": 66}, "columns must be a multiple of 4"),
        ({"rows": 2**30}, "over 2\\*\\*31 weights"),
        ({"values": torch.zeros(0, dtype=torch.float64)}, "the kernels take bfloat16, float16 and"),
        ({}, "cpu is not an NVIDIA GPU"),
    ],
)
def test_a_linear_of_columns_that_cannot_run_is_refused(change: dict[str, Any], match: str) -> None:
    need_triton()
    from s3tensor.kernels import columns as column_kernels

    _, values, indices, _ = random_packed("2:4", 8, 64, torch.float32)
    arguments = {"x": torch.zeros(1, 64), "values": values, "indices": indices, "bias": None}
    arguments |= {"keep": 2, "group": 4, "rows": 8, "columns": 64, **change}
    with pytest.raises(ValueError, match=match):
        column_kernels.linear(**arguments)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"block_rows": 1, "block_columns": 1}, "a block is two weights or more"),
        ({"block_columns": 5}, "32 x 64 is not made of blocks of 16 x 5"),
        ({"keep": 4}, "4 of 4 blocks in a row"),
        ({"rows": 2**27}, "over 2\\*\\*31 weights"),
        ({"values": torch.zeros(0, dtype=torch.int8)}, "the kernels take bfloat16, float16 and"),
        ({}, "cpu is not an NVIDIA GPU"),
    ],
)
def test_a_linear_of_blocks_that_cannot_run_is_refused(change: dict[str, Any], match: str) -> None:
    need_triton()
    from s3tensor.kernels import blocks

    _, values, indices, _ = random_packed("block:16x16@0.5", 32, 64, torch.float32)
    arguments = {"x": torch.zeros(1, 64), "values": values, "indices": indices, "bias": None}
    arguments |= {"block_rows": 16, "block_columns": 16, "keep": 2, "rows": 32, "columns": 64}
    with pytest.raises(ValueError, match=match):
        blocks.linear(**{**arguments, **change})


# Compilation ------------------------------------------------------------------------------------------


def compiled(
    kernel: Any, build: Any, pointers: dict[str, str], constants: dict[str, Any], arch: int
) -> str:
    """SASS of a kernel for ``sm_<arch>``, after a check that nothing spills; needs no GPU."""
    warps = constants.pop("num_warps")
    names = kernel.arg_names
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names
    }
    # What Triton finds to be a multiple of 16 at a launch, of what it is not told to leave alone.
    unknown = {p.name for p in kernel.params if p.do_not_specialize}
    unknown |= {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    aligned = {"x_ptr", "v_ptr", "y_ptr", "M", "sx"} - unknown
    source = build(kernel, signature, constants, aligned)
    built, sass, _ = assembled(source, arch, warps)
    assert built.metadata.shared <= 99 * 1024  # of a program on any GPU from sm_80 on
    # No spills; but a register that is idle within the loop may wait in memory.
    assert len(re.findall(r"\bSTL", sass)) <= 1 and len(re.findall(r"\bLDL", sass)) <= 1
    return sass


@pytest.mark.parametrize(
    ("form", "dtype", "codes", "batch", "even", "arch"),
    [
        ((1, 4, 2, 8), "bf16", 16, 1, True, 90), ((4, 8, 0, 2), "fp16", 16, 4, True, 80),
        ((2, 8, 3, 4), "bf16", 1, 8, False, 90), ((2, 4, 2, 2), "fp32", 8, 8, True, 80),
        ((2, 4, 2, 2), "fp32", 8, 8, True, 90), ((3, 8, 0, 1), "bf16", 0, 2, False, 80),
        ((16, 32, 0, 1), "fp32", 32, 2, False, 90),
    ],
)  # fmt: skip
def test_gather_compiles_to_wide_loads(
    form: tuple[int, int, int, int], dtype: str, codes: int, batch: int, even: bool, arch: int
) -> None:
    need_triton()
    from s3tensor.kernels.gather import gather_kernel

    words = {0: "*u8", 1: "*i32", 8: "*u8", 16: "*i16", 32: "*i32"}[codes]
    values = {
        "x_ptr": f"*{dtype}",
        "v_ptr": f"*{dtype}",
        "b_ptr": f"*{dtype}",
        "y_ptr": f"*{dtype}",
    }
    constants = dict(zip(("KEEP", "GROUP", "BITS", "UNITS"), form, strict=True))
    constants |= {"CODES": codes, "WK": 8, "LANES": 4, "BN": batch, "num_warps": 8}
    constants |= {"EVEN": even, "BIAS": not even}
    sass = compiled(gather_kernel, source_of, {"c_ptr": words, **values}, constants, arch)
    if form[0] != 3:  # a run of three values has no wide loads
        assert len(re.findall(r"LDG\.E\.(EF\.)?128", sass)) >= 2  # of a step and the one before
    assert "BAR.SYNC" not in sass[: sass.rindex("FFMA")]  # warps meet after the loop only


@pytest.mark.parametrize(
    ("form", "codes", "cut", "dtype", "even", "arch"),
    [
        ((4, 8, 0, 16), 16, (8, 1, 2, 8, True), "bf16", True, 80),
        ((4, 8, 0, 16), 16, (4, 2, 2, 32, False), "bf16", False, 90),
        ((8, 16, 0, 16), 16, (4, 1, 2, 16, False), "fp16", False, 80),
        ((8, 16, 0, 16), 16, (8, 1, 2, 8, True), "bf16", True, 90),
        ((1, 4, 2, 32), 16, (8, 1, 1, 8, True), "bf16", True, 90),
        ((2, 8, 3, 32), 1, (4, 1, 1, 16, False), "bf16", False, 80),
        ((4, 16, 4, 32), 32, (4, 1, 1, 32, False), "fp16", True, 90),
        ((1, 2, 1, 16), 8, (4, 2, 1, 32, False), "bf16", False, 90),
    ],
)
def test_runs_compile_to_wide_loads_and_tensor_cores(
    form: tuple[int, int, int, int], codes: int, cut: tuple[Any, ...], dtype: str, even: bool, arch: int
) -> None:  # fmt: skip
    need_gluon()
    from s3tensor.kernels.runs import runs_kernel

    words = {1: "*i32", 8: "*u8", 16: "*i16", 32: "*i32"}[codes]
    pointers = {"x_ptr": "*i32", "v_ptr": "*i32", "c_ptr": words, "b_ptr": f"*{dtype}"}
    constants = dict(zip(("KEEP", "GROUP", "BITS", "RUN"), form, strict=True))
    constants |= dict(zip(("WK", "TILES", "UNITS", "BN", "AHEAD"), cut, strict=True))
    constants |= {"CODES": codes, "EVEN": even, "BIAS": not even, "num_warps": cut[0]}
    pointers["y_ptr"] = f"*{dtype}"
    sass = compiled(runs_kernel, gluon_source_of, pointers, constants, arch)
    _, tiles, units, batch, _ = cut
    assert len(re.findall(r"HMMA\.16816\.F32", sass)) == tiles * units * form[3] // 4 * batch // 8
    assert len(re.findall(r"LDG\.E\.128", sass)) >= 4 * tiles * units  # a step's values, twice
    assert "PRMT" in sass


@pytest.mark.parametrize(
    ("block", "dtype", "n", "bits", "arch"),
    [((16, 16), "bf16", 1, 0, 80), ((32, 32), "bf16", 16, 0, 90), ((64, 64), "fp16", 64, 6, 80),
     ((32, 32), "bf16", 32, 0, 90), ((16, 16), "fp32", 8, 0, 80), ((16, 16), "fp32", 64, 8, 90),
     ((24, 24), "fp16", 4, 0, 90), ((16, 1), "bf16", 4, 0, 90)],
)  # fmt: skip
def test_blocks_compile_to_tensor_cores_and_copies_to_shared_memory(
    block: tuple[int, int], dtype: str, n: int, bits: int, arch: int
) -> None:
    need_triton()
    from s3tensor.kernels import blocks

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    cut = blocks.choose(types[dtype], n, 4096, 132)
    height = min(cut.rows, 1 << (block[0] - 1).bit_length())
    piece = min(block[1] & -block[1], cut.columns)
    values = {
        "x_ptr": f"*{dtype}",
        "v_ptr": f"*{dtype}",
        "b_ptr": f"*{dtype}",
        "y_ptr": f"*{dtype}",
    }
    constants = {
        "R": block[0], "C": block[1], "PIECE": piece, "BITS": bits, "CHUNK": 256, "WK": cut.warps,
        "BR": height, "NP": cut.columns // piece, "BN": cut.batch, "STAGES": cut.stages,
        "EVEN": block[0] % height == 0, "BIAS": False, "num_warps": cut.warps,
    }  # fmt: skip
    pointers = {"c_ptr": "*u8", "numbers_ptr": "*i32", **values}
    sass = compiled(blocks.blocks_kernel, source_of, pointers, constants, arch)
    assert ("HMMA" in sass) == (dtype != "fp32")
    assert "TF32" not in sass
    if block[1] >= 8:
        assert "LDGSTS" in sass and re.search(r"LDGSTS\.E\.(\w+\.)*128", sass)


# Numbers on a GPU -------------------------------------------------------------------------------------


def product(
    x: Tensor, packed: tuple[BoundPattern, Tensor, Tensor, Tensor], **options: Any
) -> Tensor:
    """``linear`` of the kernels that take the pattern."""
    from s3tensor.kernels import blocks
    from s3tensor.kernels import columns as column_kernels

    bound, values, indices, _ = packed
    bias = options.pop("bias", None)
    rows, columns = bound.shape
    options |= {"keep": bound.keep, "rows": rows, "columns": columns}
    if bound.block == (1, 1):
        group = bound.blocks_per_scope
        return column_kernels.linear(x, values, indices, bias, group=group, **options)
    options |= {"block_rows": bound.block[0], "block_columns": bound.block[1]}
    return blocks.linear(x, values, indices, bias, **options)


# A kernel is compiled for each case here, so not every pattern comes in every dtype.
CASES = [
    *(("1:2", torch.bfloat16), ("2:4", torch.float32), ("1:4", torch.bfloat16)),
    *(("4:8", torch.bfloat16), ("4:8", torch.float32), ("2:8", torch.float16)),
    *(("3:8", torch.bfloat16), ("8:16", torch.float16), ("4:16", torch.bfloat16)),
    *(("16:32", torch.float32), ("1:32", torch.bfloat16), ("3:5", torch.float16)),
    *(("block:16x16@0.5", dtype) for dtype in DTYPES),
    *(("block:32x32@0.5", torch.bfloat16), ("block:16x16@0.04", torch.float16)),
    *(("block:64x64@0.5", torch.bfloat16), ("block:8x8@0.5", torch.bfloat16)),
    *(("block:24x24@0.5", torch.float16), ("block:16x1@0.5", torch.bfloat16)),
    *(("block:1x8@0.5", torch.bfloat16), ("block:8x3@0.5", torch.float32)),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "dtype"), CASES)
def test_linear_is_the_dense_product(pattern: str, dtype: torch.dtype) -> None:
    rows, columns = (1, int(pattern.split(":")[1])) if "block" not in pattern else (0, 0)
    if "block" in pattern:
        rows, columns = Pattern.parse(pattern).block
    for down, across, biased in ((3, 33, True), (136, 160, False) if rows == 1 else (8, 96, False)):
        packed = random_packed(pattern, down * rows, across * columns, dtype, "cuda")
        for n in (1, 3, 9, 33) if biased else (1, 8, 64):
            x = torch.randn(n, across * columns, device="cuda").to(dtype)
            bias = torch.randn(down * rows, device="cuda").to(dtype) if biased else None
            # The memory that y will have.
            torch.full((n, down * rows), float("nan"), device="cuda", dtype=dtype)
            y = product(x, packed, bias=bias)
            close(y, x, packed[3], bias)
            assert torch.equal(y, product(x, packed, bias=bias))  # to the last bit


def _cuts(pattern: str, dtype: torch.dtype) -> list[Any]:
    from s3tensor.kernels.blocks import Blocks
    from s3tensor.kernels.gather import Gather

    if "block" in pattern:
        return [Blocks(4, 16, 64, 8, 3), Blocks(2, 32, 32, 16, 5), Blocks(8, 16, 32, 32, 4)]
    cuts: list[Any] = [Gather(4, 1), Gather(2, 4, 8), Gather(8, 8), Gather(1, 2, 2)]
    if dtype != torch.float32:
        from s3tensor.kernels.runs import Runs

        cuts += [
            Runs(8, 1, 1, 8, True),
            Runs(2, 2, 2, 16),
            Runs(4, 1, 1, 32),
            Runs(1, 4, 1, 8, True),
        ]
    return cuts


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        *((p, torch.bfloat16) for p in ("1:2", "1:4", "4:8", "2:8", "8:16", "4:16")),
        *((p, d) for p in ("4:8", "block:32x32@0.5") for d in (torch.float16, torch.float32)),
    ],
)
def test_every_cut_of_the_work_gives_the_product(pattern: str, dtype: torch.dtype) -> None:
    packed = random_packed(pattern, 352, 1056, dtype, "cuda")
    for config, n in itertools.product(_cuts(pattern, dtype), (1, 16, 39)):
        x = torch.randn(n, 1056, device="cuda", dtype=dtype)
        y = product(x, packed, config=config)
        close(y, x, packed[3])
        assert torch.equal(y, product(x, packed, config=config))  # to the last bit


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 8, 40])
@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        *(("1:4", torch.bfloat16), ("4:8", torch.bfloat16), ("3:8", torch.float32)),
        *(("block:16x16@0.5", torch.bfloat16), ("block:8x4@0.5", torch.float32)),
    ],
)
def test_linear_reads_only_x(pattern: str, dtype: torch.dtype, n: int) -> None:
    """x within a larger tensor of NaN, in several strides."""
    rows, columns = 192, 480
    packed = random_packed(pattern, rows, columns, dtype, "cuda")
    x = torch.randn(n, columns, device="cuda", dtype=dtype)
    for before, after in ((0, 0), (8, 8), (3, 5), (64, 0)):
        shape = n + 2, before + columns + after
        around = torch.full(shape, float("nan"), device="cuda", dtype=dtype)
        inside = around[1:-1, before : before + columns]
        inside.copy_(x)
        close(product(inside, packed), x, packed[3])
    close(product(x.t().contiguous().t(), packed), x, packed[3])
    close(product(x[:1].expand(n, -1), packed), x[:1].expand(n, -1), packed[3])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", ["1:4", "4:8", "3:8", "block:16x16@0.5"])
def test_nan_and_infinity_in_x_reach_their_own_rows_only(pattern: str, dtype: torch.dtype) -> None:
    packed = random_packed(pattern, 192, 480, dtype, "cuda")
    x = torch.randn(12, 480, device="cuda", dtype=dtype)
    x[3, 5] = float("nan")
    x[7, 90] = float("inf")
    y = product(x, packed)
    for row, column in ((3, 5), (7, 90)):
        kept = packed[3][:, column] != 0
        assert bool(kept.any()) and not y[row, kept].isfinite().any()
    clean = [i for i in range(12) if i not in (3, 7)]
    close(y[clean], x[clean], packed[3])


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["1:4", "4:8", "2:8", "block:32x32@0.5"])
def test_indices_and_values_may_start_anywhere(pattern: str) -> None:
    bound, values, indices, dense = random_packed(pattern, 96, 480, torch.bfloat16, "cuda")
    odd = torch.cat((indices.new_full((1,), 255), indices))[1:]
    shifted = torch.cat((values.new_full((1,), float("nan")), values.flatten()))[1:]
    for n in (1, 12):
        x = torch.randn(n, 480, device="cuda", dtype=torch.bfloat16)
        close(product(x, (bound, shifted, odd, dense)), x, dense)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["1:4", "4:8", "3:8", "block:16x16@0.5"])
@pytest.mark.parametrize("n", [1, 16])
def test_graphs_replay_the_product(pattern: str, n: int) -> None:
    packed = random_packed(pattern, 512, 2048, torch.bfloat16, "cuda")
    x = torch.randn(n, 2048, device="cuda", dtype=torch.bfloat16)
    product(x, packed)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(3):
            y = product(y[:, :512].repeat(1, 4), packed)
    for _ in range(3):
        x.copy_(torch.randn(n, 2048, device="cuda"))
        graph.replay()
        expected = x
        for _ in range(3):
            expected = product(expected[:, :512].repeat(1, 4), packed)
        assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["4:8", "block:16x16@0.5"])
def test_bad_arguments_are_refused_by_name(pattern: str) -> None:
    bound, values, indices, dense = random_packed(pattern, 32, 64, torch.bfloat16, "cuda")
    x = torch.randn(2, 64, device="cuda", dtype=torch.bfloat16)
    for changed, bias, match in (
        ((x.half(), values, indices), None, "x is torch.float16"),
        ((x.cpu(), values, indices), None, "cpu is not an NVIDIA GPU"),
        ((x[:, :32], values, indices), None, r"must be \(1 to 64, 64\)"),
        ((x.repeat(33, 1), values, indices), None, r"must be \(1 to 64, 64\)"),
        ((x, values[1:], indices), None, "are not those of"),
        ((x, values, indices[1:]), None, "are not those of"),
        ((x, values, indices.short()), None, "they must be uint8"),
        ((x, values, indices.cpu()), None, "indices are on cpu"),
        ((x, values, indices), x[0], r"the bias is \(64,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            product(changed[0], (bound, *changed[1:], dense), bias=bias)
