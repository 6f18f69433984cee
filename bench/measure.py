"""What the benchmarks share: options, clocks, compilation, stored results, the packaged model, its text."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import s3tensor as s3
from s3tensor import benchmark, llm

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from demo import packaged_model as packaged_model

ROOT = Path(__file__).resolve().parents[1]
Item = TypeVar("Item")
RESULTS = ROOT / "bench" / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


# options ----------------------------------------------------------------------------------------------


def integers(text: str) -> list[int]:
    """``1,4,16``."""
    return [int(part) for part in text.split(",") if part]


def shapes(text: str) -> list[tuple[int, int]]:
    """(rows, columns) of each of ``4096x4096,14336x4096``."""
    return [shape(part) for part in text.split(",") if part]


def shape(text: str) -> tuple[int, int]:
    rows, columns = (int(part) for part in text.split("x"))
    return rows, columns


def kernel_parser(description: str, *, best: int, megabytes: float = 450, repeats: int = 9) -> Any:
    """The options of a benchmark of kernels, with these defaults; a parser."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add = parser.add_argument
    add("--tune", action="store_true", help="time every configuration, not just the chosen one")
    add("--best", type=int, default=best, help="rows to print per case with --tune [%(default)s]")
    add("--megabytes", type=float, default=megabytes, help="of copies to rotate over [%(default)s]")
    add("--repeats", type=int, default=repeats, help="graph replays per time [%(default)s]")
    add("--seconds", type=float, default=math.inf, help="start no further case after so long")
    add("--out", type=Path, help="JSON file [bench/results/NAME-DEVICE.json]")
    return parser


# machine and clocks -----------------------------------------------------------------------------------


def device_name(device: torch.device | str = DEVICE) -> str:
    """The GPU's name; of a CPU its architecture."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions by package; None if absent. s3tensor can be imported without being installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = s3.__version__ if name == "s3tensor" else None
    return found


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Item], device: torch.device) -> tuple[Item, float]:
    """The result of a call, and its seconds with the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    found = call()
    synchronize(device)
    return found, time.perf_counter() - start


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def microseconds(
    call: Callable[[int], Any], copies: int, repeats: int, keep: bool = False
) -> float:
    """Median time of ``call(i)`` over CUDA graph replays of all copies in turn.

    With ``keep`` every result stays alive, so that each copy writes to memory of its own.
    """
    calls = [partial(call, i) for i in range(copies)]
    return benchmark.microseconds(calls, gpu(), repeats, keep)


def eager_microseconds(call: Callable[[int], Any], copies: int, repeats: int) -> float:
    """Median time of one call outside a graph, launches and waits included."""
    call(0)
    times = []
    for i in range(repeats):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(i % copies)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times)


def copies_of(nbytes: int, megabytes: float) -> int:
    """Copies of something of ``nbytes`` that fill ``megabytes``, so that none stays in L2; at least two."""
    return max(2, math.ceil(megabytes * 1e6 / nbytes))


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.t()`` in float64, some rows of the weight at a time."""
    return torch.cat([x.double() @ part.double().t() for part in weight.split(4096)], 1)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of ``exact``, in float64."""
    return float((found.double() - exact).norm() / exact.norm())


# compilation ------------------------------------------------------------------------------------------


def compile_all(compile_one: Callable[[Item], Any], *groups: Iterable[Item]) -> None:
    """Fill Triton's cache on disk: ``compile_one`` on every job of a group, then of the next, in parallel.

    ``compile_one`` runs what is to be compiled. It must be a function of a module: it is called in processes
    of their own. A job that fails is printed.
    """
    processes = max(1, min(15, (os.cpu_count() or 2) - 1))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for jobs in groups:
            for error in pool.imap_unordered(partial(_compile, compile_one), jobs):
                if error:
                    print("cannot run", error, flush=True)


def _compile(compile_one: Callable[[Item], Any], job: Item) -> str | None:
    try:
        compile_one(job)
        torch.cuda.synchronize()
    except (
        Exception
    ) as error:  # more registers or shared memory than there are, or a compiler's own
        return f"{job}: {type(error).__name__}: {str(error)[:160]}"
    return None


# results ----------------------------------------------------------------------------------------------


def write_json(file: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON. Benchmarks do so after each row: an interrupted run keeps what it measured."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def rows_before(file: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows stored under the same settings: all fields of ``record`` but its rows and date are equal."""
    if not file.is_file():
        return []
    stored = json.loads(file.read_text(encoding="utf-8"))
    if any(stored.get(key) != record[key] for key in record if key not in ("rows", "date")):
        return []
    rows: list[dict[str, Any]] = stored["rows"]
    return rows


class KernelTable:
    """The rows of a benchmark of kernels on this GPU, and the file that has them.

    Made once the kernels are compiled: it measures the bandwidths ``copy`` (read and write counted) and
    ``read`` (a reduction), in bytes a second.
    """

    def __init__(self, name: str, options: argparse.Namespace, began: float) -> None:
        self.began, self.seconds = began, options.seconds
        source = torch.randn(2**28, device="cuda")
        self.read = source.nbytes / microseconds(lambda _: source.sum(), 1, 9) * 1e6
        self.copy = benchmark.copy_bandwidth(gpu())
        device = device_name()
        print(
            f"{device}, copy {self.copy / 1e9:.0f} GB/s, read {self.read / 1e9:.0f} GB/s, compiled in "
            f"{time.time() - began:.0f} s",
            flush=True,
        )
        tuned = "-tune" if options.tune else ""
        self.file = options.out or RESULTS / f"{name}{tuned}-{device.replace(' ', '-')}.json"
        self.rows: list[dict[str, Any]] = []
        self.record: dict[str, Any] = {
            "device": device, "torch": torch.__version__, "triton": versions("triton")["triton"],
            "cuda": torch.version.cuda, "date": time.strftime("%Y-%m-%d"),
            "copy_gb_per_s": self.copy / 1e9, "read_gb_per_s": self.read / 1e9, "tuned": options.tune,
            "rows": self.rows,
        }  # fmt: skip

    def within(self, work: Iterable[Item]) -> Iterator[Item]:
        """The items of ``work``, until the time of ``--seconds`` is spent."""
        for item in work:
            if time.time() - self.began > self.seconds:
                print(f"stopped before {item}")
                return
            yield item

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Rows that were measured; the file has them at once."""
        self.rows += rows
        write_json(self.file, self.record)
        torch.cuda.empty_cache()

    def means(self, batches: Iterable[int], **where: Any) -> str:
        """Geometric means of the ratio to dense over the rows that have these fields, by batch."""
        shown = []
        for batch in batches:
            best: dict[tuple[int, int], float] = {}  # the fastest configuration of each shape
            for row in self.rows:
                if (where | {"batch": batch}).items() <= row.items():
                    key = row["rows"], row["columns"]
                    best[key] = max(best.get(key, 0.0), row["ratio"])
            if best:
                shown.append(f"{batch}: {statistics.geometric_mean(best.values()):.2f}")
        return "  ".join(shown)


# text and scripts -------------------------------------------------------------------------------------


def held_out(tokenizer: Any, samples: int, seq_len: int = 1024) -> Tensor:
    """(samples, seq_len) tokens of the held-out topics of Python's documentation."""
    tokens = llm.tokenize(llm.load_text("pydoc", "held-out"), tokenizer)
    return llm.windows(tokens, samples, seq_len)


def start(main: Callable[[], Any]) -> None:
    """Run a script; an error of s3tensor is one line."""
    try:
        main()
    except s3.S3Error as error:
        sys.exit(f"error: {error}")
