"""Times of products by compressed weights: the speedup over dense, and tables to choose paths by.

Each time is a median over CUDA graph replays; a graph rotates through so many copies of the weight that the
cache holds none of them. On a CPU it is a median over rounds of calls. Weights are random, satisfy their
pattern exactly, and every product is compared with float64 before it is timed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3tensor.errors import ModelError
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.tensor import cusparselt, timings
from s3tensor.tensor import linear as paths
from s3tensor.tensor.sparse import StructuredSparseTensor
from s3tensor.tensor.weight import Weight
from s3tensor.version import __version__

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Shapes of a table: weights of language models of 0.1 to 70 G parameters.
SHAPES = (
    *((576, 1536), (1024, 2560), (2048, 2048), (4096, 2560), (9728, 2560)),
    *((4096, 4096), (2560, 9728), (14336, 4096), (4096, 14336), (28672, 8192)),
)
FORMS = ("2:4", "coupled2:4", "pair4:8", "rowpair16")
# Patterns of a table; for the last ones there is a choice of paths only with few rows.
CALIBRATED = (*FORMS, "1:4", "4:8", "2:8", "8:16", "block:16x16@0.5", "block:32x32@0.5")
ROTATE = 400e6  # bytes of weights that a measurement rotates through


@dataclass(frozen=True)
class Row:
    """One product by ``F.linear``: microseconds and bytes of the dense, lean and fast weight."""

    pattern: str
    dtype: str
    rows: int
    columns: int
    batch: int
    dense_us: float
    lean_us: float
    lean_path: str
    fast_us: float
    fast_path: str
    torch_us: float | None  # of torch's own 2:4 tensor
    dense_bytes: int
    lean_bytes: int
    fast_bytes: int

    @property
    def gb_per_s(self) -> float:
        """Bytes of the compressed weight, x and y over the time of the lean product."""
        itemsize = getattr(torch, self.dtype).itemsize
        moved = self.lean_bytes + self.batch * (self.rows + self.columns) * itemsize
        return moved / self.lean_us / 1e3


@dataclass(frozen=True)
class Suite:
    """What to measure: every pattern on every shape, for every batch."""

    patterns: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    dtype: str
    device: str

    def check(self) -> None:
        """Raise PatternError for a pattern that does not fit a shape."""
        for pattern in self.patterns:
            for shape in self.shapes:
                Pattern.parse(pattern).bind(shape)

    def __iter__(self) -> Iterator[tuple[str, tuple[int, int]]]:
        return itertools.product(self.patterns, self.shapes)

    @property
    def torch_device(self) -> torch.device:
        device = torch.device(self.device)
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def compile(self) -> None:
        """Compile all kernels of the suite, in parallel."""
        dtype, device = getattr(torch, self.dtype), self.torch_device
        compile_kernels(
            [(pattern, shape, batch, dtype) for pattern, shape in self for batch in self.batches],
            device,
        )


def run(suite: Suite, say: Callable[[str], Any]) -> dict[str, Any]:
    """Measure ``F.linear`` of a suite: facts of the machine and a row for each product."""
    device = suite.torch_device
    record: dict[str, Any] = {**_machine(device), "rows": []}
    if device.type == "cuda":
        suite.compile()
        record["copy_gb_per_s"] = round(copy_bandwidth(device) / 1e9)
    for pattern, shape in suite:
        say(f"{pattern} on {shape[0]}x{shape[1]} {suite.dtype}")
        for row in rows(pattern, shape, suite.batches, getattr(torch, suite.dtype), device):
            record["rows"].append({**vars(row), "gb_per_s": round(row.gb_per_s)})
    return record


def calibrate(suite: Suite, say: Callable[[str], Any]) -> Path:
    """Measure every path of a suite, store the times in the table for this GPU, and return its file.

    The table is written after each weight, so an interrupted run keeps its measurements. Cells of other
    weights stay in it.
    """
    device = suite.torch_device
    suite.compile()
    facts = _machine(device)
    name, capability = str(facts.pop("device")), torch.cuda.get_device_capability(device)
    before = timings.load(name, capability)
    kept = before.cells if before is not None and before.device == name else ()
    call_us = vendor_call_us(device)
    dtype = getattr(torch, suite.dtype)
    for pattern, shape in suite:
        say(f"{pattern} on {shape[0]}x{shape[1]} {suite.dtype}")
        found = tuple(cells(pattern, shape, suite.batches, dtype, device))
        weight = pattern, suite.dtype, *shape
        others = (c for c in kept if (c.pattern, c.dtype, c.rows, c.columns) != weight)
        kept = *others, *found
        saved = timings.save(timings.Timings(name, capability, kept, call_us), **facts)
    paths.forget()
    return saved


def _machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"device": platform.processor() or platform.machine()}
    if device.type == "cuda":
        facts = {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    versions = {"s3tensor": __version__}
    for name in ("torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {**facts, "versions": versions, "date": time.strftime("%Y-%m-%d")}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of an elementwise kernel on 2 GB."""
    source = torch.zeros(2**28, device=device)
    target = torch.empty_like(source)
    us = microseconds([partial(torch.neg, source, out=target)], device, 9)
    return 2 * source.nbytes / us * 1e6


def table(record: dict[str, Any]) -> str:
    """The rows of :func:`run` as text: times in microseconds and speedup over dense."""
    lines = [
        f"{record['device']}, torch {record['versions']['torch']}, {record['date']}"
        + (f"; a copy moves {record['copy_gb_per_s']} GB/s" if "copy_gb_per_s" in record else ""),
        f"{'pattern':<12}{'shape':>13}{'batch':>6}{'dense us':>10}{'lean us':>10}{'':>7} {'path':<8}"
        f"{'GB/s':>6}{'fast us':>10}{'':>7} {'path':<8}{'torch 2:4 us':>13}{'bytes of dense':>16}",
    ]
    for row in record["rows"]:
        lean, fast = row["dense_us"] / row["lean_us"], row["dense_us"] / row["fast_us"]
        rival = "" if row["torch_us"] is None else f"{row['torch_us']:.1f}"
        held = f"{row['lean_bytes'] / row['dense_bytes']:.3f} {row['fast_bytes'] / row['dense_bytes']:.3f}"
        lines.append(
            f"{row['pattern']:<12}{row['rows']:>7}x{row['columns']:<5}{row['batch']:>6}"
            f"{row['dense_us']:>10.1f}{row['lean_us']:>10.1f}{lean:>6.2f}x {row['lean_path']:<8}"
            f"{row['gb_per_s']:>6}{row['fast_us']:>10.1f}{fast:>6.2f}x {row['fast_path']:<8}"
            f"{rival:>13}{held:>16}"
        )
    return "\n".join([*lines, *_means(record["rows"])])


def _means(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Geometric means over shapes, where there are several."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["pattern"], row["batch"]), []).append(row)
    if max(map(len, groups.values())) > 1:
        yield "geometric mean over the shapes"
        for (pattern, batch), group in groups.items():
            lean, fast = (
                statistics.geometric_mean(row["dense_us"] / row[f"{kind}_us"] for row in group)
                for kind in ("lean", "fast")
            )
            worst = min(row["dense_us"] / row["fast_us"] for row in group)
            yield (
                f"{pattern:<12} batch {batch:>5}: lean {lean:.2f}x, fast {fast:.2f}x (worst {worst:.2f}x)"
            )


def rows(
    pattern: str,
    shape: tuple[int, int],
    batches: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 10,
) -> Iterator[Row]:
    """Measure F.linear on a dense weight, the lean and the fast compressed one, one batch after the other.

    Raises:
        PatternError: a pattern that does not fit the shape.
        ModelError: a product that is wrong.
    """
    lean = random_weight(pattern, shape, dtype, device)
    fast = lean.with_memory("fast", (min(batches), max(batches)))
    whole = lean.to_dense()
    rival = _torch_tensor(pattern, whole)
    sets: dict[str, list[Any]] = {
        "dense": _copies(whole, whole.nbytes, device),
        "lean": _copies(lean, lean.nbytes_held, device),
    }
    if fast.memory == "fast":
        sets["fast"] = _copies(fast, lean.nbytes_compressed, device)
    if rival is not None:
        sets["torch"] = _copies(rival, whole.nbytes * 9 // 16, device)
    for batch in batches:
        x = torch.randn(batch, shape[1], device=device).to(dtype)
        groups: dict[str, Calls] = {}
        for name, weights in sets.items():
            check(F.linear(x, weights[0]), x, whole, f"{pattern} {shape} batch {batch}, {name}")
            groups[name] = [partial(F.linear, x, weight) for weight in weights]
        us = times(groups, device, repeats)
        yield Row(
            pattern, str(dtype).removeprefix("torch."), *shape, batch,
            us["dense"], us["lean"], _path(lean, batch), us.get("fast", us["lean"]),
            _path(fast, batch), us.get("torch"), whole.nbytes, lean.nbytes_held, fast.nbytes_held,
        )  # fmt: skip


def cells(
    pattern: str,
    shape: tuple[int, int],
    batches: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 7,
) -> Iterator[timings.Cell]:
    """Measure every path on a CUDA device: what :class:`s3tensor.tensor.timings.Timings` is made of."""
    lean = random_weight(pattern, shape, dtype, device)
    whole = lean.to_dense()
    vendor = None
    if cusparselt.takes(lean.bound, dtype, device):
        vendor = cusparselt.compress(whole, lean.bound)
    parts = Weight(
        lean.packed, lean.indices, lean.bound, tiled=lean.tiled, dense=whole, vendor=vendor
    )
    sizes = {"packed": lean.nbytes_compressed, "scratch": lean.nbytes_compressed}
    sizes |= {"general": lean.nbytes_compressed}
    sizes |= {"dense": whole.nbytes, "vendor": whole.nbytes * 9 // 16}
    for batch in batches:
        x = torch.randn(batch, shape[1], device=device).to(dtype)
        groups: dict[str, Calls] = {}
        plans: dict[str, tuple[int, int, int]] = {}
        for path in paths.possible(parts, batch):
            weights = [parts] * _count(sizes[path], device)
            weights = [_twin(weight, path) if i else weight for i, weight in enumerate(weights)]
            name = f"{pattern} {shape} batch {batch}, {path}"
            if path == "vendor":
                padded = F.pad(x, (0, 0, 0, -batch % 16))
                for number, plan in enumerate({(0, 1, -1), *_proposed(padded, parts)}):
                    plans[f"{path} {number}"] = plan
                    y = paths.multiply_under(plan, padded, parts, None)[:batch]
                    check(y, x, whole, f"{name}, plan {plan}")
                    groups[f"{path} {number}"] = [
                        partial(paths.multiply_under, plan, padded, weight, None)
                        for weight in weights
                    ]
                continue
            check(paths.multiply(x, parts, None, path), x, whole, name)
            groups[path] = [partial(paths.multiply, x, weight, None, path) for weight in weights]
        us = times(groups, device, repeats)
        # cuSPARSELt's default plan or the one that it proposes
        best = min(plans, key=us.__getitem__, default=None)
        if best is not None:
            us["vendor"] = us[best]
        us = {name: time for name, time in us.items() if name not in plans}
        yield timings.Cell(
            pattern, str(dtype).removeprefix("torch."), *shape, batch, us,
            plans[best] if best is not None else (0, 1, -1),
        )  # fmt: skip


def _proposed(flat: Tensor, weight: Weight) -> list[tuple[int, int, int]]:
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:
        return []
    # The search in float16 kills the CUDA context (cuSPARSELt 0.8.0, an H200). It only measures time, so it
    # gets the same bits as bfloat16.
    assert weight.vendor is not None
    vendor, x = weight.vendor.view(torch.bfloat16), flat.view(torch.bfloat16)
    algorithm, split, mode = search(vendor, x.t(), None, None, None, True)[:3]
    return [(int(algorithm), int(split), int(mode))]


def vendor_call_us(device: torch.device) -> float:
    """Host microseconds of one eager call of cuSPARSELt, which plans again each time."""
    weight = random_weight("2:4", (512, 512), torch.bfloat16, device)
    if not cusparselt.takes(weight.bound, weight.dtype, device):
        return 2000.0
    copy = cusparselt.compress(weight.to_dense(), weight.bound)
    parts = Weight(weight.packed, weight.indices, weight.bound, vendor=copy)
    x = torch.zeros(512, 512, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        paths.multiply_under(timings.DEFAULT_PLAN, x, parts, None)
        times.append(1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize(device)
    return statistics.median(times)


# weights ----------------------------------------------------------------------------------------------


def random_weight(
    pattern: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> StructuredSparseTensor:
    """A random weight that satisfies the pattern, in the packed order that suits the device."""
    bound = Pattern.parse(pattern).bind(shape)
    return StructuredSparseTensor.from_dense(_random(bound, dtype, device), pattern)


def _random(bound: BoundPattern, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(bound.shape, device=device, generator=generator).to(dtype)


def _torch_tensor(pattern: str, whole: Tensor) -> Any:
    """The weight as torch's own 2:4 tensor, or None where it cannot be."""
    if pattern != "2:4" or not whole.is_cuda or whole.dtype == torch.float32:
        return None
    if any(n % 64 for n in whole.shape):
        return None
    return torch.sparse.to_sparse_semi_structured(whole)


def _copies(weight: Any, nbytes: int, device: torch.device) -> list[Any]:
    more = range(_count(nbytes, device) - 1)
    if isinstance(weight, StructuredSparseTensor) or type(weight) is Tensor:
        return [weight, *(weight.clone() for _ in more)]
    whole = weight.to_dense()
    return [weight, *(torch.sparse.to_sparse_semi_structured(whole) for _ in more)]


def _count(nbytes: int, device: torch.device) -> int:
    return max(2, math.ceil(ROTATE / nbytes)) if device.type == "cuda" else 1


def _twin(weight: Weight, path: str) -> Weight:
    """The weight with its own copy of what a path reads."""
    if path in ("dense", "vendor"):
        part = getattr(weight, path)
        return replace(weight, **{path: part.clone()})
    return replace(weight, packed=weight.packed.clone(), indices=weight.indices.clone())


def _path(weight: StructuredSparseTensor, batch: int) -> str:
    if weight.device.type != "cuda":
        return "scratch" if weight.dense is None else "dense"
    return paths.choose(weight.as_weight(), batch, graph=True)


# time -------------------------------------------------------------------------------------------------


def check(y: Tensor, x: Tensor, whole: Tensor, name: str) -> None:
    """Refuse a product that is further from float64 than rounding its sum to the dtype of x explains.

    Raises:
        ModelError: with the relative error.
    """
    parts = whole.split(4096)
    exact = torch.cat([x.double() @ part.double().t() for part in parts], 1)
    error = float((y.double() - exact).norm() / exact.norm())
    if not error < {torch.float32: 1e-5, torch.float64: 1e-13}.get(x.dtype, 5e-3):
        raise ModelError(f"{name}: the product is wrong, relative error {error:.1e}")


Calls = Sequence[Callable[[], Any]]


def microseconds(calls: Calls, device: torch.device, repeats: int, keep: bool = False) -> float:
    """Median time of one call; the calls take turns."""
    return times({"": calls}, device, repeats, keep)[""]


def times(
    groups: Mapping[str, Calls], device: torch.device, repeats: int, keep: bool = False
) -> dict[str, float]:
    """Median time in microseconds of a call of each group.

    The groups take turns, so that a GPU that slows down slows all of them, and alternate in order, so that
    none always follows the same one. With ``keep`` the results of a CUDA graph stay alive, so that each of
    its calls writes to memory of its own.
    """
    if device.type == "cuda":
        rounds = {name: _recorded(calls, device, keep) for name, calls in groups.items()}
    else:
        rounds = {name: partial(_on_host, calls) for name, calls in groups.items()}
    found: dict[str, list[float]] = {name: [] for name in groups}
    order = list(rounds)
    for _ in range(repeats + 2):
        for name in order:
            found[name].append(rounds[name]())
        order.reverse()
    return {name: statistics.median(taken[2:]) for name, taken in found.items()}


def _recorded(calls: Calls, device: torch.device, keep: bool) -> Callable[[], float]:
    """The calls in a CUDA graph, as a function that replays it and returns microseconds a call."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    kept: list[Any] = []
    with torch.cuda.graph(graph):
        for call in calls:
            if keep:
                kept.append(call())
            else:
                call()
    return partial(_replay, graph, device, len(calls), kept)


def _replay(
    graph: torch.cuda.CUDAGraph, device: torch.device, calls: int, kept: list[Any]
) -> float:
    """Microseconds a call of a graph, whose results ``kept`` holds."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1000 / calls


def _on_host(calls: Calls) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return 1e6 * (time.perf_counter() - start) / len(calls)


# compilation in parallel ------------------------------------------------------------------------------

Job = tuple[str, tuple[int, int], int, torch.dtype]


def compile_kernels(jobs: Sequence[Job], device: torch.device) -> None:
    """Compile the kernels of these products into Triton's disk cache, in parallel processes."""
    first: dict[Any, Job] = {}
    for job in jobs:
        first.setdefault(paths.kernel_key(job[0], job[1], job[2], job[3], device), job)
    first.pop(None, None)
    processes = min(len(first), max(1, (os.cpu_count() or 2) - 1), 15)
    if processes < 2:
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(_compile, [(job, str(device)) for job in first.values()], chunksize=1)


def _compile(job: Job, device: str) -> None:
    pattern, shape, batch, dtype = job
    bound = Pattern.parse(pattern).bind(shape)
    weight = paths.zero_weight(bound, dtype, torch.device(device))
    x = torch.zeros(batch, shape[1], device=device, dtype=dtype)
    for path in paths.possible(weight, batch):
        paths.multiply(x, weight, None, path)
    torch.cuda.synchronize()
