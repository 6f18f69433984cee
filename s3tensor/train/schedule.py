"""Density over the steps of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from s3tensor.errors import OptionError, PatternError

SHAPES = ("cubic", "step", "constant")


class Budget(Protocol):
    """What a bound pattern or a coupling keeps of each scope."""

    @property
    def keep(self) -> int: ...
    @property
    def blocks_per_scope(self) -> int: ...
    @property
    def density(self) -> float: ...


@dataclass(frozen=True)
class Density:
    """How the density falls to the pattern's, counted by ``s3tensor.step``.

    Args:
        start: density at step 0, at least the pattern's.
        end: density from ``steps`` on; the pattern's, which is the default.
        steps: length of the descent.
        shape: ``"cubic"`` falls fast, then ever slower: ``end + (start - end) (1 - t / steps)^3`` (Zhu and
            Gupta, arXiv 1710.01878). ``"step"`` stays at ``start``, then falls at once. ``"constant"`` is at
            ``end`` all the time, whatever ``start`` is.

    Raises:
        OptionError: a density outside (0, 1], an end above the start, steps below 1, or an unknown shape.
    """

    start: float = 1.0
    end: float | None = None
    steps: int = 1000
    shape: str = "cubic"

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if value is not None and not 0 < value <= 1:
                raise OptionError(f"Density {name}={value!r} must be in (0, 1]")
        if self.end is not None and self.end > self.start:
            raise OptionError(
                f"Density end={self.end} is above start={self.start}; a schedule only falls"
            )
        if type(self.steps) is not int or self.steps < 1:
            raise OptionError(f"Density steps={self.steps!r} must be an int >= 1")
        if self.shape not in SHAPES:
            raise OptionError(f"Density shape {self.shape!r} must be one of {', '.join(SHAPES)}")

    def at(self, step: int, end: float) -> float:
        """The density at a step, on the way from ``start`` to ``end``."""
        left = max(0.0, 1.0 - step / self.steps)
        if self.shape == "cubic":
            left **= 3
        elif self.shape == "step":
            left = float(left > 0)
        else:
            left = 0.0
        return end + (self.start - end) * left

    def keep(self, step: int, bound: Budget) -> int:
        """Blocks kept in each scope at a step, never fewer than the pattern's; rounded half up."""
        n = bound.blocks_per_scope
        return min(n, max(bound.keep, math.floor(self.at(step, bound.density) * n + 0.5)))

    def check(self, bound: Budget) -> None:
        """Refuse a schedule that does not end at the budget of ``bound``.

        Raises:
            PatternError: with both densities.
        """
        n = bound.blocks_per_scope
        if self.end is not None and math.floor(self.end * n + 0.5) != bound.keep:
            where = "below" if self.end < bound.density else "above"
            raise PatternError(
                f"the schedule ends at density {self.end}, {where} the {bound.density:g} of {bound}; "
                "leave end out, or choose another pattern"
            )
        if self.shape != "constant" and self.start < bound.density:
            raise PatternError(
                f"the schedule starts at density {self.start}, below the {bound.density:g} of {bound}; "
                "start at the pattern's density or above"
            )
