"""``StructuredOBS``: the paper's pruner over the paper's vocabulary, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from s3tensor.errors import HessianError, PatternError, PrunerError
from s3tensor.paper import BlockSpec, ScopeSpec
from s3tensor.paper.view import memory
from s3tensor.prune.hessian import DAMP_PAPER, Factors
from s3tensor.prune.linalg import full_precision
from s3tensor.prune.obs import inverse_of, sweep
from s3tensor.prune.oneshot import one_shot
from s3tensor.prune.problem import MEMORY_BUDGET, Problem, fit, pose
from s3tensor.prune.product import Product


class StructuredOBS:
    """Structured OBS of one linear's weight, in place (S3, arXiv 2604.11315, section 5).

    :func:`s3tensor.prune.obs` is the same without side effects. A call that raises writes nothing.

    Args:
        scope: scopes over the blocks of one weight, (out_features, in_features).
        hessian: ``X'X / N`` (K, K) of its inputs, or ``Factors`` made from it, which bring their damping.
        damp: share of the mean diagonal added to the diagonal.
        inv_h: the damped inverse (K, K), where it is known already.
        memory_budget: bytes of working memory.

    Example:
        >>> weight, inputs = torch.nn.Parameter(torch.randn(8, 16)), torch.randn(64, 16)
        >>> scope = ScopeSpec(BlockSpec(weight, shape=(1, 1)), shape=(1, 4))
        >>> StructuredOBS(scope, inputs.T @ inputs / 64).prune_true_obs(nnz=2)
        >>> int((weight != 0).sum())
        64

    Raises:
        PatternError: a scope over several tensors, over a weight that is not a matrix, or over a view that
            no Pattern describes (see :meth:`s3tensor.ScopeSpec.pattern`).
        HessianError: an invalid Hessian, or one that does not fit.
    """

    def __init__(
        self,
        scope: ScopeSpec,
        hessian: Tensor | Factors,
        damp: float = DAMP_PAPER,
        inv_h: Tensor | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        if not isinstance(scope, ScopeSpec) or not isinstance(scope.block, BlockSpec):
            raise PatternError(
                f"StructuredOBS prunes one weight, and {scope!r:.200} spans several tensors or is no "
                "ScopeSpec; prune coupled tensors by their norms, or one by one"
            )
        self.scope, self.memory_budget = scope, memory_budget
        self._param = scope.block.view.param
        problem = self._pose(scope.numblk_per_scope())
        self.factors = fit(problem, hessian, damp, "StructuredOBS")
        self._inverse = None if inv_h is None else self._checked(inv_h)

    @staticmethod
    def compute_inverse(hessian: Tensor, damp: float = DAMP_PAPER) -> Tensor:
        """The inverse (K, K) of ``hessian + damp mean(diag) I``, for ``inv_h=``.

        Raises:
            HessianError: an invalid Hessian, or a damped matrix that is singular or indefinite.
        """
        factors = Factors(hessian, damp)
        with full_precision():
            return inverse_of(factors) / factors.unit

    @property
    def inv_h(self) -> Tensor:
        """The damped inverse (K, K), made when first needed."""
        return self._scaled_inverse() / self.factors.unit

    def _scaled_inverse(self) -> Tensor:
        """The inverse of the matrix of ``factors``, which may be in another unit than the Hessian given."""
        if self._inverse is None:
            with full_precision():
                self._inverse = inverse_of(self.factors)
        return self._inverse

    @overload
    def prune(
        self,
        nnz: int,
        compensate: str = "local",
        n_splits: int = 1,
        block_size: int | None = None,
    ) -> None: ...
    @overload
    def prune(
        self, nnz: int, block_size: int, compensate: str = "local", n_splits: int = 1
    ) -> None: ...
    def prune(self, nnz: int, *options: Any, **named: Any) -> None:
        """Keep ``nnz`` blocks of every scope, chosen at once; see :func:`s3tensor.prune.oneshot.one_shot`.

        Args:
            nnz: blocks to keep in each scope.
            *options: ``compensate`` (``local``, ``full``, ``split`` or ``interleaved``) and ``n_splits``
                (of ``interleaved``); before them ``block_size``, which is accepted and not needed:
                ``memory_budget`` says how many columns are searched at once.
            **named: the same by name.

        Raises:
            PatternError, NonFiniteError: an invalid budget or weight.
            PrunerError: an unknown option.
        """
        compensate, n_splits = _chosen(options, named)
        problem = self._pose(nnz)
        product = Product.of(problem.bound).to(problem.dense.device)
        with full_precision():
            dense = self.factors.clear_dead(problem.dense)
            result, mask = one_shot(
                dense,
                self._scaled_inverse(),
                self.factors,
                product,
                compensate,
                n_splits,
                self.memory_budget,
            )
        self._write(problem, result, mask)

    def prune_true_obs(
        self,
        nnz: int,
        ng: int = 64,
        chunk_size: int = 16,
        order: str = "left_to_right",
        scoring: str = "independent",
        c_dtype: torch.dtype | None = None,
        progress_fn: Callable[[str], None] | None = None,
    ) -> None:
        """Keep ``nnz`` blocks of every scope, with an inverse Hessian for every row.

        Args:
            nnz: blocks to keep in each scope.
            ng: scopes of a row that are decided at once; fewer are slower and better.
            chunk_size: rows at a time, at least those of one scope; it changes memory, and results only
                by rounding.
            order: ``left_to_right`` or ``largest_first``, see :func:`s3tensor.prune.obs`.
            scoring: ``independent`` or ``joint``.
            c_dtype: dtype of the factor of every row; default float32, float64 for a float64 weight. The
                weights are refitted at the end, so a narrow one affects masks only.
            progress_fn: called with a line of text after every chunk.

        Raises:
            PatternError, NonFiniteError: an invalid budget or weight.
            PrunerError: an unknown option.
        """
        problem = self._pose(nnz)
        if chunk_size < 1:
            raise PatternError(f"chunk_size={chunk_size} rows at a time; it must be >= 1")
        if c_dtype is not None and not c_dtype.is_floating_point:
            raise PrunerError(f"c_dtype={c_dtype} must be a floating-point dtype")

        def tell(done: int, total: int) -> None:
            if progress_fn is not None:
                progress_fn(f"{done} of {total} rows")

        matrix = self.factors.matrix
        with full_precision():
            dense = self.factors.clear_dead(problem.dense)
            result, mask = sweep(
                dense,
                self._scaled_inverse(),
                matrix,
                problem.bound,
                ng=ng,
                order=order,
                scoring=scoring,
                rows_at_once=chunk_size,
                dtype=c_dtype,
                memory_budget=self.memory_budget,
                progress=tell,
            )
            problem.least_squares(
                lambda part: dense[part] @ matrix,
                matrix,
                mask,
                result,
                self.memory_budget,
                out=result,
            )
        self._write(problem, result, mask)

    def _pose(self, nnz: int) -> Problem:
        return pose(memory(self._param), self.scope.pattern(nnz))

    def _write(self, problem: Problem, result: Tensor, mask: Tensor) -> None:
        pruned = problem.finish(self.factors.clear_dead(result), mask).weight
        with torch.no_grad():
            memory(self._param).copy_(pruned)

    def _checked(self, inv_h: Tensor) -> Tensor:
        size = self.factors.matrix.shape
        if inv_h.shape != size:
            raise HessianError(
                f"inv_h of shape {tuple(inv_h.shape)} beside a Hessian of {tuple(size)}"
            )
        inverse = inv_h.detach().to(self.factors.matrix) * self.factors.unit
        if not bool(torch.isfinite(inverse).all()) or not bool((inverse.diagonal() > 0).all()):
            raise HessianError(
                "inv_h holds NaN or Inf, or no positive diagonal; make it with compute_inverse"
            )
        return inverse


def _chosen(options: tuple[Any, ...], named: dict[str, Any]) -> tuple[str, int]:
    """``compensate`` and ``n_splits`` of a call in our order of arguments or in the reference's."""

    def ours(compensate: str = "local", n_splits: int = 1, block_size: object = None) -> Any:
        return compensate, n_splits

    def reference(block_size: int, compensate: str = "local", n_splits: int = 1) -> Any:
        return compensate, n_splits

    taken = reference if options and isinstance(options[0], int) else ours
    try:
        return taken(*options, **named)
    except TypeError as error:
        raise TypeError(str(error).replace(taken.__qualname__, "StructuredOBS.prune")) from None
