"""Pruners that score each weight once and leave the kept weights as they are: magnitude, Wanda, OBD."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from s3tensor.mask.projection import select
from s3tensor.pattern import Pattern
from s3tensor.prune.hessian import DAMP, Factors
from s3tensor.prune.problem import MEMORY_BUDGET, Problem, Progress, Pruned, fit, pose
from s3tensor.prune.registry import register

_MATRICES = 6  # tensors of a chunk's shape alive at once: scores, their planes, ranks and the mask


@register(needs_hessian=False)
def magnitude(
    weight: Tensor,  # (M, K) any floating dtype
    hessian: Tensor | Factors | None,
    pattern: Pattern | str,
    *,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Pruned:
    """Keep the blocks of the largest squared norm: the Euclidean projection. The Hessian is ignored.

    Raises:
        PatternError, NonFiniteError: see :func:`s3tensor.prune.problem.pose`.
    """
    problem = pose(weight, pattern)
    return keep_best(problem, lambda rows: rows.square(), memory_budget, progress)


@register()
def wanda(
    weight: Tensor,  # (M, K) any floating dtype
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    pattern: Pattern | str,
    *,
    damp: float = DAMP,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Pruned:
    """Keep the blocks of the largest ``sum |w_j| ||X_j||`` (Wanda, arXiv 2306.11695, eq. 1).

    ``||X_j||`` is ``sqrt(N H_jj)``, undamped, without the common factor N. ``damp`` has no effect.

    Raises:
        PatternError, NonFiniteError, HessianError: see :mod:`s3tensor.prune.problem`.
    """
    problem = pose(weight, pattern)
    norms = _relative(fit(problem, hessian, damp, "wanda")).sqrt()
    return keep_best(problem, lambda rows: rows.abs() * norms, memory_budget, progress)


@register()
def obd(
    weight: Tensor,  # (M, K) any floating dtype
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    pattern: Pattern | str,
    *,
    damp: float = DAMP,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Pruned:
    """Keep the blocks of the largest ``sum H_jj w_j^2 / 2`` (LeCun, Denker, Solla, 1990, eq. 5).

    That is the loss of dropping a block under a diagonal Hessian. Blocks of one weight rank as by Wanda.
    ``damp`` has no effect.

    Raises:
        PatternError, NonFiniteError, HessianError: see :mod:`s3tensor.prune.problem`.
    """
    problem = pose(weight, pattern)
    curvature = _relative(fit(problem, hessian, damp, "obd"))
    return keep_best(problem, lambda rows: rows.square() * (curvature / 2), memory_budget, progress)


def _relative(factors: Factors) -> Tensor:
    """Undamped diag(H) over its largest entry, so that squares neither overflow nor vanish."""
    diagonal = factors.diagonal
    return diagonal / diagonal.amax().clamp_min(torch.finfo(diagonal.dtype).tiny)


def keep_best(
    problem: Problem,
    score: Callable[[Tensor], Tensor],
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Pruned:
    """The weight without change where its blocks have the best scores, zero elsewhere.

    Args:
        problem: the weight and its pattern.
        score: of rows (m, K) of ``problem.dense``, a score for each element, (m, K); they are summed over a
            block, and in each scope the ``keep`` best blocks stay.
        memory_budget: bytes of working memory; rows are scored in chunks that fit.
        progress: called with (rows done, rows in all).
    """
    rows = problem.bound.shape[0]
    mask = torch.empty(problem.bound.shape, dtype=torch.bool, device=problem.dense.device)
    for part, bound in problem.chunks(_MATRICES, memory_budget):
        mask[part] = select(score(problem.dense[part]), bound)
        if progress is not None:
            progress(part.stop, rows)
    return problem.finish(problem.dense, mask)
