"""What a user sees while a model is pruned: a bar with the time left, or a line for each block in a log."""

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
        self.start = time.perf_counter()
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
        """Say what is being worked on."""
        self._bar.update(self._task, description=f"block {block + 1}/{self.blocks} {what}")

    def linear(self, row: LinearRow) -> None:
        """One linear is finished."""
        self.advance(row.out_features * row.in_features)

    def advance(self, weights: int) -> None:
        """So many more weights need no more work."""
        self.done += weights
        self._bar.advance(self._task, weights)

    def block(self, row: BlockRow) -> None:
        """One block is finished; in a log, one line with the time left."""
        if self._log:
            spent = time.perf_counter() - self.start
            left = spent / max(self.done, 1) * (self.weights - self.done)
            print(
                f"block {row.block + 1}/{self.blocks}: {row.linears} linears, output error {row.error:.4f}, "
                f"{row.seconds:.1f} s, about {left:.0f} s left",
                file=self.console.file,
                flush=True,
            )
