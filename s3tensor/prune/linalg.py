"""Linear algebra of the pruners: precision, least squares under a mask, inverses, many small systems.

Factorisations and refits run in full precision: with TF32's 10-bit mantissa a Cholesky of a calibration
Hessian fails, and a refit stops at a relative error near 1e-3. :func:`tensor_cores` allows TF32 where an
iteration corrects itself and only its mask is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from s3tensor.errors import HessianError
from s3tensor.modes import neutral

# Relative size of the preconditioned residual at which a row's refit has converged.
_CONVERGED = {torch.float32: 1e-5, torch.float64: 1e-12}
_NEARER = 0.03  # and the share of the residual at the start


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products in the precision of their inputs: no TF32, no bfloat16, no autocast, no autograd.

    The flags of the process are restored on leaving, also after an error.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(neutral())
        stack.callback(_set_precision, _set_precision(None))
        yield


@contextlib.contextmanager
def tensor_cores(
    x: Tensor,  # an operand of the products
) -> Iterator[None]:
    """Float32 products in TF32 where x lies on a CUDA device; elsewhere nothing changes."""
    if not x.is_cuda:
        yield
        return
    before = _set_precision(None)
    _set_precision(("high",) if len(before) == 1 else ("tf32", *before[1:]))
    try:
        yield
    finally:
        _set_precision(before)


def _set_precision(wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """Set the precision of float32 products, ``None`` for full precision; returns the one before."""
    known: Any = torch.backends  # untyped: its members differ by version
    if not hasattr(known.cuda.matmul, "fp32_precision"):
        # Before torch 2.9 one flag serves all backends.
        before: tuple[str, ...] = (torch.get_float32_matmul_precision(),)
        torch.set_float32_matmul_precision(*(wanted or ("highest",)))
        return before
    # Once a program has set these attributes the old function raises, so they come first.
    backends = (known.cuda.matmul, known.mkldnn.matmul)
    before = tuple(backend.fp32_precision for backend in backends)
    for backend, precision in zip(backends, wanted or ("ieee", "ieee"), strict=True):
        backend.fp32_precision = precision
    return before


def masked_least_squares(
    linear: Tensor,  # (M, K): G
    hessian: Tensor,  # (K, K), positive definite
    mask: Tensor,  # (M, K) bool
    start: Tensor,  # (M, K): where the iteration begins
    iterations: int = 200,
    tolerance: float | None = None,
) -> Tensor:
    """The minimiser of ``w H w' / 2 - g w'`` over the kept entries of each row: ``H_SS w_S = g_S``.

    Conjugate gradients with the diagonal as preconditioner, on all rows at once: an iteration is one
    (m, K) x (K, K) product of the m rows that have not converged. The loss falls in every iteration, so
    an early stop is safe. Rows affect each other by rounding only.

    Args:
        linear: the linear term G; ``W0 @ H`` refits towards the dense weight W0.
        hessian: damped, float32 or float64, the dtype of the others.
        mask: True where a weight is kept.
        start: first guess; entries outside the mask are ignored.
        iterations: upper bound.
        tolerance: a row has converged when its residual, in the norm of the preconditioner, is below
            this share of the norm of ``linear``, default 1e-5 in float32 and 1e-12 in float64, and below
            0.03 of the residual at ``start`` where the dtype resolves that.

    Returns:
        (M, K), zero outside the mask.
    """
    if tolerance is None:
        tolerance = _CONVERGED[linear.dtype]
    kept = mask.to(linear.dtype)
    inverse = hessian.diagonal().reciprocal()
    unit = inverse.sqrt()  # scale before squaring, so that squares stay in range
    largest = (linear * kept * unit).square().sum(1, keepdim=True)
    result = start * kept
    weight = result.clone()
    residual = (linear - weight @ hessian).mul_(kept)
    step = residual * inverse
    size = (residual * unit).square().sum(1, keepdim=True)
    # Where few weights are pruned, the start is nearly the solution and its residual far below linear.
    bound = torch.minimum(largest * tolerance**2, size * _NEARER**2)
    bound = torch.maximum(bound, largest * (8 * torch.finfo(linear.dtype).eps) ** 2)
    active = torch.arange(len(mask), device=mask.device)  # rows that have not converged
    for _ in range(iterations):
        open_ = (size > bound).squeeze(1).nonzero().squeeze(1)
        if len(open_) < len(active):
            result[active] = weight
            active, bound, kept, weight, residual, step, size = (
                x.index_select(0, open_)
                for x in (active, bound, kept, weight, residual, step, size)
            )
            if not len(active):
                break
        curved = (step @ hessian).mul_(kept)
        rate = size / (step * curved).sum(1, keepdim=True)
        weight.addcmul_(step, rate)
        residual.addcmul_(curved, rate, value=-1)
        scaled = residual * inverse
        previous, size = size, (residual * unit).square().sum(1, keepdim=True)
        step.mul_(size / previous).add_(scaled)
    result[active] = weight
    return result


# Inverses of H + rho I --------------------------------------------------------------------------------

_FOLLOWED = 4096  # up to this size three products are faster on a GPU than a Cholesky inverse
_STEP = 0.2  # largest relative change of rho for one Newton step from the last inverse


class ShiftedInverse:
    """``inv(H + rho I)`` for one rho after another.

    By Cholesky, which on a CPU takes the time of one (K, K) product. On a GPU its latency dominates, so a
    small matrix is *followed*: with X the inverse at the last rho and d the change, ``X - d X X`` is the
    next one up to ``(d / rho)^2``, and a Newton-Schulz step, ``X + X (I - A X)``, squares that error. An
    error of 1e-4 to 1e-3 remains and does not accumulate.

    Args:
        hessian: (K, K), positive semidefinite.
        follow: whether to follow; by default float32 on a CUDA device, up to 4096 inputs.
    """

    def __init__(self, hessian: Tensor, follow: bool | None = None) -> None:
        if follow is None:
            small = len(hessian) <= _FOLLOWED
            follow = hessian.is_cuda and hessian.dtype == torch.float32 and small
        self._hessian, self._follow = hessian, follow
        self._last: tuple[float, Tensor] | None = None

    def at(self, rho: float) -> Tensor:
        """The inverse (K, K) for this rho, > 0."""
        shifted = self._hessian.clone()
        shifted.diagonal().add_(rho)
        if self._last is not None and abs(rho / self._last[0] - 1.0) <= _STEP:
            last, inverse = self._last
            inverse = torch.addmm(inverse, inverse, inverse, alpha=last - rho)
            lack = (shifted @ inverse).neg_()
            lack.diagonal().add_(1.0)
            inverse = torch.addmm(inverse, inverse, lack)
        else:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted).L)
        if self._follow:
            self._last = rho, inverse
        return inverse


# Small systems, one for each block or scope ------------------------------------------------------------

_UNROLLED = 16  # up to this size a quadratic form by elimination beats a batched Cholesky


def quadratic(
    matrix: Tensor,  # (..., s, s), positive
    vectors: Tensor,  # (..., r, s)
) -> Tensor:
    """``sum_r v_r inv(matrix) v_r'`` of many small matrices: (...)."""
    size = matrix.shape[-1]
    if size > _UNROLLED:
        solved = torch.linalg.solve_triangular(
            cholesky(matrix), vectors.transpose(-1, -2), upper=False
        )
        return solved.square().sum((-1, -2))
    least = least_pivot(matrix.dtype)
    total = torch.zeros(matrix.shape[:-2], dtype=matrix.dtype, device=matrix.device)
    for pivot in range(size):
        inverse = matrix[..., 0, 0].clamp_min(least).reciprocal()
        total = total + vectors[..., 0].square().sum(-1) * inverse
        if pivot == size - 1:
            break
        row = matrix[..., 0, 1:] * inverse.unsqueeze(-1)
        vectors = vectors[..., 1:] - vectors[..., :1] * row.unsqueeze(-2)
        matrix = matrix[..., 1:, 1:] - matrix[..., 1:, :1] * row.unsqueeze(-2)
    return total


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factors of many matrices of diagonal at most 1; a ridge where rounding made one indefinite.

    Raises:
        HessianError: a matrix that no ridge up to 1 makes positive definite.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    ridge = torch.finfo(matrix.dtype).eps
    while bool(info.any()):
        ridge *= 16
        if ridge > 1:
            raise HessianError(
                "the inverse Hessian of a row's weights is not positive; raise damp, or give the "
                "Hessian in float64"
            )
        bad = info != 0
        again = matrix[bad]
        again.diagonal(dim1=-2, dim2=-1).add_(ridge)
        found, left = torch.linalg.cholesky_ex(again)
        lower[bad] = found
        info = info.clone()
        info[bad] = left
    return lower


def spd_inverse(matrix: Tensor) -> Tensor | None:
    """The inverse of a positive definite (K, K), or None; computed in float64 where the device has it.

    Pruning moves weights along the eigenvectors of its largest eigenvalues, which float32 does not resolve.
    """
    wide = matrix if matrix.device.type == "mps" else matrix.double()
    scale = wide.diagonal().rsqrt()
    factor, info = torch.linalg.cholesky_ex(wide * scale[:, None] * scale)
    if int(info):
        return None
    inverse = torch.cholesky_inverse(factor) * scale[:, None] * scale
    return inverse.to(matrix.dtype)


def least_pivot(dtype: torch.dtype) -> float:
    """Below this a pivot of a matrix with a unit diagonal is rounding error."""
    return torch.finfo(dtype).eps
