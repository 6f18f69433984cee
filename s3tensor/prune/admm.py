"""ADMM over any S3 pattern, and the exact refit of the weights that a mask keeps.

ALPS (arXiv 2406.07831, section 3) splits the layer problem into a ridge regression and a projection. The
Euclidean projection onto any S3 pattern is the scope-wise top-k of block norms (S3, arXiv 2604.11315,
section 4), so one solver serves every pattern.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from s3tensor.errors import PatternError, PrunerError
from s3tensor.mask.projection import select
from s3tensor.modes import neutral
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.prune.hessian import DAMP_ADMM, DAMP_EXACT, Factors
from s3tensor.prune.linalg import (
    ShiftedInverse,
    full_precision,
    masked_least_squares,
    tensor_cores,
)
from s3tensor.prune.problem import (
    MEMORY_BUDGET,
    LinearTerm,
    Problem,
    Progress,
    Pruned,
    fit,
    linear_term,
    pose,
    row_group,
)
from s3tensor.prune.product import Product
from s3tensor.prune.registry import register

_MATRICES = 12  # tensors of a chunk's shape alive at once
_HURRY = (
    1.01  # growth grows by this each round, so that a start of the wrong scale costs few rounds
)
# Residual at which ADMM's refit ends. In float32 the loss is then within 1e-6 of its least on real layers.
_REFIT = {torch.float32: 3e-4, torch.float64: 1e-12}


@register()
def admm(
    weight: Tensor,  # (M, K) any floating dtype
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    pattern: Pattern | str,
    *,
    target: Tensor | None = None,  # (K, K) X_dense'X / N
    alpha: float = 0.5,
    drift: Tensor | None = None,  # (M, K) E'X / N
    damp: float = DAMP_ADMM,
    starts: Sequence[float] = (0.85,),
    growth: float = 1.1,
    hold: int = 8,
    rounds: int = 40,
    balance: float = 0.85,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Pruned:
    """Masks by ADMM, weights by an exact refit: for most patterns the least error in the least time.

    docs/pruners.md has the figures; on large blocks, whole columns or heads ``obs`` may be slightly better.

    With scales s (see :func:`block_scale`), ``H~ = H / (s s')``, ``G~ = W0 H / s`` and a penalty rho, one
    iteration of ALPS (arXiv 2406.07831, eq. 5 to 7), with the projection of S3, is

    1. ``B = (G~ - V + rho D) inv(H~ + rho I)``, a ridge regression, in all weights
    2. ``D = project(B + V / rho)``, in each scope the ``keep`` blocks of the largest norm
    3. ``V = V + rho (B - D)``

    After each round of ``hold`` iterations rho grows, and rows whose mask did not change in the round are
    done. Last, the kept weights of each row are fitted: ``H_SS w_S = G_S``.

    A round costs one inverse of a (K, K) matrix (see :class:`s3tensor.prune.linalg.ShiftedInverse`) and
    ``hold`` products (M, K) x (K, K), on a GPU in TF32. The last of some 10 rounds have few rows.

    Args:
        weight: the dense weight.
        hessian: ``X'X / N``, or ``Factors`` shared with other linears of the same input.
        pattern: a pattern or its string.
        target: the cross term with the dense model's inputs, ``Hessian.cross()``; see
            :func:`s3tensor.prune.problem.linear_term`.
        alpha: its share, from 0 (the outputs on the pruned stream) to 1 (those on the dense stream).
        drift: an error of the outputs to compensate for, against the inputs; see the same function.
        damp: share of the mean diagonal added to the diagonal; ``Factors`` bring their own. On
            ill-conditioned inputs more, such as 0.001, fits calibration less and other inputs better. For a
            whole model 0.01 is enough. See docs/pruners.md.
        starts: the penalty rho of the first round, in units of the scale. Each of several is solved in
            full, and every group of rows that share scopes keeps the solution of the least loss.
        growth: factor on rho after a round, itself growing by 1 % a round.
        hold: iterations of a round.
        rounds: upper bound of their number.
        balance: how much of the scale is the conditional curvature of a block; see :func:`block_scale`.
        memory_budget: bytes of working memory, beyond eight (K, K) matrices and ADMM's iterates, three
            tensors of the weight's shape for each start; rows are pruned in chunks that fit. It changes
            results only by rounding.
        progress: called with (work done, work in all), over all chunks and starts.

    Raises:
        PrunerError: options out of range.
        PatternError, NonFiniteError, HessianError: see :mod:`s3tensor.prune.problem`; HessianError also
            when the damped Hessian is not positive definite.
    """
    _check_options(starts, growth, hold, rounds, balance)
    problem = pose(weight, pattern)
    factors = fit(problem, hessian, damp, "admm")
    linear = linear_term(problem, factors, target, alpha, drift)
    product = Product.of(problem.bound).to(problem.dense.device)
    scale = block_scale(factors, product, balance)
    scaled = factors.matrix / scale[:, None] / scale
    chunks = list(problem.chunks(_MATRICES, memory_budget))
    steps = _Steps(progress, 2 * len(starts) * len(chunks))
    with full_precision():
        if product.spans_rows:
            result = _whole_rows(problem, linear, factors, chunks)
            steps.add(2 * len(starts) * len(chunks))
            return problem.finish(*result)
        dense = factors.clear_dead(problem.dense)
        # Without a target the dense weight is the optimum.
        free = dense if linear.is_plain else linear.rows() @ factors.inverse()
        free = free * scale
        found = []
        for start in starts:
            rows = [_Rows(part, dense[part] * scale, free[part], bound) for part, bound in chunks]
            split = _split(rows, scaled, _penalties(start, growth, rounds), hold)
            steps.add(len(chunks))
            for part, _ in chunks:
                split.weight[part] = masked_least_squares(
                    linear.rows(part),
                    factors.matrix,
                    split.mask[part],
                    split.weight[part] / scale,
                    tolerance=_REFIT[dense.dtype],
                )
                steps.add(1)
            found.append(split)
        result = _best(found, linear, factors, chunks)
    return problem.finish(*result)


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

    ``F_j`` is the curvature of weight j when the weights outside its block are free to compensate: the
    diagonal of ``inv((inv H)_bb)``, b the columns of the block, as in OBS (Hassibi and Stork, 1993). ALPS
    uses ``H_jj`` alone (balance 0), which overrates correlated inputs. With F alone (balance 1) the masks
    take longer to settle.
    """
    plain = factors.matrix.diagonal()
    if product.spans_rows:
        return plain.sqrt()  # a block of whole rows has no weights outside
    columns = product.columns.flatten(0, 1)  # (blocks, n)
    if columns.shape[1] == 1:
        free = factors.inverse().diagonal().reciprocal()
    else:
        inverse = factors.inverse()[columns[:, :, None], columns[:, None, :]]  # (blocks, n, n)
        free = torch.empty_like(plain)
        free[columns] = torch.linalg.inv_ex(inverse).inverse.diagonal(dim1=1, dim2=2)
    # Damping bounds it from below and H_jj from above, except for rounding.
    least = plain * torch.finfo(plain.dtype).eps + factors.ridge
    free = torch.minimum(torch.maximum(free.nan_to_num(0.0), least), plain)
    return (free**balance * plain ** (1.0 - balance)).sqrt()


def _check_options(
    starts: Sequence[float], growth: float, hold: int, rounds: int, balance: float
) -> None:
    if not starts or not all(0.0 < rho < math.inf for rho in starts):
        raise PrunerError(
            f"starts={starts} must be one or more finite penalties > 0, such as (0.85,)"
        )
    if not 1.0 <= growth < math.inf:
        raise PrunerError(f"growth={growth} must be a finite factor >= 1")
    if hold < 1 or rounds < 1:
        raise PrunerError(f"hold={hold} and rounds={rounds} must be >= 1")
    if not 0.0 <= balance <= 1.0:
        raise PrunerError(f"balance={balance} must be from 0 (diag H) to 1 (free curvature)")


def _penalties(rho: float, growth: float, rounds: int) -> Iterator[float]:
    """The penalty of each round."""
    for _ in range(rounds):
        yield rho
        rho *= growth
        growth *= _HURRY


class _Rows:
    """ADMM's iterates on a chunk of rows, in scaled units; settled rows are removed.

    The dual variable V is zero where D is kept, and elsewhere ``rho`` times the dropped half of
    ``B + V / rho``, so D and V are two halves of one tensor. With ``W* = free`` the ridge regression is
    ``B = W* + rho (D - V / rho - W*) inv(H + rho I)``. Its factors are of the size of the weights, unlike
    ``G``, which is large along the inputs' main directions: TF32, or an inverse that is off by 1e-3, is
    precise enough.
    """

    def __init__(
        self,
        part: slice,  # of the weight's rows
        dense: Tensor,  # (m, K): W0 times the scale
        free: Tensor,  # (m, K): the optimum without a mask, times the scale
        bound: BoundPattern,
    ) -> None:
        self.free, self.bound = free, bound
        self.group = row_group(bound)
        self.mask = select(dense.square(), bound)
        self.kept = dense * self.mask
        self.dropped = torch.zeros_like(dense)
        self.rows = torch.arange(part.start, part.stop, device=dense.device)
        self.rho = 1.0

    def round(self, rho: float, inverse: Tensor, hold: int) -> None:
        """``hold`` iterations with one penalty; ``inverse`` is ``inv(H + rho I)``."""
        self.dropped *= self.rho / rho  # V does not change
        self.rho = rho
        changed = torch.zeros_like(self.mask)
        with tensor_cores(inverse):
            for _ in range(hold):
                base = self.dropped.add_(self.free)
                point = self.kept.sub_(base)
                whole = torch.addmm(base, point, inverse, alpha=rho, out=base)  # B + V / rho
                previous, self.mask = self.mask, select(whole.square(), self.bound)
                changed |= self.mask != previous
                self.kept = torch.mul(whole, self.mask, out=point)
                self.dropped = whole.sub_(self.kept)
        self.changed = changed

    def settle(self, result: Pruned) -> bool:
        """Write the iterates to the result and keep the rows whose mask changed; False when none did."""
        result.weight[self.rows], result.mask[self.rows] = self.kept, self.mask
        groups = len(self.rows) // self.group
        moved = self.changed.view(groups, -1).any(1).nonzero()  # (groups, 1)
        if 0 < len(moved) < groups:
            stay = (moved * self.group + torch.arange(self.group, device=moved.device)).flatten()
            self.rows, self.free, self.kept, self.dropped, self.mask = (
                x.index_select(0, stay)
                for x in (self.rows, self.free, self.kept, self.dropped, self.mask)
            )
            self.bound = self.bound.pattern.bind(tuple(self.kept.shape))
        return len(moved) > 0


def _split(
    chunks: list[_Rows],
    hessian: Tensor,  # (K, K): H over the scale's outer product
    penalties: Iterable[float],
    hold: int,
) -> Pruned:
    """ADMM's sparse iterate D and its mask, in scaled units; one inverse a round serves all chunks."""
    weight = torch.cat([chunk.kept for chunk in chunks])
    result = Pruned(weight, torch.empty_like(weight, dtype=torch.bool))
    inverses = ShiftedInverse(hessian)
    for rho in penalties:
        inverse = inverses.at(rho)
        for chunk in chunks:
            chunk.round(rho, inverse, hold)
        chunks = [chunk for chunk in chunks if chunk.settle(result)]
        if not chunks:
            break
    return result


def _whole_rows(
    problem: Problem,
    term: LinearTerm,
    factors: Factors,
    chunks: list[tuple[slice, BoundPattern]],
) -> Pruned:
    """The optimum where a block is whole rows: keeping a row lowers the loss by ``g inv(H) g' / 2``."""
    weight = torch.empty_like(problem.dense)
    mask = torch.empty_like(weight, dtype=torch.bool)
    for part, bound in chunks:
        linear = term.rows(part)
        free = linear @ factors.inverse()
        mask[part] = select(free * linear, bound)
        weight[part] = free * mask[part]
    return Pruned(weight, mask)


def _best(
    found: list[Pruned],
    term: LinearTerm,
    factors: Factors,
    chunks: list[tuple[slice, BoundPattern]],
) -> Pruned:
    """The solution of the least loss, for each group of rows that share scopes."""
    if len(found) == 1:
        return found[0]
    best = Pruned(torch.empty_like(found[0].weight), torch.empty_like(found[0].mask))
    for part, bound in chunks:
        group = row_group(bound)
        linear = term.rows(part)
        weights, masks = (torch.stack([x[part] for x in each]) for each in zip(*found, strict=True))
        losses = torch.stack([((w @ factors.matrix / 2 - linear) * w).sum(1) for w in weights])
        least = losses.view(len(found), -1, group).sum(2).argmin(0).repeat_interleave(group)
        rows = torch.arange(len(least), device=least.device)
        best.weight[part], best.mask[part] = weights[least, rows], masks[least, rows]
    return best


@neutral()
def refit(
    weight: Tensor,  # (M, K) any floating dtype: the dense weight
    hessian: Tensor | Factors | None,  # (K, K) X'X / N
    mask: Tensor,  # (M, K) bool
    target: Tensor | None = None,  # (K, K) X_dense'X / N
    alpha: float = 0.5,
    *,
    drift: Tensor | None = None,  # (M, K) E'X / N
    damp: float = DAMP_EXACT,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """The exact weights for a given mask: least squares on the kept entries of each row.

    Minimises ``tr((W - W0) (H + damp) (W - W0)')``, or the loss with a dense target (see
    :func:`s3tensor.prune.problem.linear_term`), over the entries where the mask is True: row by row
    ``H_SS w_S = G_S``.

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
    linear = linear_term(problem, factors, target, alpha, drift)
    mask = mask.to(weight.device)
    with full_precision():
        result = problem.least_squares(
            linear.rows, factors.matrix, mask, problem.dense, memory_budget
        )
    return problem.finish(factors.clear_dead(result), mask).weight
