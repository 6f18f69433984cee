"""Alpha, beta and damp: given, or chosen for the linears of each input on calibration tokens held back.

Without a mask the fit of the linears of one input is ``W = W0 + alpha D + beta B``. With the moments H, the
cross term C and the drift E of the tokens it is fitted on, ``D = W0 (C - H) P`` and ``B = E P``, where P is
the inverse of the damped H. On other tokens, with moments H', C' and E', its squared error against the dense
model's outputs is ``tr(W H' W') - 2 tr(W (W0 C' + E')')`` plus a constant: a parabola in alpha, whose minimum
is known in closed form. Its height compares two values of damp. Unless damp is given it is chosen this way,
where there is a dense target and text enough.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from s3tensor import prune
from s3tensor.errors import HessianError, PrunerError
from s3tensor.llm.moments import Moments
from s3tensor.prune.hessian import DAMP, Factors
from s3tensor.prune.linalg import full_precision

DEFAULT_ALPHA = 0.5  # docs/pruners.md compares five
DEFAULT_DAMP = DAMP  # where it is not chosen
DAMPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # tried by damp="auto"
_ROWS = 256  # of each weight that are scored, evenly spaced: the error is a sum over rows
_NOISE = 1e-10  # relative to the square of the outputs: less is rounding
_EVERY = 8  # one calibration sequence in this many validates the choice

Auto = Literal["auto"]


@dataclass(frozen=True)
class Coefficients:
    """Alpha, beta and damp of a group of linears, or of a whole run before any of them is chosen."""

    alpha: float
    beta: float
    damp: float
    auto: frozenset[str] = frozenset()  # "alpha", "damp": chosen for each group

    @classmethod
    def of(
        cls,
        pruner: str,
        alpha: float | Auto | None,
        beta: float | None,
        damp: float | Auto | None,
    ) -> Coefficients:
        """Checked, with the pruner's defaults; a damp of None is chosen where there is a dense target.

        Raises:
            PrunerError: as :func:`check_options`.
        """
        check_options(pruner, alpha, damp, beta)
        accepts = inspect.signature(prune.get(pruner)).parameters
        auto = {name for name, given in (("alpha", alpha), ("damp", damp)) if given == "auto"}
        if alpha is None or isinstance(alpha, str):
            alpha = DEFAULT_ALPHA if "target" in accepts else 0.0
        if beta is None:
            beta = alpha if "drift" in accepts else 0.0
        if damp is None and alpha > 0:
            auto.add("damp")
        if damp is None or isinstance(damp, str):
            damp = DEFAULT_DAMP
        return cls(alpha, beta, damp, frozenset(auto))


def check_options(
    pruner: str,
    alpha: float | Auto | None = None,
    damp: float | Auto | None = None,
    beta: float | None = None,
) -> None:
    """Refuse what :func:`~s3tensor.llm.prune_model` would refuse whatever the model.

    Raises:
        PrunerError: an unknown pruner, a number out of range, alpha for a pruner without a dense target, beta
            for one that takes no drift or without a dense target, damp="auto" without a dense target.
    """
    accepts = inspect.signature(prune.get(pruner)).parameters
    for name, given in (("damp", damp), ("alpha", alpha)):
        if isinstance(given, str) and given != "auto":
            raise PrunerError(f"{name}={given!r} must be a number or 'auto'")
    if not isinstance(damp, str) and damp is not None and not 0.0 <= damp < math.inf:
        raise PrunerError(
            f"damp={damp} must be a finite share >= 0 of the mean diagonal, or 'auto'"
        )
    if not isinstance(alpha, str) and alpha is not None and not 0.0 <= alpha <= 1.0:
        raise PrunerError(
            f"alpha={alpha} must be from 0 (pruned stream) to 1 (dense outputs), or 'auto'"
        )
    if alpha and "target" not in accepts:
        raise PrunerError(f"pruner {pruner!r} takes no dense target; leave alpha out or use 'admm'")
    if damp == "auto" and (alpha == 0 or "target" not in accepts):
        raise PrunerError(
            "damp='auto' compares fits to the dense model's outputs; give a number, or use a pruner with a "
            "dense target, such as 'admm' with alpha > 0"
        )
    if beta is not None and not 0.0 <= beta <= 1.0:
        raise PrunerError(f"beta={beta} must be from 0 (no drift corrected) to 1 (all of it)")
    if beta and (alpha == 0 or "drift" not in accepts):
        reason = (
            "takes no drift" if "drift" not in accepts else "takes drift with a dense target only"
        )
        raise PrunerError(
            f"pruner {pruner!r} {reason}; leave beta out or use 'admm' with alpha > 0"
        )


def split_batches(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[int]]]:
    """Batches cut so that every eighth sequence, counted from the last, has a batch of its own.

    Returns:
        The batches, and two lists of their indices: those to fit on and those that validate the choice.

    Raises:
        PrunerError: fewer than two sequences.
    """
    count = sum(len(batch) for batch in batches)
    if count < 2:
        raise PrunerError(
            f"'auto' holds some calibration sequences back to choose by, and there are {count}; give at "
            "least 2, or a number"
        )
    cut: list[Tensor] = []
    fit: list[int] = []
    validation: list[int] = []
    left = count
    for batch in batches:
        start = 0
        for row in range(len(batch)):
            left -= 1
            if left % _EVERY:
                continue
            if row > start:
                fit.append(len(cut))
                cut.append(batch[start:row])
            validation.append(len(cut))
            cut.append(batch[row : row + 1])
            start = row + 1
        if start < len(batch):
            fit.append(len(cut))
            cut.append(batch[start:])
    return cut, [fit, validation]


def choose(
    weights: Sequence[Tensor],  # (M, K) each, of one input
    fit: Moments,
    validation: Moments,
    coefficients: Coefficients,
) -> Coefficients:
    """Alpha and damp for these linears: those of ``coefficients.auto`` whose fit validates best.

    Alpha stays as given where the fit does not depend on it, because the dense and the pruned stream agree.
    """
    candidates = DAMPS if "damp" in coefficients.auto else ()
    damps = list(dict.fromkeys((coefficients.damp, *candidates)))
    if validation.hessian.cross() is None:
        return coefficients
    matrix, fitted = validation.hessian.value(), fit.hessian.value()
    samples = _samples(weights, fit, validation, fitted, matrix)
    best = math.inf, coefficients.alpha, coefficients.damp
    for damp in damps:
        try:
            quadratic, linear, constant = _parabola(
                samples, Factors(fitted, damp), matrix, coefficients.beta
            )
        except HessianError:  # not positive definite under this damp
            if len(damps) == 1:
                raise
            continue
        alpha, scale = coefficients.alpha, abs(constant)
        if "alpha" in coefficients.auto and quadratic > _NOISE * scale:
            alpha = min(max(linear / quadratic, 0.0), 1.0)
        error = constant + alpha * (alpha * quadratic - 2 * linear)
        if math.isinf(best[0]) or error < best[0] - _NOISE * scale:
            best = error, alpha, damp
    return Coefficients(best[1], coefficients.beta, best[2])


@dataclass(frozen=True)
class _Sample:
    """Rows of one weight, and what does not depend on damp: each (rows, K)."""

    dense: Tensor  # W0
    pull: Tensor  # W0 (C - H)
    target: Tensor  # W0 C' + E'
    start: Tensor  # W0 H'
    drift: Tensor | None  # E


def _samples(
    weights: Sequence[Tensor],
    fit: Moments,
    validation: Moments,
    fitted: Tensor,  # H
    matrix: Tensor,  # H'
) -> list[_Sample]:
    fit_cross, cross = fit.hessian.cross(), validation.hessian.cross()
    assert fit_cross is not None and cross is not None
    difference = fit_cross.sub_(fitted)
    samples = []
    with full_precision():
        for weight in weights:
            rows = torch.arange(0, len(weight), -(-len(weight) // _ROWS), device=weight.device)
            dense = weight[rows].float()
            target, drift = dense @ cross, None
            if fit.drift is not None and validation.drift is not None:
                target, drift = target + validation.drift[rows], fit.drift[rows]
            samples.append(_Sample(dense, dense @ difference, target, dense @ matrix, drift))
    return samples


def _parabola(
    samples: Sequence[_Sample],
    factors: Factors,  # of H, damped
    matrix: Tensor,  # H'
    beta: float,
) -> tuple[float, float, float]:
    """(q, l, c) of the error ``q alpha^2 - 2 l alpha + c``, up to what no fit can change."""
    quadratic = linear = constant = 0.0
    rows = [s.pull for s in samples] + [s.drift for s in samples if s.drift is not None]
    solved = factors.solve(factors.clear_dead(torch.cat(rows)))  # factored once for all
    steps = iter(solved.split([len(part) for part in rows]))
    with full_precision():
        for sample, step in [(sample, next(steps)) for sample in samples]:
            weight, given = sample.dense, sample.start
            if sample.drift is not None:
                weight = weight + beta * next(steps)
                given = weight @ matrix
            quadratic += _dot(step @ matrix, step)
            linear += _dot(step, sample.target - given)
            constant += _dot(given - 2 * sample.target, weight)
    return quadratic, linear, constant


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
