"""Prune the linears of one input together: one Hessian, one factorisation and, if possible, one weight."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from s3tensor import prune
from s3tensor.llm.auto import choose
from s3tensor.llm.moments import Moments, merged
from s3tensor.llm.plan import Plan
from s3tensor.llm.progress import PruneProgress
from s3tensor.llm.recover import out_of_memory
from s3tensor.llm.report import LinearRow, PeakMemory
from s3tensor.model.weights import ModelWeight
from s3tensor.prune.hessian import Factors, output_error
from s3tensor.prune.problem import MEMORY_BUDGET, row_stacks

_LEAST_BUDGET = 32 << 20  # bytes of working memory: with fewer a pruner is not tried again
# Tensors (K, K) and (M, K) that admm, which takes the most memory, holds besides.
_SQUARES, _WEIGHTS = 8, 5


def prune_group(
    group: Sequence[ModelWeight],
    index: int,  # of the block
    splits: list[Moments],  # of the calibration tokens
    held_out: Tensor | None,  # (K, K), the Hessian of held-out tokens
    plan: Plan,
    bar: PruneProgress,
    memory: PeakMemory,
) -> list[tuple[LinearRow, ModelWeight, Tensor]]:
    """Prune the linears of one input, in place; a row and the mask (out_features, in_features) of each.

    Empties ``splits``: their sums take two to four tensors (K, K), memory that the pruner needs.
    """
    coefficients = plan.coefficients
    if coefficients.auto:
        bar.doing(index, f"{' and '.join(sorted(coefficients.auto))} of {short_names(group)}")
        weights = [layer.weight for layer in group]
        coefficients = choose(weights, splits[0], splits[1], coefficients)
    hessian, drift = merged(splits)
    splits.clear()
    value, cross, samples = hessian.value(), hessian.cross(), hessian.samples
    del hessian
    factors = Factors(value, coefficients.damp)
    options = dict(plan.options)
    if plan.dense_target:
        options = {"target": cross, "alpha": coefficients.alpha, **options}
    if drift is not None:
        options["drift"] = coefficients.beta * drift
    results = []
    for stack in _stacks(group, plan):
        bar.doing(index, short_names(stack))
        weights = [layer.weight for layer in stack]
        size = sum(weight.numel() for weight in weights)
        memory.part()
        start = time.perf_counter()
        pruned = _solve(
            stack,
            weights[0] if len(stack) == 1 else torch.cat(weights),
            factors,
            plan,
            options,
            lambda done, of, size=size: bar.within(size, done / of),  # type: ignore[misc]
        )
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
        seconds = time.perf_counter() - start
        peak = memory.part()
        heights = [len(weight) for weight in weights]
        pieces = zip(pruned.weight.split(heights), pruned.mask.split(heights), strict=True)
        for layer, weight, (found, mask) in zip(stack, weights, pieces, strict=True):
            error = output_error(found, weight, value)
            held_out_error = None if held_out is None else output_error(found, weight, held_out)
            layer.copy_weight(found)
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
                pattern=str(plan.patterns[layer.name]),
                held_out_error=held_out_error,
                alpha=coefficients.alpha,
                beta=0.0 if drift is None else coefficients.beta,
                damp=coefficients.damp,
            )
            results.append((row, layer, mask))
            bar.linear(row)
    return results


def _solve(
    stack: Sequence[ModelWeight],
    weight: Tensor,  # (M, K), theirs one above the other
    factors: Factors,
    plan: Plan,
    options: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> prune.Pruned:
    """Call the pruner; each time memory runs out, again with a quarter of the working memory.

    Raises:
        torch.OutOfMemoryError: with the least working memory too, naming the linears and the estimate.
    """
    pruner = prune.get(plan.pruner)
    options = dict(options)
    accepts = inspect.signature(pruner).parameters
    if "progress" in accepts:
        options.setdefault("progress", progress)
    budget = int(options.get("memory_budget", MEMORY_BUDGET))
    while True:
        try:
            return pruner(weight, factors, plan.patterns[stack[0].name], **options)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if "memory_budget" not in accepts or budget <= _LEAST_BUDGET:
            raise torch.OutOfMemoryError(_no_memory(stack, weight, plan.device))
        budget = max(budget // 4, _LEAST_BUDGET)
        options["memory_budget"] = budget
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()


def _no_memory(stack: Sequence[ModelWeight], weight: Tensor, device: torch.device) -> str:
    rows, columns = weight.shape
    size = max(weight.element_size(), 4)
    need = (_SQUARES * columns * columns + _WEIGHTS * rows * columns) * size + _LEAST_BUDGET
    free = ""
    if device.type == "cuda":
        free = f", of which {torch.cuda.mem_get_info(device)[0]:,} bytes are free"
    return (
        f"{', '.join(layer.name for layer in stack)}: out of memory while a weight of {rows} x {columns} "
        f"was pruned. It takes about {need:,} bytes on {device}{free}. The block is dense again and "
        "finished blocks stay; prune on another device (device='cpu'), or keep the calibration activations "
        "on the CPU (cache_device='cpu')."
    )


def _stacks(group: Sequence[ModelWeight], plan: Plan) -> list[list[ModelWeight]]:
    """Linears of one input that are pruned as one weight: their Hessian is factored once."""
    if plan.pruner not in prune.ROW_WISE or len({layer.weight.dtype for layer in group}) > 1:
        return [[layer] for layer in group]
    stacks = []
    for pattern in dict.fromkeys(plan.patterns[layer.name] for layer in group):
        alike = [layer for layer in group if plan.patterns[layer.name] == pattern]
        found = row_stacks([layer.shape for layer in alike], pattern)
        stacks += [[alike[i] for i in stack] for stack in found]
    return stacks


def short_names(group: Sequence[ModelWeight]) -> str:
    """The last part of each linear's name."""
    return ", ".join(layer.name.rpartition(".")[2] for layer in group)
