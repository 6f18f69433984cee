"""What the benchmarks of kernels share: times of CUDA graph replays over copies, and of eager calls."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from s3tensor import benchmark


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def microseconds(
    call: Callable[[int], Any], copies: int, repeats: int, keep: bool = False
) -> float:
    """Median time of ``call(i)`` over graph replays of all copies in turn.

    With ``keep`` every result stays alive, so that each copy writes to memory of its own.
    """
    calls = [partial(call, i) for i in range(copies)]
    return benchmark.microseconds(calls, device(), repeats, keep)


def eager_microseconds(call: Callable[[int], Any], copies: int, repeats: int) -> float:
    """Median time of one call outside a graph, launches and what it waits for included."""
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


def bandwidths() -> tuple[float, float]:
    """Bytes a second of a device copy, read and write counted, and of a reduction, which only reads."""
    source = torch.randn(2**28, device="cuda")
    read = source.nbytes / microseconds(lambda _: source.sum(), 1, 9) * 1e6
    return benchmark.copy_bandwidth(device()), read
