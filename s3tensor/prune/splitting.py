"""ADMM over any S3 pattern, and the exact refit of the weights that a mask keeps.

ALPS (arXiv 2406.07831, section 3) splits the layer problem into a ridge regression and a projection. The
Euclidean projection onto any S3 pattern is the scope-wise top-k of block norms (S3, arXiv 2604.11315,
section 4), so that one solver serves every pattern.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s3tensor.errors import PatternError
from s3tensor.hessian import Factors
from s3tensor.linalg import full_precision, masked_least_squares
from s3tensor.mask import select
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.prune.problem import (
    MEMORY_BUDGET,
    Progress,
    Pruned,
    fit,
    pose,
    row_group,
    target_term,
)

_MATRICES = 12  # tensors of a chunk's shape alive at once


def admm(
    weight: Tensor,  # (M, K) any floating dtype
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    pattern: Pattern | str,
    *,
    target: Tensor | None = None,  # (K, K) X_dense'X / N
    alpha: float = 0.3,
    damp: float = 0.01,
    rho0: float = 0.05,
    growth: float = 1.1,
    iterations: int = 100,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Pruned:
    """Masks by ADMM, weights by an exact refit."""
    problem = pose(weight, pattern)
    factors = fit(problem, hessian, damp, "admm")
    mixed = target_term(problem, factors, target, alpha)
    rows = problem.bound.shape[0]
    mask = torch.empty_like(problem.dense, dtype=torch.bool)
    result = torch.empty_like(problem.dense)
    with full_precision():
        scale = factors.scale
        values, vectors = factors.eigen()
        for part, bound in problem.chunks(_MATRICES, memory_budget):
            dense = factors.clear_dead(problem.dense[part])
            linear = problem.dense[part] @ mixed
            start, mask[part] = _split(
                linear / scale, dense * scale, values, vectors, bound, rho0, growth, iterations
            )
            if progress is not None:
                progress(part.start + part.stop, 2 * rows)
            result[part] = masked_least_squares(linear, factors.matrix, mask[part], start / scale)
            if progress is not None:
                progress(2 * part.stop, 2 * rows)
    return problem.finish(factors.clear_dead(result), mask)


def _split(
    linear: Tensor,  # (M, K): G over the scale
    dense: Tensor,  # (M, K): W0 times the scale
    values: Tensor,  # (K,)
    vectors: Tensor,  # (K, K)
    bound: BoundPattern,
    rho: float,
    growth: float,
    iterations: int,
    patience: int = 4,
) -> tuple[Tensor, Tensor]:
    group = row_group(bound)
    mask = select(dense.square(), bound)
    split = dense * mask
    dual = torch.zeros_like(dense)
    active = torch.arange(bound.shape[0] // group, device=dense.device)
    same = torch.zeros_like(active)
    final, final_mask = split.clone(), mask.clone()

    def rows(groups: Tensor) -> Tensor:
        return (groups[:, None] * group + torch.arange(group, device=dense.device)).flatten()

    for _ in range(iterations):
        ridge = (((linear - dual + rho * split) @ vectors) / (values + rho)) @ vectors.T
        ahead = ridge + dual / rho
        new = select(ahead.square(), bound)
        split = ahead * new
        dual = dual + rho * (ridge - split)
        moved = (new != mask).view(len(active), -1).any(1)
        mask = new
        same = torch.where(moved, 0, same + 1)
        rho *= growth
        stay = same < patience
        if not bool(stay.any()):
            break
        if int(stay.sum()) < 0.8 * len(stay):
            where = rows(active)
            final[where], final_mask[where] = split, mask
            keep = rows(stay.nonzero().flatten())
            active, same = active[stay], same[stay]
            linear, dual, split, mask = linear[keep], dual[keep], split[keep], mask[keep]
            bound = bound.pattern.bind((len(keep), bound.shape[1]))
    where = rows(active)
    final[where], final_mask[where] = split, mask
    return final, final_mask


def refit(
    weight: Tensor,  # (M, K) any floating dtype: the dense weight
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    mask: Tensor,  # (M, K) bool
    target: Tensor | None = None,  # (K, K) X_dense'X / N
    alpha: float = 0.3,
    *,
    damp: float = 0.01,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """The exact weights for a given mask: least squares on the kept entries of each row.

    Minimises ``tr((W - W0) (H + damp) (W - W0)')``, or its form with a dense target (see
    :func:`s3tensor.prune.problem.target_term`), over the entries where the mask is True: row by row
    ``H_SS w_S = (W0 T)_S``.

    Returns:
        (M, K) in the weight's dtype, zero outside the mask and at dead inputs.

    Raises:
        PatternError: a mask that is not bool or not of the weight's shape.
        NonFiniteError, HessianError: see :mod:`s3tensor.prune.problem`.
    """
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise PatternError(
            f"mask of shape {tuple(mask.shape)} and dtype {mask.dtype} for a weight of shape "
            f"{tuple(weight.shape)}; it must be bool, True where a weight is kept, of that shape"
        )
    problem = pose(weight, "unstructured@1")
    factors = fit(problem, hessian, damp, "refit")
    mixed = target_term(problem, factors, target, alpha)
    mask = mask.to(weight.device)
    result = torch.empty_like(problem.dense)
    with full_precision():
        for part, _ in problem.chunks(_MATRICES, memory_budget):
            dense = problem.dense[part]
            result[part] = masked_least_squares(dense @ mixed, factors.matrix, mask[part], dense)
    return problem.finish(factors.clear_dead(result), mask).weight
