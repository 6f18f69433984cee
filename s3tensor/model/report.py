"""What was done to the weights of a model: a row each, as text and as a pandas frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import pandas as pd

Row = TypeVar("Row", bound=Any)


@dataclass(frozen=True)
class Report(Generic[Row]):
    """Rows of one kind, a dataclass with a ``name``, in the model's order; ``str`` sums them up."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def total(self, column: str) -> int:
        """The sum of a column."""
        return sum(getattr(row, column) for row in self.rows)

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights in the report, as they were."""
        return self.total("bytes_before")

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights in the report, as they are now."""
        return self.total("bytes_after")

    @property
    def dense(self) -> int:
        """Bytes of all weights, if they were dense in their dtypes."""
        return self.total("bytes_dense")

    def to_frame(self) -> pd.DataFrame:
        """The rows as a pandas frame, a column for each field."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])


def table(rows: Sequence[Sequence[str | int]]) -> str:
    """Rows of cells as aligned lines; the columns whose last cell is an int are aligned to the right."""
    words = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    sides = [">" if isinstance(cell, int) else "<" for cell in rows[-1]] if rows else []
    return "\n".join(
        "  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in words
    )
