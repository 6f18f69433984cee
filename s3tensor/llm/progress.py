"""Progress of pruning a model: a bar with the time left, or a line for each block in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from s3tensor.llm.report import BlockRow, LinearRow


class PruneProgress:
    """Progress of a run, counted in weights of linears; a context manager."""

    def __init__(self, weights: int, blocks: int, show: bool = True) -> None:
        self.blocks = blocks
        self.weights = weights
        self.done = 0
        self.start: float | None = None  # of the first work that the time left is extrapolated from
        self.console = Console(stderr=True)
        self._live = show and self.console.is_terminal
        self._log = show and not self._live
        self._bar = Progress(
            TextColumn("{task.description:<44}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self._live,
            speed_estimate_period=600,
        )
        self._task: TaskID = self._bar.add_task("embedding the calibration text", total=weights)

    def __enter__(self) -> PruneProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def doing(self, block: int, what: str) -> None:
        """Show what is being worked on."""
        self.start = self.start or time.perf_counter()
        self._bar.update(self._task, description=f"block {block + 1}/{self.blocks} {what}")

    def recovery(self, block: int, steps: int, of: int, loss: float, left: float) -> None:
        """A step of a block's recovery is done; only shown by the bar."""
        self.doing(block, f"recovery {steps}/{of}, loss {loss:.4f}, {_clock(left)} left")

    def within(self, weights: int, share: float) -> None:
        """A share of a linear of so many weights is pruned; only shown by the bar."""
        self._bar.update(self._task, completed=self.done + share * weights)

    def linear(self, row: LinearRow) -> None:
        """One linear is finished."""
        self.done += row.out_features * row.in_features
        self._bar.update(self._task, completed=self.done)

    def skip(self, weights: int) -> None:
        """So many weights need no work: they do not count for the time left."""
        self.weights -= weights
        self._bar.update(self._task, total=self.weights)

    def resumed(self, weights: int) -> None:
        """A block of so many weights came from an earlier run."""
        self.skip(weights)
        self.start = None

    def block(self, row: BlockRow) -> None:
        """One block is finished; in a log, one line with the time left."""
        if self._log:
            now = time.perf_counter()
            spent = now - (self.start or now)
            left = spent / max(self.done, 1) * (self.weights - self.done)
            recovered = ""
            if row.loss_before is not None and row.loss_after is not None:
                recovered = f"recovery {row.loss_before:.4f} to {row.loss_after:.4f}, "
            print(
                f"block {row.block + 1}/{self.blocks}: {row.linears} linears, error {row.error:.4f}, "
                f"{recovered}{row.seconds:.1f} s, about {_clock(left)} left",
                file=self.console.file,
                flush=True,
            )


def _clock(seconds: float) -> str:
    """Seconds for people: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
