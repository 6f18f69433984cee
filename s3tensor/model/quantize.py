"""``quantize_``: int8 values for the compressed weights of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from s3tensor.errors import ModelError
from s3tensor.model.weights import Held, parameters_of
from s3tensor.tensor.int8 import Int8SparseTensor
from s3tensor.tensor.sparse import StructuredSparseTensor


@dataclass(frozen=True)
class QuantizeRow:
    """What became of one weight."""

    name: str
    pattern: str
    before: int  # bytes of the compressed weight, copies for speed included
    after: int
    dense: int  # bytes of the dense weight in this dtype
    error: float  # relative to the weight, Frobenius norms


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize_` did; ``str`` sums it up."""

    rows: tuple[QuantizeRow, ...]

    @property
    def before(self) -> int:
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        return sum(row.after for row in self.rows)

    @property
    def dense(self) -> int:
        return sum(row.dense for row in self.rows)

    def __str__(self) -> str:
        worst = max(self.rows, key=lambda row: row.error)
        return (
            f"{len(self.rows)} compressed weights have int8 values: {self.after / 1e6:.1f} MB, before "
            f"{self.before / 1e6:.1f} MB, dense {self.dense / 1e6:.1f} MB; the largest relative error of a "
            f"weight is {worst.error:.4f} ({worst.name})"
        )


def quantize_(
    model: nn.Module,
    dtype: Literal["int8"] = "int8",
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> QuantizeReport:
    """Give the compressed weights of a model int8 values, in place: for inference of small batches.

    Every weight that is a ``StructuredSparseTensor`` of two dims becomes an :class:`Int8SparseTensor`; what
    is dense stays. Activations and sums keep their dtypes. All weights are quantized before the first one
    is replaced. Second forms of ``set_memory_`` are dropped.

    Args:
        model: a pruned model with compressed weights, which need no gradient any more.
        dtype: ``"int8"``; there are no others.
        filter_fn: ``filter_fn(module, name)`` is True for the layers to quantize; by default all.

    Returns:
        a row for each weight: bytes before and after, and the relative error of the weight.

    Raises:
        ValueError: another dtype.
        ModelError: a model without compressed weights, or none that the filter takes.
        NonFiniteError: NaN or Inf in a weight; nothing was changed.

    Example:
        >>> model = nn.Linear(64, 32)
        >>> _ = s3.sparsify_(model, "2:4")
        >>> report = s3.quantize_(model)
        >>> report.before, report.after, report.dense
        (4352, 1408, 8192)
    """
    if dtype != "int8":
        raise ValueError(f'dtype={dtype!r:.40}; it must be "int8"')
    made: list[tuple[Held, nn.Parameter]] = []
    rows = []
    for held in parameters_of(model, filter_fn):
        before = held.parameter
        if isinstance(before, StructuredSparseTensor) and before.ndim == 2:
            weight = Int8SparseTensor.from_sparse(before)
            made.append((held, nn.Parameter(weight, requires_grad=False)))
            rows.append(_row(held.path, before, weight))
    if not rows:
        done = any(isinstance(weight, Int8SparseTensor) for weight in model.parameters())
        raise ModelError(
            f"{type(model).__name__} has no {'more ' if done else ''}compressed weights to quantize"
            + ("" if filter_fn is None else " that filter_fn takes")
            + ("; it has int8 values" if done else "; prune it, or call s3tensor.sparsify_, first")
        )
    for held, parameter in made:
        held.replace(parameter)
    return QuantizeReport(tuple(rows))


def _row(name: str, before: StructuredSparseTensor, after: Int8SparseTensor) -> QuantizeRow:
    exact: Any = before.detach()
    exact = exact.to_dense(torch.float32)
    error = (after.to_dense(torch.float32) - exact).norm() / exact.norm().clamp_min(1e-30)
    return QuantizeRow(
        name,
        str(before.pattern),
        before.nbytes_held,
        after.nbytes_compressed,
        before.numel() * before.dtype.itemsize,
        float(error),
    )
