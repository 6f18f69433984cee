"""How much memory the compressed weights of a model may take for speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from s3tensor.errors import ModelError
from s3tensor.model.report import Report
from s3tensor.model.weights import model_weights
from s3tensor.modes import neutral
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.sparse import StructuredSparseTensor


@dataclass(frozen=True)
class MemoryRow:
    """What one weight takes."""

    name: str
    forms: tuple[str, ...]  # "packed", then "dense", "vendor" where kept
    bytes_before: int  # with the second forms
    bytes_after: int
    bytes_compressed: int  # values and indices alone
    bytes_dense: int  # of the dense weight in this dtype


class MemoryReport(Report[MemoryRow]):
    """What the compressed weights of a model take."""

    @property
    def held(self) -> int:
        """Bytes of all weights, second forms included: ``bytes_after``."""
        return self.bytes_after

    @property
    def compressed(self) -> int:
        """Bytes of all weights without second forms."""
        return self.total("bytes_compressed")

    def __str__(self) -> str:
        copies = [row for row in self if len(row.forms) > 1]
        return (
            f"{len(self)} compressed weights hold {self.held / 1e6:.1f} MB: "
            f"{self.held / self.dense:.3f} of dense ({self.dense / 1e6:.1f} MB); compressed alone "
            f"{self.compressed / 1e6:.1f} MB; {len(copies)} keep a second form"
        )


@neutral()
def set_memory_(
    model: nn.Module, memory: Literal["lean", "fast"], batches: tuple[int, int] = (1, 4096)
) -> MemoryReport:
    """Keep every compressed weight of a model in few bytes or in the forms that are fast, in place.

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
        OptionError: an unknown ``memory``, or ``batches`` that are not a range.

    Example:
        >>> model = nn.Linear(64, 32)
        >>> _ = s3.sparsify_(model, "2:4")
        >>> report = s3.set_memory_(model, "fast")  # on a CPU: a dense copy
        >>> report.compressed, report.held, report.dense
        (4352, 12544, 8192)
    """
    rows = []
    for found in model_weights(model):
        before = found.parameter
        if isinstance(before, StructuredSparseTensor):
            bare: Any = before.detach()
            weight = bare.with_memory(memory, batches)
            rows.append(_row(found.path, before.nbytes_held, weight))
            # One at a time, so that the copies of an earlier call are freed as new ones are made.
            found.replace(nn.Parameter(weight, requires_grad=before.requires_grad))
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


def _row(name: str, bytes_before: int, weight: StructuredSparseTensor) -> MemoryRow:
    copies = tuple(form for form in ("dense", "vendor") if getattr(weight, form) is not None)
    return MemoryRow(
        name,
        forms=("packed", *copies),
        bytes_before=bytes_before,
        bytes_after=weight.nbytes_held,
        bytes_compressed=weight.nbytes_compressed,
        bytes_dense=weight.numel() * weight.dtype.itemsize,
    )
