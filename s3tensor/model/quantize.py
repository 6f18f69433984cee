"""``quantize_``: int8 values for the compressed weights of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from s3tensor.errors import ModelError, OptionError
from s3tensor.model.report import Report
from s3tensor.model.weights import LayerFilter, ModelWeight, model_weights
from s3tensor.modes import neutral
from s3tensor.tensor.int8 import Int8SparseTensor
from s3tensor.tensor.sparse import StructuredSparseTensor


@dataclass(frozen=True)
class QuantizeRow:
    """One quantized weight."""

    name: str
    pattern: str
    bytes_before: int  # of the compressed weight, copies for speed included
    bytes_after: int
    bytes_dense: int  # of the dense weight in this dtype
    error: float  # relative to the weight, Frobenius norms


class QuantizeReport(Report[QuantizeRow]):
    """What :func:`quantize_` did."""

    @property
    def before(self) -> int:
        """``bytes_before``."""
        return self.bytes_before

    @property
    def after(self) -> int:
        """``bytes_after``."""
        return self.bytes_after

    def __str__(self) -> str:
        worst = max(self, key=lambda row: row.error)
        return (
            f"{len(self)} compressed weights have int8 values: {self.after / 1e6:.1f} MB, before "
            f"{self.before / 1e6:.1f} MB, dense {self.dense / 1e6:.1f} MB; the largest relative error of a "
            f"weight is {worst.error:.4f} ({worst.name})"
        )


@neutral()
def quantize_(
    model: nn.Module,
    dtype: Literal["int8"] = "int8",
    filter_fn: LayerFilter | None = None,
) -> QuantizeReport:
    """Give the compressed weights of a model int8 values, in place: for inference of small batches.

    Every weight that is a ``StructuredSparseTensor`` of two dims becomes an :class:`Int8SparseTensor`; what
    is dense stays. Activations and sums keep their dtypes. All weights are quantized before the first one
    is replaced. Second forms of ``set_memory_`` are dropped.

    Args:
        model: a pruned model with compressed weights, which no longer train.
        dtype: ``"int8"``, the only one.
        filter_fn: ``filter_fn(module, name)`` is True for the layers to quantize; by default all.

    Returns:
        a row for each weight: bytes before and after, and its relative error.

    Raises:
        OptionError: another dtype.
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
        raise OptionError(f'dtype={dtype!r:.40}; it must be "int8"')
    made: list[tuple[ModelWeight, nn.Parameter]] = []
    rows = []
    for found in model_weights(model, filter_fn):
        before = found.parameter
        if isinstance(before, StructuredSparseTensor) and before.ndim == 2:
            weight = Int8SparseTensor.from_sparse(before)
            made.append((found, nn.Parameter(weight, requires_grad=False)))
            rows.append(_row(found.path, before, weight))
    if not rows:
        done = any(isinstance(weight, Int8SparseTensor) for weight in model.parameters())
        raise ModelError(
            f"{type(model).__name__} has no {'more ' if done else ''}compressed weights to quantize"
            + ("" if filter_fn is None else " that filter_fn takes")
            + ("; it has int8 values" if done else "; prune it, or call s3tensor.sparsify_, first")
        )
    for found, parameter in made:
        found.replace(parameter)
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
