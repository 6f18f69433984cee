"""ADMM over any S3 pattern, and the exact refit of the weights that a mask keeps.

ALPS (arXiv 2406.07831, section 3) splits the layer problem into a ridge regression and a projection. The
Euclidean projection onto any S3 pattern is the scope-wise top-k of block norms (S3, arXiv 2604.11315,
section 4), so that one solver serves every pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

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
from s3tensor.prune.product import Product

_MATRICES = 12  # tensors of a chunk's shape alive at once
_HURRY = 1.01  # growth grows by this each round: a penalty of the wrong scale is soon left behind
# Residual at which ADMM's refit ends. In float32 the loss is then within 1e-6 of its least on real layers.
_REFIT = {torch.float32: 3e-4, torch.float64: 1e-12}


def admm(
    weight: Tensor,  # (M, K) any floating dtype
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    pattern: Pattern | str,
    *,
    target: Tensor | None = None,  # (K, K) X_dense'X / N
    alpha: float = 0.5,
    damp: float = 0.001,
    starts: Sequence[float] = (0.7,),
    growth: float = 1.1,
    hold: int = 4,
    rounds: int = 40,
    balance: float = 0.85,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Pruned:
    """Masks by ADMM, weights by an exact refit: the least error of the pruners here, in the least time.

    With scales s (see :func:`block_scale`), ``H~ = H / (s s')``, ``G~ = W0 H / s`` and a penalty rho, one
    iteration of ALPS (arXiv 2406.07831, eq. 5 to 7), with the projection of S3, is

    1. ``B = (G~ - V + rho D) inv(H~ + rho I)``, a ridge regression, in all weights
    2. ``D = project(B + V / rho)``, in each scope the ``keep`` blocks of the largest norm
    3. ``V = V + rho (B - D)``

    After each round of ``hold`` iterations rho grows, and rows whose mask stayed throughout the round are
    done. Last, the kept weights of each row are fitted: ``H_SS w_S = G_S``.

    A round costs one inverse of a (K, K) matrix and ``hold`` products (M, K) x (K, K); layers of SmolLM2
    take 7 to 9 rounds. On these layers twice the iterations (``hold=8``) lower the error by 0.1 %, and the
    best of five starts by as much; exact swaps of single weights find less than 0.1 % more.

    Args:
        weight: the dense weight.
        hessian: ``X'X / N``, or ``Factors`` shared with other linears of the same input.
        pattern: a pattern or its string.
        target: the cross term with the dense model's inputs, ``Hessian.cross()``; see
            :func:`s3tensor.prune.problem.target_term`.
        alpha: its share, from 0 (the outputs on the pruned stream) to 1 (those on the dense stream).
        damp: share of the mean diagonal added to the diagonal; ``Factors`` bring their own. On real layers
            0.001 gave a lower error than 0.01 on held-out inputs too, by up to 4 %, and 0.0001 none lower.
        starts: the penalty rho of the first round, in units of the scale. Of several, each is solved in
            full, and every group of rows that share scopes keeps the one of the least loss.
        growth: factor on rho after a round, itself growing by 1 % a round.
        hold: iterations of a round.
        rounds: upper bound of their number.
        balance: how much of the scale is the conditional curvature of a block; see :func:`block_scale`.
        memory_budget: bytes of working memory, beyond two (K, K) matrices; rows are pruned in chunks that
            fit. It changes results by rounding only.
        progress: called with (work done, work in all), over all chunks and starts.

    Raises:
        ValueError: options out of range.
        PatternError, NonFiniteError, HessianError: see :mod:`s3tensor.prune.problem`; HessianError also
            when the damped Hessian is not positive definite.
    """
    _check_options(starts, growth, hold, rounds, balance)
    problem = pose(weight, pattern)
    factors = fit(problem, hessian, damp, "admm")
    mixed = target_term(problem, factors, target, alpha)
    product = Product.of(problem.bound).to(problem.dense.device)
    scale = block_scale(factors, product, balance)
    scaled = factors.matrix / scale[:, None] / scale
    result = torch.empty_like(problem.dense)
    mask = torch.empty_like(result, dtype=torch.bool)
    chunks = list(problem.chunks(_MATRICES + 2 * len(starts), memory_budget))
    steps = _Steps(progress, 2 * len(starts) * len(chunks))
    with full_precision():
        for part, bound in chunks:
            linear = factors.clear_dead(problem.dense[part] @ mixed)
            if product.spans_rows:
                result[part], mask[part] = _whole_rows(linear, factors.inverse(), bound)
                steps.add(2 * len(starts))
                continue
            dense = factors.clear_dead(problem.dense[part]) * scale
            found = []
            for start in starts:
                penalties = _penalties(start, growth, rounds)
                split, kept = _split(dense, linear / scale, scaled, bound, penalties, hold)
                steps.add(1)
                fitted = masked_least_squares(
                    linear, factors.matrix, kept, split / scale, tolerance=_REFIT[linear.dtype]
                )
                steps.add(1)
                found.append(Pruned(fitted, kept))
            result[part], mask[part] = _best(found, linear, factors.matrix, row_group(bound))
    return problem.finish(result, mask)


class _Steps:
    """Counts work for a progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, steps: int) -> None:
        self._done += steps
        if self._progress is not None:
            self._progress(self._done, self._total)


def block_scale(factors: Factors, product: Product, balance: float) -> Tensor:
    """Scales s (K,) in whose units ADMM weighs and projects: ``s_j^2 = F_j^balance H_jj^(1 - balance)``.

    ``F_j`` is the curvature of weight j that is left when the weights outside its block are free to make
    up for it: the diagonal of ``inv((inv H)_bb)``, b the columns of the block, as in OBS (Hassibi and Stork,
    1993). ALPS takes ``H_jj`` alone (balance 0), with which correlated inputs look dearer than they are. On
    layers of SmolLM2 F lowers the error by 0.3 to 1.5 % at half the iterations; where inputs are few or
    strongly correlated, by up to a half. With F alone (balance 1) the masks take longer to settle.
    """
    plain = factors.matrix.diagonal()
    if product.spans_rows:
        return plain.sqrt()  # a block of whole rows has no weights outside
    columns = product.columns.flatten(0, 1)  # (blocks, n)
    inverse = factors.inverse()[columns[:, :, None], columns[:, None, :]]  # (blocks, n, n)
    free = torch.empty_like(plain)
    free[columns] = torch.linalg.inv_ex(inverse).inverse.diagonal(dim1=1, dim2=2)
    # Damping bounds it from below, H_jj from above; rounding may leave these bounds.
    least = plain * torch.finfo(plain.dtype).eps + factors.ridge
    free = torch.minimum(torch.maximum(free.nan_to_num(0.0), least), plain)
    return (free**balance * plain ** (1.0 - balance)).sqrt()


def _check_options(
    starts: Sequence[float], growth: float, hold: int, rounds: int, balance: float
) -> None:
    if not starts or not all(0.0 < rho < math.inf for rho in starts):
        raise ValueError(
            f"starts={starts} must be one or more finite penalties > 0, such as (0.7,)"
        )
    if not 1.0 <= growth < math.inf:
        raise ValueError(f"growth={growth} must be a finite factor >= 1")
    if hold < 1 or rounds < 1:
        raise ValueError(f"hold={hold} and rounds={rounds} must be >= 1")
    if not 0.0 <= balance <= 1.0:
        raise ValueError(f"balance={balance} must be from 0 (diag H) to 1 (free curvature)")


def _penalties(rho: float, growth: float, rounds: int) -> Iterator[float]:
    """The penalty of each round."""
    for _ in range(rounds):
        yield rho
        rho *= growth
        growth *= _HURRY


def _split(
    dense: Tensor,  # (M, K): W0 times the scale
    linear: Tensor,  # (M, K): G over the scale
    hessian: Tensor,  # (K, K): H over the scale's outer product
    bound: BoundPattern,
    penalties: Iterable[float],
    hold: int,
) -> Pruned:
    """ADMM's sparse iterate D and its mask, in scaled units.

    The dual variable V is zero where D is kept and ``rho`` times the dropped part of ``B + V / rho``
    elsewhere, so that the two together are the two halves of one tensor.
    """
    group = row_group(bound)
    mask = select(dense.square(), bound)
    kept = dense * mask
    dropped = torch.zeros_like(dense)
    result = Pruned(torch.empty_like(dense), torch.empty_like(mask))
    active = torch.arange(len(dense), device=dense.device)  # rows that are not settled
    last = 1.0
    for rho in penalties:
        dropped *= last / rho  # V stays as it is
        last = rho
        inverse = _damped_inverse(hessian, rho)
        moved = torch.zeros(len(active) // group, dtype=torch.bool, device=dense.device)
        for _ in range(hold):
            pull = torch.sub(kept, dropped).mul_(rho).add_(linear)
            whole = torch.addmm(dropped, pull, inverse)  # B + V / rho
            previous, mask = mask, select(whole.square(), bound)
            kept = whole * mask
            dropped = whole - kept
            moved |= (mask != previous).view(len(moved), -1).any(1)
        result.weight[active], result.mask[active] = kept, mask
        if not bool(moved.any()):
            break
        stay = moved.repeat_interleave(group)
        if not bool(stay.all()):
            active, linear, kept, dropped, mask = (
                x[stay] for x in (active, linear, kept, dropped, mask)
            )
            bound = bound.pattern.bind((len(active), bound.shape[1]))
    return result


def _whole_rows(linear: Tensor, inverse: Tensor, bound: BoundPattern) -> Pruned:
    """Exact, where a block is whole rows: keeping a row lowers the loss by ``g inv(H) g' / 2``."""
    free = linear @ inverse
    mask = select(free * linear, bound)
    return Pruned(free * mask, mask)


def _damped_inverse(hessian: Tensor, rho: float) -> Tensor:
    """``inv(H + rho I)``: on a CPU in the time of one product of (K, K); ``eigh`` takes five to ten."""
    damped = hessian.clone()
    damped.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _best(
    found: list[Pruned],
    linear: Tensor,  # (M, K): G
    hessian: Tensor,  # (K, K)
    group: int,  # rows that share scopes
) -> Pruned:
    """The solution of the least loss, for each group of rows."""
    if len(found) == 1:
        return found[0]
    losses = torch.stack([((w @ hessian / 2 - linear) * w).sum(1) for w, _ in found])
    best = losses.view(len(found), -1, group).sum(2).argmin(0).repeat_interleave(group)  # (M,)
    rows = torch.arange(len(best), device=best.device)
    weights, masks = (torch.stack(parts)[best, rows] for parts in zip(*found, strict=True))
    return Pruned(weights, masks)


def refit(
    weight: Tensor,  # (M, K) any floating dtype: the dense weight
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    mask: Tensor,  # (M, K) bool
    target: Tensor | None = None,  # (K, K) X_dense'X / N
    alpha: float = 0.5,
    *,
    damp: float = 0.001,
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
