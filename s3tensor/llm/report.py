"""The report of pruning a model: a row for each linear and each block, as text, CSV and pandas frames."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s3tensor.files import write_atomically
from s3tensor.llm.structure import Outside

if TYPE_CHECKING:
    import pandas as pd

LINEARS_CSV = "linears.csv"
BLOCKS_CSV = "blocks.csv"
_SHOWN = 5  # parts outside the blocks that the text names, the largest ones


@dataclass(frozen=True)
class LinearRow:
    """One linear that was pruned."""

    block: int
    name: str
    out_features: int
    in_features: int
    # Relative output error on the calibration inputs, sqrt(tr(dW H dW') / tr(W H W')), before recovery.
    error: float
    seconds: float  # in the pruner; for linears pruned as one weight, in proportion to size
    samples: int  # calibration tokens in its Hessian
    density: float
    peak_memory_bytes: int  # while it was pruned, see PeakMemory
    pattern: str = ""
    held_out_error: float | None = None  # like ``error``, on held-out tokens if there were any
    # Given or chosen, see prune_model:
    alpha: float | None = None
    beta: float | None = None  # 0 where it does not write into the residual stream
    damp: float | None = None


@dataclass(frozen=True)
class BlockRow:
    """One decoder block that was finished."""

    block: int
    linears: int
    error: float  # relative, of its output hidden states against the dense model's
    seconds: float  # of passes, Hessians, pruners and recovery
    solver_seconds: float  # of pruners alone
    peak_memory_bytes: int  # while it was pruned, see PeakMemory
    recovery_steps: int = 0
    recovery_seconds: float = 0.0
    # Of recovery, on its held-out sequences: mean over tokens of the squared error relative to the target's
    # square.
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass
class PruneReport:
    """The outcome of :func:`s3tensor.llm.prune_model`: a sequence of the rows of its pruned linears.

    Attributes:
        pattern: the one asked for; with budgets each linear's row has its own.
        linears: a row for each pruned linear.
        blocks: a row for each finished block.
        skipped: ``(name, reason)`` of each weight in the blocks that stayed dense.
        outside: the parts of the model outside the blocks, which stay as they are.
        seconds: wall-clock seconds of the run; of a resumed run, since it resumed.
        resumed: how many blocks came from an earlier, interrupted run.
    """

    pattern: str
    pruner: str
    linears: list[LinearRow] = field(default_factory=list)
    blocks: list[BlockRow] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    outside: list[Outside] = field(default_factory=list)
    seconds: float = 0.0
    resumed: int = 0

    def __len__(self) -> int:
        return len(self.linears)

    def __iter__(self) -> Iterator[LinearRow]:
        return iter(self.linears)

    @property
    def solver_seconds(self) -> float:
        """Seconds spent in the pruner itself."""
        return sum(row.solver_seconds for row in self.blocks)

    @property
    def patterns(self) -> dict[str, int]:
        """How many linears were pruned to each pattern."""
        return dict(sorted(Counter(row.pattern for row in self.linears).items()))

    @property
    def patterns_text(self) -> str:
        """The pattern, or with several how often each was used: ``1:4 (3 linears), 2:4 (8 linears)``."""
        if set(self.patterns) <= {self.pattern}:
            return self.pattern
        return ", ".join(f"{name} ({count} linears)" for name, count in self.patterns.items())

    @property
    def recovery(self) -> dict[str, float] | None:
        """Steps and seconds of recovery and its mean loss before and after; None without recovery."""
        losses = [
            (row.loss_before, row.loss_after)
            for row in self.blocks
            if row.loss_before is not None and row.loss_after is not None
        ]
        steps = sum(row.recovery_steps for row in self.blocks)
        if not losses:
            return None
        before, after = (sum(part) / len(losses) for part in zip(*losses, strict=True))
        seconds = round(sum(row.recovery_seconds for row in self.blocks), 3)
        return {"steps": steps, "seconds": seconds, "loss_before": before, "loss_after": after}

    def to_frame(self) -> pd.DataFrame:
        """The linears as a pandas frame, a column for each field of :class:`LinearRow`."""
        return self.frames()[0]

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The linears and the blocks as pandas frames."""
        import pandas as pd

        return (
            pd.DataFrame([asdict(row) for row in self.linears], columns=_names(LinearRow)),
            pd.DataFrame([asdict(row) for row in self.blocks], columns=_names(BlockRow)),
        )

    def summary(self) -> dict[str, Any]:
        """The main figures, for JSON."""
        errors = sorted(row.error for row in self.linears)
        held = sorted(x.held_out_error for x in self.linears if x.held_out_error is not None)
        weights = sum(row.out_features * row.in_features for row in self.linears)
        kept = sum(row.out_features * row.in_features * row.density for row in self.linears)
        return {
            "pattern": self.pattern,
            "patterns": self.patterns,
            "pruner": self.pruner,
            "layers": len(self.linears),
            "blocks": len(self.blocks),
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "outside": [asdict(part) for part in self.outside],
            "density": kept / weights if weights else 1.0,
            "median_error": errors[len(errors) // 2] if errors else None,
            "median_held_out_error": held[len(held) // 2] if held else None,
            "seconds": round(self.seconds, 3),
            "solver_seconds": round(self.solver_seconds, 3),
            "recovery": self.recovery,
            "resumed_blocks": self.resumed,
        }

    def __str__(self) -> str:
        figures = self.summary()
        lines = [
            f"{figures['layers']} linears in {figures['blocks']} blocks pruned to {self.patterns_text} by "
            f"{self.pruner} in {self.seconds:.1f} s ({self.solver_seconds:.1f} s in the pruner)"
        ]
        if figures["median_error"] is not None:
            line = f"median relative output error of a linear: {figures['median_error']:.4f}"
            if figures["median_held_out_error"] is not None:
                line += f"; on held-out tokens: {figures['median_held_out_error']:.4f}"
            lines.append(line)
        recovery = figures["recovery"]
        if recovery is not None:
            lines.append(
                f"recovery: {recovery['steps']} steps in {recovery['seconds']:.1f} s; relative squared "
                f"error of a block's output, on average: {recovery['loss_before']:.4f} before, "
                f"{recovery['loss_after']:.4f} after"
            )
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped:
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left dense: {names[0]}{others}: {reason}")
        if self.outside:
            shown = sorted(self.outside, key=lambda part: -part.weights)[:_SHOWN]
            parts = [f"{x.name} ({x.linears} linears, {x.weights:,} weights)" for x in shown]
            parts += [f"{len(self.outside) - len(shown)} more"] * (len(self.outside) > len(shown))
            lines.append(f"outside the blocks, left as they were: {', '.join(parts)}")
        return "\n".join(lines)


def write_rows(path: Path, rows: Iterable[LinearRow] | Iterable[BlockRow], kind: type) -> None:
    """Write rows of one kind as a CSV file with a header, atomically.

    Raises:
        CheckpointError: when it cannot be written, with the system's reason.
    """

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _names(kind))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    write_atomically(path, write)


def _names(kind: type) -> list[str]:
    return [f.name for f in fields(kind)]


class PeakMemory:
    """Peaks of memory in bytes, of each part of some work and of all of it.

    On a CUDA device of the tensors there; elsewhere of the whole process since it started, which never
    falls (0 where the system does not report it).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._largest = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def part(self) -> int:
        """The peak since the last call, or since the start."""
        if self.device.type != "cuda":
            return _process_peak()
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._largest = max(self._largest, peak)
        return peak

    def whole(self) -> int:
        """The peak since the start."""
        return max(self.part(), self._largest)


def _process_peak() -> int:
    try:
        import resource
    except ImportError:  # Windows has no resource module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
