"""Training on sparse tensor cores: ``sparse_cores_``.

The weight in use stays what S3Sparse makes, a dense tensor with zeros; linear layers get a forward that
multiplies by it with :mod:`s3tensor.tensor.cusparselt`.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from s3tensor.mask.packing import form_of
from s3tensor.mask.projection import run_length
from s3tensor.model.report import Report, table
from s3tensor.tensor import cusparselt as cores
from s3tensor.train.parametrized import TrainedWeight, require_trained_weights
from s3tensor.train.s3_sparse import S3Sparse


@dataclass(frozen=True)
class CoresRow:
    """How the products by one weight run."""

    name: str
    products: str  # "forward", "forward and backward" or "dense"
    reason: str = ""  # why they stay dense


class CoresReport(Report[CoresRow]):
    """Rows of :func:`sparse_cores_`, one for each weight under S3Sparse."""

    def __str__(self) -> str:
        return table(
            [(row.name, ": ".join(filter(None, (row.products, row.reason)))) for row in self]
        )


def sparse_cores_(model: nn.Module, enable: bool = True) -> CoresReport:
    """Let linear layers under :class:`S3Sparse` multiply on sparse tensor cores while they train, in place.

    It works for N:4 patterns with N up to 2 and coupled2:4, on an NVIDIA GPU with cuSPARSELt, in bfloat16
    or float16 (under autocast, or in a model of that dtype). The forward product uses the weight; with
    ``transposable=True`` in S3Sparse the gradient of the input uses its transpose; the gradient of the
    weight stays dense. Each size of product is timed once, when it first occurs, and runs on sparse tensor
    cores if that is faster, compression included; :func:`s3tensor.tensor.cusparselt.choices` lists what was
    chosen. Otherwise the product is dense, and a warning says so once (a compiled forward does not say why
    it refuses x).

    Results differ from those of dense products by the order of sums and by the rounding before the bias is
    added; two runs may differ, as the timing may choose differently.

    Args:
        model: a module after :func:`s3tensor.sparsify_training_`, on any device; its own weight counts too.
        enable: False undoes it, as :func:`s3tensor.finalize` does.

    Returns:
        One row for each weight: which products may run sparse, or why they stay dense.

    Raises:
        ModelError: a model without S3Sparse.
        PatternError: an S3Sparse under another parametrization.
    """
    rows = []
    for weight in require_trained_weights(model):
        layer = weight.module
        restore_forward(layer)
        reason = _reason_for_dense(weight) if enable else "turned off"
        products = "dense"
        if not reason:
            layer.forward = types.MethodType(_forward, layer)
            products = "forward and backward" if _both(weight.sparse) else "forward"
        rows.append(CoresRow(weight.path, products, reason))
    return CoresReport(tuple(rows))


def restore_forward(module: nn.Module) -> None:
    """Give a module the forward of its class again, if :func:`sparse_cores_` replaced it."""
    own = module.__dict__.get("forward")
    if getattr(own, "__func__", None) is _forward:
        del module.forward


def _reason_for_dense(weight: TrainedWeight) -> str:
    """Why the products by a weight stay dense, or empty."""
    sparse, owner = weight.sparse, weight.module
    if not isinstance(sparse, S3Sparse):
        return "a coupling"
    if weight.attribute != "weight" or type(owner).forward is not nn.Linear.forward:
        return f"{type(owner).__name__.removeprefix('Parametrized')} is not an nn.Linear"
    if "forward" in owner.__dict__:
        return "the module has a forward of its own"
    if isinstance(owner, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and does not call it"
    if sparse.transposed and not sparse.transposable:
        return "its pattern is of the transpose"
    if sparse.schedule is not None:
        return "a density schedule may keep more than 2 of 4"
    shape = tuple(weight.upright(weight.originals[0]).shape)
    bound = sparse.pattern.bind(shape)
    if not (run_length(bound) == 4 and bound.keep <= 2) and form_of(bound) != "coupled2:4":
        return f"{sparse.pattern} does not keep at most 2 of 4 neighbours"
    if any(n % cores.TILE for n in shape):
        return f"its shape {shape} does not divide by {cores.TILE}"
    return ""


def _both(sparse: Any) -> bool:
    return isinstance(sparse, S3Sparse) and sparse.transposable


def _forward(self: nn.Linear, input: Tensor) -> Tensor:
    weight = self.weight
    if not parametrize.is_parametrized(self, "weight"):  # removed by hand
        return F.linear(input, weight, self.bias)
    chain: Any = self.parametrizations
    return cores.train_linear(input, weight, self.bias, _both(chain["weight"][-1]))
