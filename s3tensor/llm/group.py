"""Prune the linears of one input together: one Hessian, one factorisation, one weight where that can be."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s3tensor import prune
from s3tensor.llm.auto import Shares, chosen
from s3tensor.llm.moments import Moments, merged
from s3tensor.llm.progress import PruneProgress
from s3tensor.llm.recover import Recovery, out_of_memory
from s3tensor.llm.report import LinearRow, PeakMemory
from s3tensor.llm.structure import LinearLayer
from s3tensor.pattern import Pattern
from s3tensor.prune.hessian import Factors, output_error
from s3tensor.prune.problem import MEMORY_BUDGET, row_stacks

_LEAST_BUDGET = 32 << 20  # bytes of working memory: with fewer a pruner is not tried again
# Tensors (K, K) and (M, K) that admm, the hungriest pruner, holds besides.
_SQUARES, _WEIGHTS = 8, 5


@dataclass(frozen=True)
class Run:
    """What stays the same while a model is pruned."""

    patterns: Mapping[str, Pattern]  # of each linear, by full name
    pruner: str
    shares: Shares
    options: dict[str, Any]
    device: torch.device
    cache: torch.device
    compress: bool
    recovery: Recovery | None
    parts: Sequence[Sequence[int]]  # calibration batches: all, or those to fit on and to choose by

    @property
    def dense_target(self) -> bool:
        return self.shares.alpha > 0


def prune_group(
    group: list[LinearLayer],
    index: int,
    parts: list[Moments],  # of the calibration tokens; with shares to choose, of two parts
    unseen: Tensor | None,  # (K, K), the Hessian of held-out tokens
    run: Run,
    bar: PruneProgress,
    memory: PeakMemory,
    masks: list[tuple[LinearLayer, Tensor]],  # appended to
) -> list[LinearRow]:
    """Prune the linears of one input, in place; a row for each.

    ``parts`` is emptied: its sums take two to four squares (K, K), which a pruner should not have to do
    without.
    """
    shares = run.shares
    if shares.auto:
        bar.doing(index, f"{' and '.join(sorted(shares.auto))} of {short_names(group)}")
        weights = [layer.weight for layer in group]
        shares = chosen(weights, parts[0], parts[1], shares)
    hessian, drift = merged(parts)
    parts.clear()
    value, cross, samples = hessian.value(), hessian.cross(), hessian.samples
    del hessian
    factors = Factors(value, shares.damp)
    extra: dict[str, Any] = {**run.options}
    if run.dense_target:
        extra = {"target": cross, "alpha": shares.alpha, **extra}
    if drift is not None:
        extra["drift"] = shares.beta * drift
    rows = []
    for stack in _stacks(group, run):
        bar.doing(index, short_names(stack))
        weights = [layer.weight for layer in stack]
        size = sum(weight.numel() for weight in weights)
        memory.part()
        start = time.perf_counter()
        pruned = _solve(
            stack,
            weights[0] if len(stack) == 1 else torch.cat(weights),
            factors,
            run,
            extra,
            lambda done, of, size=size: bar.within(size, done / of),  # type: ignore[misc]
        )
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        seconds = time.perf_counter() - start
        peak = memory.part()
        heights = [len(weight) for weight in weights]
        pieces = zip(pruned.weight.split(heights), pruned.mask.split(heights), strict=True)
        for layer, weight, (found, mask) in zip(stack, weights, pieces, strict=True):
            error = output_error(found, weight, value)
            unseen_error = None if unseen is None else output_error(found, weight, unseen)
            layer.copy_weight(found)
            masks.append((layer, mask))
            row = LinearRow(
                block=index,
                name=layer.name,
                out_features=layer.shape[0],
                in_features=layer.shape[1],
                error=error,
                seconds=seconds * weight.numel() / size,
                samples=samples,
                density=int(mask.count_nonzero()) / weight.numel(),
                peak_memory_bytes=peak,
                pattern=str(run.patterns[layer.name]),
                held_out_error=unseen_error,
                alpha=shares.alpha,
                beta=0.0 if drift is None else shares.beta,
                damp=shares.damp,
            )
            rows.append(row)
            bar.linear(row)
    return rows


def _solve(
    stack: Sequence[LinearLayer],
    weight: Tensor,  # (M, K), theirs one above the other
    factors: Factors,
    run: Run,
    extra: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> prune.Pruned:
    """Call the pruner; where memory runs out again, each time with a quarter of the working memory.

    Raises:
        torch.OutOfMemoryError: with the least working memory too, naming the linears and the estimate.
    """
    pruner = prune.get(run.pruner)
    options = dict(extra)
    accepts = inspect.signature(pruner).parameters
    if "progress" in accepts:
        options.setdefault("progress", progress)
    budget = int(options.get("memory_budget", MEMORY_BUDGET))
    while True:
        try:
            return pruner(weight, factors, run.patterns[stack[0].name], **options)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if "memory_budget" not in accepts or budget <= _LEAST_BUDGET:
            raise torch.OutOfMemoryError(_no_memory(stack, weight, run.device))
        budget = max(budget // 4, _LEAST_BUDGET)
        options["memory_budget"] = budget
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _no_memory(stack: Sequence[LinearLayer], weight: Tensor, device: torch.device) -> str:
    rows, columns = weight.shape
    size = max(weight.element_size(), 4)
    need = (_SQUARES * columns * columns + _WEIGHTS * rows * columns) * size + _LEAST_BUDGET
    free = ""
    if device.type == "cuda":
        free = f", of which {torch.cuda.mem_get_info(device)[0]:,} bytes are free"
    return (
        f"{', '.join(layer.name for layer in stack)}: out of memory while a weight of {rows} x {columns} "
        f"was pruned. It takes about {need:,} bytes on {device}{free}. The block is dense again and "
        "finished blocks stay; prune on another device (device='cpu'), or let the calibration tokens wait "
        "on the CPU (cache_device='cpu')."
    )


def _stacks(group: list[LinearLayer], run: Run) -> list[list[LinearLayer]]:
    """Linears of one input that are pruned as one weight: their Hessian is factored once."""
    if run.pruner not in prune.ROW_WISE or len({layer.weight.dtype for layer in group}) > 1:
        return [[layer] for layer in group]
    stacks = []
    for pattern in dict.fromkeys(run.patterns[layer.name] for layer in group):
        alike = [layer for layer in group if run.patterns[layer.name] == pattern]
        found = row_stacks([layer.shape for layer in alike], pattern)
        stacks += [[alike[i] for i in stack] for stack in found]
    return stacks


def short_names(group: Sequence[LinearLayer]) -> str:
    """The last part of each linear's name."""
    return ", ".join(layer.name.rpartition(".")[2] for layer in group)
