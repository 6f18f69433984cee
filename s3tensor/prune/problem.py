"""What pruners share: checked inputs in one dtype, chunks of rows that fit the memory, the linear term."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from s3tensor.errors import (
    HessianError,
    NonFiniteError,
    NonFiniteHessianError,
    PatternError,
    PrunerError,
)
from s3tensor.pattern import BoundPattern, Pattern
from s3tensor.prune.hessian import Factors, as_factors
from s3tensor.prune.linalg import masked_least_squares

MEMORY_BUDGET = 2 << 30
"""Default bytes of working memory for the rows that a pruner works on at a time.

Besides them it holds its inputs, the factors, its result and at most five copies of the weight.
"""

_MATRICES = 12  # tensors of a chunk's shape alive at once in a least-squares solve

Progress = Callable[[int, int], None]
"""``progress(done, total)``: units of work; ``done`` never decreases and ends at ``total``."""


class Pruned(NamedTuple):
    """A pruned weight and the mask that it satisfies; both (out_features, in_features)."""

    weight: Tensor  # the dtype and device of the dense weight, zero where mask is False
    mask: Tensor  # bool, True where kept: exactly ``keep`` blocks of every scope


@dataclass(frozen=True)
class Problem:
    """A checked layer problem, in float64 for a float64 weight, else in float32."""

    dense: Tensor  # (M, K): the weight over ``unit``, largest magnitude in [1, 2)
    unit: float  # a power of two, so that scaling a weight scales its result exactly
    bound: BoundPattern
    original: Tensor  # (M, K) as given

    @property
    def pattern(self) -> Pattern:
        return self.bound.pattern

    def chunks(self, matrices: int, memory_budget: int) -> Iterator[tuple[slice, BoundPattern]]:
        """Slices of rows in which ``matrices`` tensors of the chunk's shape fit ``memory_budget`` bytes.

        Each is whole groups of rows that share scopes, at least one group, however small the budget.

        Raises:
            PrunerError: a budget below one byte.
        """
        check_budget(memory_budget)
        rows, columns = self.bound.shape
        period = row_group(self.bound)
        group = matrices * columns * self.dense.element_size() * period
        step = max(1, memory_budget // group) * period
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield slice(start, stop), self.pattern.bind((stop - start, columns))

    def least_squares(
        self,
        linear: Callable[[slice], Tensor],
        hessian: Tensor,  # (K, K), damped
        mask: Tensor,  # (M, K) bool
        start: Tensor,  # (M, K)
        memory_budget: int,
        out: Tensor | None = None,  # (M, K), which may be start
    ) -> Tensor:
        """:func:`masked_least_squares` of all rows (M, K), in chunks; ``linear(part)`` is these rows of G."""
        result = torch.empty_like(start) if out is None else out
        for part, _ in self.chunks(_MATRICES, memory_budget):
            result[part] = masked_least_squares(linear(part), hessian, mask[part], start[part])
        return result

    def finish(self, weight: Tensor, mask: Tensor) -> Pruned:
        """Back to the units, dtype and device of the given weight; zero outside the mask.

        Raises:
            NonFiniteError: a weight that is too large for the dtype.
            NonFiniteHessianError: the computation has broken down.
        """
        wide = (weight * self.unit).masked_fill_(~mask, 0.0)
        scaled = wide.to(self.original.dtype)
        if not bool(torch.isfinite(scaled).all()):
            if bool(torch.isfinite(wide).all()):
                raise NonFiniteError(
                    f"a pruned weight is beyond {scaled.dtype}, whose largest number is "
                    f"{torch.finfo(scaled.dtype).max:g}; prune in a wider dtype, or scale the weight"
                )
            raise NonFiniteHessianError(
                "the pruned weight is not finite: the Hessian is too ill-conditioned for the dtype; raise "
                "damp, or give the Hessian in float64"
            )
        return Pruned(scaled, mask)


def pose(weight: Tensor, pattern: Pattern | str) -> Problem:
    """Check a weight and its pattern.

    Raises:
        PatternError: not a floating (M, K) weight, or one that the pattern does not fit.
        NonFiniteError: NaN or Inf in the weight.
    """
    if weight.ndim != 2:
        raise PatternError(
            f"pruners take a weight (out_features, in_features), got shape {tuple(weight.shape)}; "
            "flatten the other dims first"
        )
    if not weight.dtype.is_floating_point:
        raise PatternError(
            f"a weight of dtype {weight.dtype} cannot be pruned; dequantise it to a float"
        )
    bound = Pattern.parse(pattern).bind(weight.shape)
    dense = weight.detach()
    dense = dense if dense.dtype == torch.float64 else dense.float()
    largest = dense.abs().amax()
    if not bool(torch.isfinite(largest)):
        raise NonFiniteError(
            f"the weight of shape {bound.shape} holds NaN or Inf; repair it before it is pruned"
        )
    exponent = int(torch.frexp(largest).exponent) - 1 if float(largest) > 0 else 0
    unit = 2.0**exponent
    return Problem(dense / unit, unit, bound, weight.detach())


def fit(problem: Problem, hessian: Tensor | Factors | None, damp: float, pruner: str) -> Factors:
    """The damped Hessian of a problem, in its dtype and on its device.

    Raises:
        HessianError: no Hessian, named with the ``pruner`` that needs it, or one that does not fit.
    """
    if hessian is None:
        raise HessianError(
            f"{pruner} needs the Hessian X'X/N of the layer's inputs; make it with s3tensor.Hessian, or "
            "use magnitude, which needs none"
        )
    factors = as_factors(hessian, damp)
    if factors.in_features != problem.bound.shape[1]:
        raise HessianError(
            f"Hessian of {factors.in_features} inputs for a weight of shape {problem.bound.shape}; it must "
            f"be ({problem.bound.shape[1]}, {problem.bound.shape[1]})"
        )
    return factors.to(problem.dense.dtype, problem.dense.device)


def check_budget(memory_budget: int) -> None:
    """Refuse a budget of working memory below one byte.

    Raises:
        PrunerError: naming it.
    """
    if memory_budget < 1:
        raise PrunerError(f"memory_budget={memory_budget} must be >= 1 byte")


def row_group(bound: BoundPattern) -> int:
    """Rows of the smallest group that can be pruned alone: all of them when sizes fix the row count."""
    rows, columns = bound.shape
    try:
        bound.pattern.bind((bound.row_period, columns))
    except PatternError:
        return rows
    return bound.row_period


def row_stacks(shapes: Sequence[tuple[int, int]], pattern: Pattern) -> list[list[int]]:
    """Numbers of the weights that can be stacked along dim 0 and pruned as one.

    They have the same columns, and no scope of the stack spans two of them. A weight that cannot be
    stacked is a list of one.
    """
    stacks: list[list[int]] = []
    for number, shape in enumerate(shapes):
        for stack in stacks:
            if _stackable([shapes[i] for i in stack] + [shape], pattern):
                stack.append(number)
                break
        else:
            stacks.append([number])
    return stacks


def _stackable(shapes: Sequence[tuple[int, int]], pattern: Pattern) -> bool:
    columns = {shape[1] for shape in shapes}
    if len(columns) != 1:
        return False
    try:
        whole = pattern.bind((sum(shape[0] for shape in shapes), *columns))
    except PatternError:
        return False
    group = row_group(whole)
    return all(
        shape[0] % group == 0 and row_group(pattern.bind(shape)) == group for shape in shapes
    )


@dataclass(frozen=True)
class LinearTerm:
    """The matrix G (M, K) of a least-squares problem, ``tr(W H W') / 2 - tr(W G')``, formed by rows."""

    problem: Problem
    factors: Factors
    matrix: Tensor  # (K, K): G = W0 matrix + drift
    drift: Tensor | None = None  # (M, K), in the problem's unit

    @property
    def is_plain(self) -> bool:
        """Whether the dense weight is the optimum without a mask."""
        return self.matrix is self.factors.matrix and self.drift is None

    def rows(self, part: slice = slice(None)) -> Tensor:
        """Rows of G, zero at dead inputs."""
        found = self.problem.dense[part] @ self.matrix
        if self.drift is not None:
            found += self.drift[part]
        return self.factors.clear_dead(found)


def linear_term(
    problem: Problem,
    factors: Factors,
    target: Tensor | None,  # (K, K): X_dense'X / N
    alpha: float,
    drift: Tensor | None = None,  # (M, K)
) -> LinearTerm:
    """``G = W0 T + drift``: T the damped H, or its mix with the cross term.

    ``T = (1 - alpha) H + alpha X_dense'X / N``, both damped alike, is the normal equation of fitting the
    pruned stream's outputs ``X w`` to those of the dense stream, ``X_dense w0`` (alpha = 1), or to a
    mean of these and the pruned stream's own ``X w0``. A drift ``b E'X / N`` makes the outputs compensate
    for a share b of an error E (N, M) that is added to them.

    Raises:
        HessianError, PrunerError, NonFiniteError: a target or a drift that does not fit or is not finite,
            or an alpha outside [0, 1].
    """
    matrix = factors.matrix
    if target is not None:
        if target.shape != factors.matrix.shape:
            raise HessianError(
                f"target of shape {tuple(target.shape)} beside a Hessian of {tuple(factors.matrix.shape)}; "
                "it must be Hessian.cross(), X_dense'X/N of the same inputs"
            )
        if not 0.0 <= alpha <= 1.0:
            raise PrunerError(f"alpha={alpha} must be from 0 (H alone) to 1 (the target alone)")
        cross = _finite(target, "target", "accumulate it with Hessian.update(x, dense)")
        cross = (cross / factors.unit if factors.unit != 1 else cross).to(matrix)
        mixed = (1.0 - alpha) * factors.matrix + alpha * cross
        mixed.diagonal().add_(alpha * factors.ridge)
        matrix = mixed.masked_fill_(factors.dead, 0.0) if factors.has_dead else mixed
    if drift is not None:
        if drift.shape != problem.dense.shape:
            raise HessianError(
                f"drift of shape {tuple(drift.shape)} for a weight of {tuple(problem.dense.shape)}; it must "
                "be E'X/N, E (N, out_features) the error that the outputs compensate for"
            )
        drift = _finite(drift, "drift", "look for NaN in E and in the inputs")
        drift = drift.to(problem.dense) / problem.unit / factors.unit
    return LinearTerm(problem, factors, matrix, drift)


def _finite(given: Tensor, name: str, remedy: str) -> Tensor:
    if not bool(torch.isfinite(given).all()):
        raise NonFiniteError(f"the {name} holds NaN or Inf; {remedy}")
    return given.detach()
