"""The shares of a run: alpha, beta and damp, as they are given or, linear by linear, as calibration tells.

Without a mask the fit of the linears of one input is ``W = W0 + alpha D + beta B``: of the moments H, the
cross term C and the drift E of some calibration tokens, ``D = W0 (C - H) P`` and ``B = E P``, P the inverse
of the damped H. On other tokens, of moments H', C', E', what it misses of the dense model's outputs is
``tr(W H' W') - 2 tr(W (W0 C' + E')')`` and a constant: a parabola in alpha, whose least point is known. Its
height tells of two damps which one is better. Unless damp is given it is chosen so, where that can be done.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from s3tensor import prune
from s3tensor.errors import HessianError, PrunerError
from s3tensor.llm.moments import Moments
from s3tensor.prune.hessian import Factors
from s3tensor.prune.linalg import full_precision

DEFAULT_ALPHA = 0.5  # best of five on development text with SmolLM2-135M (docs/pruners.md)
DEFAULT_DAMP = 0.01  # where it is not chosen
DAMPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # that damp="auto" tries
_ROWS = 256  # of each weight that choose, evenly spaced: what is missed is a sum over rows
_NOISE = 1e-10  # of the square of the outputs: what is less is rounding
_EVERY = 8  # one calibration sequence of so many is kept from the fit that chooses


@dataclass(frozen=True)
class Shares:
    """What a group of linears is pruned with; of a whole run, what it starts from."""

    alpha: float
    beta: float
    damp: float
    auto: frozenset[str] = frozenset()  # "alpha", "damp": which of them are chosen for each group


def check_options(
    pruner: str,
    alpha: float | Literal["auto"] | None = None,
    damp: float | Literal["auto"] | None = None,
    beta: float | None = None,
) -> None:
    """Refuse what :func:`~s3tensor.llm.prune_model` would refuse without a model.

    Raises:
        PrunerError: an unknown pruner, a number out of range, alpha for a pruner without target, beta for one
            without drift or without a dense target, damp="auto" without a dense target.
    """
    accepts = inspect.signature(prune.get(pruner)).parameters
    for name, share in (("damp", damp), ("alpha", alpha)):
        if isinstance(share, str) and share != "auto":
            raise PrunerError(f"{name}={share!r} must be a number or 'auto'")
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
        raise PrunerError(f"beta={beta} must be from 0 (no drift is taken back) to 1 (all of it)")
    if beta and (alpha == 0 or "drift" not in accepts):
        which = (
            "takes no drift" if "drift" not in accepts else "takes drift beside a dense target only"
        )
        raise PrunerError(f"pruner {pruner!r} {which}; leave beta out or use 'admm' with alpha > 0")


def shares_of(
    pruner: str,
    alpha: float | Literal["auto"] | None,
    beta: float | None,
    damp: float | Literal["auto"] | None,
    options: dict[str, Any],
) -> Shares:
    """Defaults filled in, a damp of None chosen with a dense target; TypeError for an unknown option."""
    accepts = inspect.signature(prune.get(pruner)).parameters
    unknown = sorted(set(options) - set(accepts))
    if unknown:
        known = [name for name in accepts if name not in ("weight", "hessian", "pattern")]
        raise TypeError(
            f"pruner {pruner!r} has no option {unknown[0]!r}; it has {', '.join(known)}"
        )
    auto = {name for name, given in (("alpha", alpha), ("damp", damp)) if given == "auto"}
    if alpha is None or isinstance(alpha, str):
        alpha = DEFAULT_ALPHA if "target" in accepts else 0.0
    if beta is None:
        beta = alpha if "drift" in accepts else 0.0
    if damp is None and alpha > 0:
        auto.add("damp")
    if damp is None or isinstance(damp, str):
        damp = DEFAULT_DAMP
    return Shares(alpha, beta, damp, frozenset(auto))


def parted(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[int]]]:
    """The batches cut so that every eighth sequence, the last one too, is in batches of its own.

    Returns:
        The batches, and the indices of those to fit on and of those to choose by.

    Raises:
        PrunerError: fewer than two sequences.
    """
    count = sum(len(batch) for batch in batches)
    if count < 2:
        raise PrunerError(
            f"'auto' keeps some calibration sequences from the fit to choose by, and there are {count}; give "
            "at least 2, or a number"
        )
    found: list[Tensor] = []
    fit: list[int] = []
    check: list[int] = []
    left = count
    for batch in batches:
        start = 0
        for row in range(len(batch)):
            left -= 1
            if left % _EVERY:
                continue
            if row > start:
                fit.append(len(found))
                found.append(batch[start:row])
            check.append(len(found))
            found.append(batch[row : row + 1])
            start = row + 1
        if start < len(batch):
            fit.append(len(found))
            found.append(batch[start:])
    return found, [fit, check]


def chosen(
    weights: Sequence[Tensor],  # (M, K) each, of one input
    fit: Moments,
    check: Moments,
    shares: Shares,
) -> Shares:
    """Alpha and damp for these linears, those of ``shares.auto`` chosen by the tokens of ``check``.

    What these tokens do not tell stays as it is in ``shares``: alpha where the fit does not depend on it, for
    want of a difference between the dense and the pruned stream.
    """
    damps = list(dict.fromkeys((shares.damp, *(DAMPS if "damp" in shares.auto else ()))))
    if check.hessian.cross() is None:
        return shares
    matrix, known = check.hessian.value(), fit.hessian.value()
    samples = _samples(weights, fit, check, known, matrix)
    best = math.inf, shares.alpha, shares.damp
    for damp in damps:
        try:
            quadratic, linear, constant = _parabola(
                samples, Factors(known, damp), matrix, shares.beta
            )
        except HessianError:  # not positive definite under this damp
            if len(damps) == 1:
                raise
            continue
        alpha, scale = shares.alpha, abs(constant)
        if "alpha" in shares.auto and quadratic > _NOISE * scale:
            alpha = min(max(linear / quadratic, 0.0), 1.0)
        missed = constant + alpha * (alpha * quadratic - 2 * linear)
        if math.isinf(best[0]) or missed < best[0] - _NOISE * scale:
            best = missed, alpha, damp
    return Shares(best[1], shares.beta, best[2])


@dataclass(frozen=True)
class _Sample:
    """Rows of one weight, and what does not depend on damp: each (rows, K)."""

    dense: Tensor  # W0
    pull: Tensor  # W0 (C - H)
    wanted: Tensor  # W0 C' + E'
    given: Tensor  # W0 H'
    drift: Tensor | None  # E


def _samples(
    weights: Sequence[Tensor],
    fit: Moments,
    check: Moments,
    known: Tensor,  # H of the fit
    matrix: Tensor,  # H' of the tokens that choose
) -> list[_Sample]:
    seen, cross = fit.hessian.cross(), check.hessian.cross()
    assert seen is not None and cross is not None
    apart = seen.sub_(known)
    found = []
    with full_precision():
        for weight in weights:
            rows = torch.arange(0, len(weight), -(-len(weight) // _ROWS), device=weight.device)
            dense = weight[rows].float()
            wanted, drift = dense @ cross, None
            if fit.drift is not None and check.drift is not None:
                wanted, drift = wanted + check.drift[rows], fit.drift[rows]
            found.append(_Sample(dense, dense @ apart, wanted, dense @ matrix, drift))
    return found


def _parabola(
    samples: Sequence[_Sample],
    factors: Factors,  # of the fit, damped
    matrix: Tensor,  # H' of the tokens that choose
    beta: float,
) -> tuple[float, float, float]:
    """(q, l, c) of what is missed, ``q alpha^2 - 2 l alpha + c``, but for what no fit can change."""
    quadratic = linear = constant = 0.0
    rows = [s.pull for s in samples] + [s.drift for s in samples if s.drift is not None]
    solved = factors.solve(factors.clear_dead(torch.cat(rows)))  # factored once for all
    ways = iter(solved.split([len(part) for part in rows]))
    with full_precision():
        for sample, way in [(sample, next(ways)) for sample in samples]:
            start, given = sample.dense, sample.given
            if sample.drift is not None:
                start = start + beta * next(ways)
                given = start @ matrix
            quadratic += _dot(way @ matrix, way)
            linear += _dot(way, sample.wanted - given)
            constant += _dot(given - 2 * sample.wanted, start)
    return quadratic, linear, constant


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
