"""The Hessian of a layer's output error: accumulated, checked, damped and factored.

For a linear ``y = W x`` and inputs X (N, K), the squared error of the output is
``||X (W - W0)'||^2 / N = tr(dW H dW')`` with ``H = X'X / N`` (OBS; SparseGPT, arXiv 2301.00774, eq. 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s3tensor.errors import HessianError, NonFiniteError, NonFiniteHessianError
from s3tensor.modes import neutral
from s3tensor.prune.linalg import full_precision

# Default damping, by use: the share of the mean diagonal of H added to the diagonal (docs/pruners.md).
DAMP = 0.01  # SparseGPT's own, and enough for a whole model
DAMP_EXACT = 0.001  # obs and refit: with few tokens it generalises better than less
DAMP_ADMM = 0.0004  # admm: a lower error on the Hessian that it is given
DAMP_PAPER = 1e-4  # StructuredOBS: that of the reference implementation

# Inputs are widened to float32 this many tokens at a time: 16 MiB at 1024 features.
_TOKENS = 4096


class Hessian:
    """Second moments of a layer's inputs, summed batch by batch in float32.

    Args:
        in_features: K, the size of the last dim of the inputs.
        device: where the sums are kept and made; default is the device of the first batch.

    Example:
        >>> h = Hessian(4)
        >>> h.update(torch.ones(2, 3, 4))
        >>> h.samples, h.value()[0, 0].item()
        (6, 1.0)
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        if in_features < 1:
            raise HessianError(f"in_features={in_features} must be >= 1")
        self.in_features = in_features
        self.samples = 0
        self.weight = 0.0  # sum of the tokens' weights: N of X'X / N
        self._device = None if device is None else torch.device(device)
        self._sum: Tensor | None = None  # (K, K)
        self._cross: Tensor | None = None  # (K, K), rows are the dense model's inputs

    @neutral()
    def update(
        self,
        x: Tensor,  # (..., in_features), any floating dtype
        dense: Tensor | None = None,  # the same shape
        weights: Tensor | None = None,  # (tokens,) >= 0
    ) -> None:
        """Add the tokens of one batch.

        Args:
            x: the layer's inputs.
            dense: the dense model's inputs of this layer for the same tokens; adds to the cross term
                ``X_dense'X``. Give it with every batch or with none.
            weights: how much each token counts, in one unit for all batches; default 1.

        Raises:
            HessianError: a wrong size or dtype, or a cross term that only some batches have.
            NonFiniteError: NaN or Inf in the inputs; nothing of the batch is added.
        """
        self._check(x, "x")
        if dense is not None:
            self._check(dense, "dense")
            if dense.shape != x.shape:
                raise HessianError(
                    f"dense inputs of shape {tuple(dense.shape)} for inputs of shape {tuple(x.shape)}; "
                    "give both for the same tokens"
                )
        if self.samples and (dense is None) != (self._cross is None):
            raise HessianError(
                "the cross term needs the dense inputs of every batch; give dense= with all updates "
                "or with none"
            )
        rows = x.detach().reshape(-1, self.in_features)
        if not len(rows):
            return
        others = None if dense is None else dense.detach().reshape(-1, self.in_features)
        for name, values in (("inputs", rows), ("dense inputs", others), ("weights", weights)):
            if values is not None and not bool(torch.isfinite(values).all()):
                raise NonFiniteError(
                    f"the {name} of this layer hold NaN or Inf (float16 overflows at 65504: calibrate "
                    "in bfloat16 or float32)"
                )
        if weights is not None and (weights.shape != rows.shape[:1] or bool((weights < 0).any())):
            raise HessianError(
                f"weights of shape {tuple(weights.shape)} for {len(rows)} tokens; give one for each, >= 0"
            )
        total = self._begin(x.device, cross=dense is not None)
        with full_precision():
            for start in range(0, len(rows), _TOKENS):
                tokens = slice(start, start + _TOKENS)
                part = rows[tokens].to(self._device, torch.float32)
                heavy = part
                if weights is not None:
                    heavy = part * weights[tokens, None].to(part)
                total.addmm_(part.T, heavy)
                if others is not None and self._cross is not None:
                    self._cross.addmm_(others[tokens].to(self._device, torch.float32).T, heavy)
        self.samples += len(rows)
        self.weight += len(rows) if weights is None else float(weights.sum(dtype=torch.float64))

    @neutral()
    def merge(self, other: Hessian) -> None:
        """Add the tokens of another Hessian, which does not change.

        Raises:
            HessianError: other ``in_features``, or only one of them with a cross term.
        """
        if other.in_features != self.in_features:
            raise HessianError(
                f"a Hessian of {other.in_features} features cannot be added to one of {self.in_features}"
            )
        if other._sum is None:
            return
        if self._sum is not None and (self._cross is None) != (other._cross is None):
            raise HessianError(
                "one of two Hessians has a cross term; give dense= to both or to none"
            )
        total = self._begin(other._sum.device, cross=other._cross is not None)
        total += other._sum.to(total.device)
        if self._cross is not None and other._cross is not None:
            self._cross += other._cross.to(self._cross.device)
        self.samples += other.samples
        self.weight += other.weight

    def _begin(self, device: torch.device, cross: bool) -> Tensor:
        """The sum (K, K), with the first tokens made on the chosen device, or on theirs."""
        self._device = self._device or device
        if self._sum is None:
            size = (self.in_features, self.in_features)
            self._sum = torch.zeros(size, dtype=torch.float32, device=self._device)
            self._cross = torch.zeros_like(self._sum) if cross else None
        return self._sum

    @neutral()
    def value(self) -> Tensor:
        """``X'X / N`` (K, K), float32, symmetric to the last bit; with weights ``X'diag(w)X / sum(w)``.

        Raises:
            HessianError: before any token, or where all weights are zero.
        """
        if self._sum is None:
            raise HessianError("no inputs were seen yet; call update(x) before value()")
        self._check_weight()
        value = (self._sum + self._sum.T).div_(2 * self.weight)
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteHessianError(
                "squares of the inputs are beyond float32: scale the inputs, or give H in float64"
            )
        return value

    @neutral()
    def cross(self) -> Tensor | None:
        """``X_dense'X / N`` (K, K), float32; None without dense inputs."""
        if self._cross is None:
            return None
        self._check_weight()
        return self._cross / self.weight

    def _check_weight(self) -> None:
        if not self.weight:
            raise HessianError(
                "all tokens have weight 0; give some more than 0 in update(weights=)"
            )

    def _check(self, x: Tensor, name: str) -> None:
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise HessianError(
                f"{name} of shape {tuple(x.shape)} for a Hessian of {self.in_features} features; its "
                "last dim must be in_features"
            )
        if not x.dtype.is_floating_point:
            raise HessianError(f"{name} has dtype {x.dtype}; inputs must be floating")


@neutral()
def compute_hessian(
    x: Tensor, device: torch.device | str | None = None, batch_size: int = _TOKENS
) -> Tensor:
    """``X'X / N`` (K, K) in float32 of inputs ``x`` (..., K).

    Args:
        x: inputs, on any device.
        device: where the Hessian is made; default is that of ``x``.
        batch_size: tokens that are moved there and added at a time.

    Raises:
        HessianError, NonFiniteError: as :meth:`Hessian.update`; HessianError also for a batch_size below 1.
    """
    if x.ndim < 1:
        raise HessianError("inputs need at least one dim, (..., in_features)")
    if batch_size < 1:
        raise HessianError(f"batch_size={batch_size} tokens must be >= 1")
    hessian = Hessian(x.shape[-1], device)
    for tokens in x.reshape(-1, x.shape[-1]).split(batch_size):
        hessian.update(tokens)
    return hessian.value()


@neutral()
def output_error(
    pruned: Tensor,  # (M, K)
    weight: Tensor,  # (M, K)
    hessian: Tensor,  # (K, K), undamped
    N: int | None = None,
) -> float:
    """Relative error of a layer's output, ``sqrt(tr(dW H dW') / tr(W H W'))`` with ``dW = pruned - weight``.

    With ``N``, the number of tokens, it is the absolute one, ``sqrt(N tr(dW H dW')) = ||X dW'||_F``.
    The products run in the Hessian's dtype and the sums in float64. 0 is exact; dropping every weight
    gives 1. Where the dense output is zero the relative error is 0 if the pruned output is zero too, else
    inf.

    Raises:
        HessianError: shapes that do not match, a Hessian that is not a floating square matrix, or N < 1.
    """
    if N is not None and N < 1:
        raise HessianError(f"N={N} tokens must be >= 1; leave N out for the relative error")
    if pruned.shape != weight.shape or weight.ndim != 2:
        raise HessianError(
            f"weights of shapes {tuple(pruned.shape)} and {tuple(weight.shape)} must be one (M, K) shape"
        )
    _check_square(hessian, weight.shape[1])
    h = hessian if hessian.dtype == torch.float64 else hessian.float()
    with full_precision():
        # Scale by a power of two, so that no product overflows or underflows.
        unit = 2.0 ** -min(max(_exponent(weight) + _exponent(h.diagonal()) // 2, -126), 126)
        wide = torch.promote_types(weight.dtype, h.dtype)
        dense = weight.detach().to(h.device, wide).mul(unit).to(h.dtype)
        lost = _energy(pruned.detach().to(h.device, wide).mul(unit).to(h.dtype) - dense, h)
        total = _energy(dense, h)
    if N is not None:
        return math.sqrt(N * max(lost, 0.0)) / unit
    if total <= 0:
        return 0.0 if lost <= 0 else math.inf
    return math.sqrt(max(lost, 0.0) / total)


def _exponent(x: Tensor) -> int:
    """The least n with all magnitudes below 2**n; 0 where the largest is zero or not finite."""
    largest = float(x.detach().abs().amax()) if x.numel() else 0.0
    return math.frexp(largest)[1] if math.isfinite(largest) else 0


def _energy(rows: Tensor, hessian: Tensor) -> float:
    return float((rows @ hessian).mul_(rows).sum(dtype=torch.float64))


class Factors:
    """One damped Hessian and its factorisations, each made when first needed and then kept.

    Linears that share an input (q, k and v; gate and up) share one ``Factors``: every pruner takes it
    in place of the Hessian. Memory: the damped matrix, and K x K more for each factorisation in use.

    An input that is always zero (``H_jj = 0``) is *dead*: no data determines its weights. Its row and
    column are cleared, its diagonal is set to 1, and pruners set its weights to zero.

    Squares and inverses of values near the ends of a dtype leave it. A Hessian whose largest diagonal lies
    outside 2^-60 to 2^60 is therefore divided by a power of four, ``unit``, which is 1 for all others: so are
    ``matrix``, ``diagonal``, ``ridge`` and what is factored from them. No pruner depends on the scale of H.

    Args:
        hessian: ``X'X / N`` (K, K), undamped; float64 stays, other dtypes become float32.
        damp: ``damp * mean(diag H)`` (the mean over live inputs) is added to the diagonal.

    Raises:
        HessianError: not square, not symmetric, a negative diagonal, NaN or Inf, a negative damp; and
            by a factorisation, when the damped matrix is not positive definite.
    """

    @neutral()
    def __init__(self, hessian: Tensor, damp: float = DAMP) -> None:
        _check_square(hessian, None)
        if isinstance(damp, str) or not 0.0 <= damp < math.inf:
            raise HessianError(f"damp={damp!r} must be a finite share >= 0 of the mean diagonal")
        h = hessian.detach()
        h = h if h.dtype == torch.float64 else h.float()
        _check_values(h)
        self.damp = damp
        self.unit = _unit(h)
        h = h / self.unit if self.unit != 1 else h
        self.dead = h.diagonal() == 0  # (K,) bool
        self.has_dead = bool(self.dead.any())
        live = (~self.dead).sum().clamp_min(1)
        self.ridge = damp * h.diagonal().sum() / live  # 0-dim: what damping adds to the diagonal
        # (K,) undamped: mean squared inputs; zero for dead ones
        self.diagonal = h.diagonal().clone()
        self.matrix = (h + h.T).mul_(0.5)  # (K, K), damped
        self.matrix.diagonal().add_(self.ridge)
        if self.has_dead:
            self.matrix[self.dead] = 0.0
            self.matrix[:, self.dead] = 0.0
            self.matrix.diagonal()[self.dead] = 1.0
        self._inverse: Tensor | None = None
        self._cholesky: tuple[Tensor | None, Tensor] | None = None
        self._moved: dict[tuple[torch.dtype, torch.device], Factors] = {}

    @property
    def in_features(self) -> int:
        """K."""
        return self.matrix.shape[0]

    @property
    def scale(self) -> Tensor:
        """``sqrt(diag)`` of the damped matrix (K,): Jacobi scaling."""
        return self.matrix.diagonal().sqrt()

    @neutral()
    def to(self, dtype: torch.dtype, device: torch.device) -> Factors:
        """The same factors in a dtype on a device: itself when nothing changes, else a copy that is kept."""
        if (dtype, device) == (self.matrix.dtype, self.matrix.device):
            return self
        if (dtype, device) not in self._moved:
            moved = object.__new__(Factors)
            moved.damp, moved.has_dead, moved.unit = self.damp, self.has_dead, self.unit
            moved.dead = self.dead.to(device)
            moved.ridge = self.ridge.to(device, dtype)
            moved.diagonal = self.diagonal.to(device, dtype)
            moved.matrix = self.matrix.to(device, dtype)
            _check_values(moved.matrix)
            moved._inverse = moved._cholesky = None
            moved._moved = {}
            self._moved[dtype, device] = moved
        return self._moved[dtype, device]

    def clear_dead(self, columns: Tensor) -> Tensor:
        """A copy of (M, K) with the dead inputs' columns at zero; itself when no input is dead."""
        return columns.masked_fill(self.dead, 0.0) if self.has_dead else columns

    @neutral()
    def inverse(self) -> Tensor:
        """The inverse of the damped matrix (K, K).

        Raises:
            HessianError: the matrix is singular or indefinite.
        """
        if self._inverse is None:
            unscale = self.scale.reciprocal()
            with full_precision():
                # At unit diagonal, which is where a float32 Cholesky holds the most.
                unit = torch.cholesky_inverse(self._lower(self.matrix * unscale[:, None] * unscale))
                self._inverse = unit.mul_(unscale[:, None]).mul_(unscale)
        return self._inverse

    @neutral()
    def solve(self, rows: Tensor) -> Tensor:
        """``rows`` (M, K) times the inverse, without forming it: for few rows a sixth of the work.

        Raises:
            HessianError: the matrix is singular or indefinite.
        """
        unscale = self.scale.reciprocal()
        with full_precision():
            lower = self._lower(self.matrix * unscale[:, None] * unscale)
            found = torch.cholesky_solve((rows * unscale).T, lower)
        return found.T * (unscale / self.unit)

    @neutral()
    def inverse_cholesky(self, order: Tensor | None = None) -> Tensor:
        """Upper U (K, K) with ``inv(matrix) = U'U``, rows and columns in ``order`` (default: as they are).

        Row ``U[j, j:]`` is what SparseGPT (arXiv 2301.00774, section 3.3) needs once the columns before j
        are fixed. It comes from a Cholesky factor of the matrix in reverse order, ``H = R R'`` with R
        upper: ``U = inv(R)``, and the inverse of H is never formed.

        Raises:
            HessianError: the matrix is singular or indefinite.
        """
        kept = self._cholesky
        if kept is not None and (
            (kept[0] is None and order is None)
            or (kept[0] is not None and order is not None and torch.equal(kept[0], order))
        ):
            return kept[1]
        matrix = self.matrix if order is None else self.matrix[order][:, order]
        with full_precision():
            lower = self._lower(matrix.flip(0, 1))
            eye = torch.eye(self.in_features, dtype=matrix.dtype, device=matrix.device)
            upper = torch.linalg.solve_triangular(lower.flip(0, 1).contiguous(), eye, upper=True)
        self._cholesky = order, upper
        return upper

    def _lower(self, matrix: Tensor) -> Tensor:
        """The Cholesky factor of the damped matrix, scaled or permuted."""
        lower, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise self.indefinite(f" (Cholesky stopped at {int(info)} of {self.in_features})")
        return lower

    def indefinite(self, where: str = "") -> HessianError:
        """The error for a damped Hessian that cannot be factored."""
        return HessianError(
            f"the damped Hessian of {self.in_features} inputs is not positive definite{where}; with fewer "
            f"samples than inputs it is singular: raise damp ({self.damp}) or calibrate on more tokens"
        )


def as_factors(hessian: Tensor | Factors, damp: float) -> Factors:
    """A Hessian with its damping applied; ``Factors`` bring their own."""
    return hessian if isinstance(hessian, Factors) else Factors(hessian, damp)


def _unit(h: Tensor) -> float:
    """The power of four by which a Hessian is divided."""
    largest = float(h.diagonal().amax())
    if largest == 0 or 2.0**-60 <= largest <= 2.0**60:
        return 1.0
    if largest < torch.finfo(h.dtype).tiny:
        raise HessianError(
            f"the largest diagonal of the Hessian is {largest:.3g}, below the normal numbers of {h.dtype}: "
            "scale the inputs, or give H in float64"
        )
    return 4.0 ** math.floor(math.log(largest, 4))


def _check_square(hessian: Tensor, in_features: int | None) -> None:
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or not hessian.numel():
        raise HessianError(
            f"a Hessian is square, (in_features, in_features), got {tuple(hessian.shape)}; make it with "
            "Hessian.update or compute_hessian"
        )
    if in_features is not None and hessian.shape[0] != in_features:
        raise HessianError(
            f"Hessian of {hessian.shape[0]} inputs for a weight of {in_features} in_features; they must "
            "be equal"
        )
    if not hessian.dtype.is_floating_point:
        raise HessianError(f"a Hessian must be floating, got {hessian.dtype}")


def _check_values(h: Tensor) -> None:
    if not bool(torch.isfinite(h).all()):
        raise NonFiniteHessianError(
            "the Hessian holds NaN or Inf; accumulate it in float32 from finite inputs"
        )
    diagonal = h.diagonal()
    least, largest = float(diagonal.min()), float(diagonal.max())
    if least < 0:
        raise HessianError(
            f"the Hessian has {least:.3g} on its diagonal; mean squares are never negative: pass X'X/N"
        )
    skew = float((h - h.T).abs().amax())
    if skew > 1e-3 * largest:
        raise HessianError(
            f"the Hessian is not symmetric: entries differ from their mirror by up to {skew:.3g} "
            f"(largest diagonal {largest:.3g}); pass X'X/N, or (H + H')/2"
        )
    # Cauchy-Schwarz, with 1e-3 for rounding: |H_ij| <= sqrt(H_ii H_jj) for every sum of x'x.
    limit = diagonal.sqrt()
    excess = float((h.abs() - 1.001 * limit[:, None] * limit).amax())
    if excess > 1e-6 * largest:
        raise HessianError(
            f"the Hessian is indefinite: an entry exceeds sqrt(H_ii H_jj) by {excess:.3g}; pass X'X/N"
        )
