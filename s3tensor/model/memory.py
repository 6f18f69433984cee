"""How much memory the compressed weights of a model may take for speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from s3tensor.errors import ModelError
from s3tensor.model.weights import parameters_of
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.sparse import StructuredSparseTensor


@dataclass(frozen=True)
class MemoryRow:
    """What one weight takes, in bytes."""

    name: str
    compressed: int  # values and indices alone
    held: int  # with the second forms
    dense: int  # of the dense weight in this dtype
    forms: tuple[str, ...]  # "packed", then "dense", "vendor" where kept


@dataclass(frozen=True)
class MemoryReport:
    """What the compressed weights of a model take; ``str`` sums it up."""

    rows: tuple[MemoryRow, ...]

    @property
    def compressed(self) -> int:
        return sum(row.compressed for row in self.rows)

    @property
    def held(self) -> int:
        return sum(row.held for row in self.rows)

    @property
    def dense(self) -> int:
        return sum(row.dense for row in self.rows)

    def __str__(self) -> str:
        copies = [row for row in self.rows if len(row.forms) > 1]
        return (
            f"{len(self.rows)} compressed weights hold {self.held / 1e6:.1f} MB: "
            f"{self.held / self.dense:.3f} of dense ({self.dense / 1e6:.1f} MB); compressed alone "
            f"{self.compressed / 1e6:.1f} MB; {len(copies)} keep a second form"
        )


def set_memory_(
    model: nn.Module, memory: Literal["lean", "fast"], batches: tuple[int, int] = (1, 4096)
) -> MemoryReport:
    """Keep every compressed weight of a model for few bytes or for speed, in place.

    Args:
        model: a module on its final device and in its final dtype: what is worth a copy depends on both.
        memory: ``"lean"`` keeps the compressed form alone. ``"fast"`` keeps a dense copy, cuSPARSELt's
            compressed copy or both beside it, where that was measured to be faster on this device.
        batches: the fewest and the most rows of x (sequences times tokens of one call) to be fast for;
            ``(1, 16)`` on a GPU seldom needs a copy.

    Returns:
        what each weight takes.

    Raises:
        ModelError: a model without compressed weights.
        ValueError: another word for the memory, or batches that are no range.

    Example:
        >>> model = nn.Linear(64, 32)
        >>> _ = s3.sparsify_(model, "2:4")
        >>> report = s3.set_memory_(model, "fast")  # on a CPU: a dense copy
        >>> report.compressed, report.held, report.dense
        (4352, 12544, 8192)
    """
    rows = []
    for held in parameters_of(model):
        before = held.parameter
        if isinstance(before, StructuredSparseTensor):
            bare: Any = before.detach()
            weight = bare.with_memory(memory, batches)
            # One at a time, so that the copies of an earlier call are freed as new ones are made.
            held.replace(nn.Parameter(weight, requires_grad=before.requires_grad))
            rows.append(_row(held.path, weight))
    if not rows:
        int8 = any(isinstance(weight, Compressed) for weight in model.parameters())
        raise ModelError(
            f"{type(model).__name__} has no compressed weights"
            + (
                " but those with int8 values, which have no second forms"
                if int8
                else "; prune it, or call s3tensor.sparsify_, first"
            )
        )
    return MemoryReport(tuple(rows))


def _row(name: str, weight: StructuredSparseTensor) -> MemoryRow:
    copies = tuple(form for form in ("dense", "vendor") if getattr(weight, form) is not None)
    return MemoryRow(
        name,
        weight.nbytes_compressed,
        weight.nbytes_held,
        weight.numel() * weight.dtype.itemsize,
        ("packed", *copies),
    )
