"""Patterns by name. To add one, write a function of five lines like those below.

N of ``N:M`` always counts what is **kept**. ``4:8`` keeps 4 of 8 single weights; the column pairs that
the S3 paper calls 4:8 are ``pair4:8``. A budget ``@D`` is a density in (0, 1], ``#K`` a count of blocks.
"""

from __future__ import annotations

from s3tensor.errors import PatternError
from s3tensor.pattern.pattern import Pattern, preset

_BUDGET = r"(@[0-9.]+|#[0-9]+)"
_SCOPE = r"(/tensor)?"


@preset(
    "N:M", r"([0-9]+):([0-9]+)", "keep N of every M consecutive weights of a row, for example 2:4"
)
def n_of_m(n: str, m: str) -> Pattern:
    """N of M along the input dim; 2:4 is what sparse tensor cores take."""
    return Pattern(block=(1, 1), scope=(1, int(m)), keep=_n_of(n, m))


@preset("pair4:8", r"pair4:8", "2 of 4 pairs of neighbouring columns (4 of 8 weights of a row)")
def pair_4_of_8() -> Pattern:
    """The paper's 4:8: column pairs are kept or pruned together."""
    return Pattern(block=(1, 2), scope=(1, 4), keep=2)


@preset("coupled2:4", r"coupled2:4", "2:4 on columns 8 apart that share one decision")
def coupled_2_of_4() -> Pattern:
    """Columns c and c+8 of every 16 form a block: 2:4 with half the indices."""
    return Pattern("m (t h p) -> m t p h", {"h": 2, "p": 8}, (1, 1, 1, 2), (1, 1, 4, 1), 2)


@preset("rowpair16", r"rowpair16", "one of two rows 8 apart, for every 16 columns")
def row_pair_16() -> Pattern:
    """Rows r and r+8 of every 16 compete with blocks of 16 columns: packed rows are plain rows."""
    return Pattern("(t h r) k -> t r h k", {"h": 2, "r": 8}, (1, 1, 1, 16), (1, 1, 2, 1), 1)


@preset(
    "block:RxC@D",
    rf"block:([0-9]+)x([0-9]+){_BUDGET}{_SCOPE}",
    "RxC blocks at density D of each row of blocks",
)
def blocks(rows: str, columns: str, budget: str, tensor: str | None) -> Pattern:
    """Dense blocks. Each row of blocks keeps the same number, so that work is balanced."""
    block = _block(rows, columns)
    return Pattern(block=block, scope=(-1 if tensor else 1, -1), keep=_keep(budget))


@preset(
    "block:RxC@N:M",
    r"block:([0-9]+)x([0-9]+)@([0-9]+):([0-9]+)",
    "N of every M consecutive RxC blocks; block:1x2@2:4 is pair4:8",
)
def blocks_n_of_m(rows: str, columns: str, n: str, m: str) -> Pattern:
    """N:M of blocks instead of single weights: several rows or columns share a decision."""
    return Pattern(block=_block(rows, columns), scope=(1, int(m)), keep=_n_of(n, m))


@preset(
    "unstructured@D",
    rf"unstructured{_BUDGET}{_SCOPE}",
    "single weights at density D of each row",
)
def unstructured(budget: str, tensor: str | None) -> Pattern:
    """Single weights with a budget and no other structure."""
    return Pattern(block=(1, 1), scope=(-1 if tensor else 1, -1), keep=_keep(budget))


@preset("row@D", rf"row{_BUDGET}", "whole rows (output channels) at density D of the weight")
def rows(budget: str) -> Pattern:
    """Output channels compete with each other: one decision a row."""
    return Pattern(block=(1, -1), scope=(-1, 1), keep=_keep(budget))


@preset(
    "column@D",
    rf"column{_BUDGET}",
    "whole columns (input features) at density D of the weight",
)
def columns(budget: str) -> Pattern:
    """Input features compete with each other: one decision a column."""
    return Pattern(block=(-1, 1), scope=(1, -1), keep=_keep(budget))


@preset(
    "head:N@D",
    rf"head:([0-9]+)(?:x([0-9]+))?{_BUDGET}(?:/group:([0-9]+))?(/input)?",
    "heads of N rows; head:NxG@D: G heads as one; @D/group:G: of each G heads; @D/input: N columns",
)
def heads(
    size: str, together: str | None, budget: str, group: str | None, inputs: str | None
) -> Pattern:
    """Attention heads of ``size`` output channels, or input features, compete with each other.

    With grouped-query attention G query heads share a key-value head: ``head:64x3`` keeps or prunes the
    three of a group together, ``/group:3`` keeps the same number of each three.
    """
    if 0 in (int(size), int(together or 1), int(group or 1)):
        raise PatternError(f"head:{size} is an empty head; give its rows, for example head:64@0.5")
    block, scope = int(size) * int(together or 1), int(group or -1)
    if inputs:
        return Pattern(block=(-1, block), scope=(1, scope), keep=_keep(budget))
    return Pattern(block=(block, -1), scope=(scope, 1), keep=_keep(budget))


@preset(
    "convN:M",
    r"conv([0-9]+):([0-9]+)",
    "N of every M input channels, at each place of a 2-D convolution",
)
def conv_n_of_m(n: str, m: str) -> Pattern:
    """N:M on weights of (out_channels, in_channels, height, width), along the input channels."""
    return Pattern(block=(1, 1, 1, 1), scope=(1, int(m), 1, 1), keep=_n_of(n, m))


@preset("filter@D", rf"filter{_BUDGET}", "filters (output channels) of a 2-D convolution")
def filters(budget: str) -> Pattern:
    """All weights of one output channel together."""
    return Pattern(block=(1, -1, -1, -1), scope=(-1, 1, 1, 1), keep=_keep(budget))


@preset("channel@D", rf"channel{_BUDGET}", "input channels of a 2-D convolution")
def channels(budget: str) -> Pattern:
    """All weights of one input channel together."""
    return Pattern(block=(-1, 1, -1, -1), scope=(1, -1, 1, 1), keep=_keep(budget))


@preset(
    "kernel@D",
    rf"kernel{_BUDGET}{_SCOPE}",
    "kernels (height x width) of each filter of a 2-D convolution",
)
def kernels(budget: str, tensor: str | None) -> Pattern:
    """All weights between one input and one output channel together."""
    scope = (-1 if tensor else 1, -1, 1, 1)
    return Pattern(block=(1, 1, -1, -1), scope=scope, keep=_keep(budget))


def vnm(v: int, n: int, m: int, columns: int = 4) -> tuple[Pattern, Pattern]:
    """V:N:M (VENOM; R. L. Castro et al., SC 2023), as the two patterns that a weight satisfies together.

    Every V x M tile keeps ``columns`` of its M columns, and every row of the tile N weights in them. So
    the first pattern is on blocks of V rows, and the second, N:M, is on what the first leaves:

        >>> first, second = vnm(16, 2, 8)
        >>> str(first), str(second)
        ('block:16x1@4:8', '2:8')

    Project onto the first, then onto the second: the result satisfies both. It is not always the nearest
    such weight, because the first projection does not know the second pattern.

    Raises:
        PatternError: unless 1 <= n <= columns <= m and v >= 1.
    """
    if not 1 <= n <= columns <= m:
        raise PatternError(
            f"V:N:M of {v}:{n}:{m} with {columns} columns; N weights are kept in {columns} of M columns, so "
            "N <= columns <= M"
        )
    return Pattern.parse(f"block:{v}x1@{columns}:{m}"), Pattern.parse(f"{n}:{m}")


def _n_of(n: str, m: str) -> int:
    if not 1 <= int(n) <= int(m):
        raise PatternError(f"{n}:{m} keeps {n} of {m} weights; N counts what is kept, from 1 to M")
    return int(n)


def _block(rows: str, columns: str) -> tuple[int, int]:
    if int(rows) < 1 or int(columns) < 1:
        raise PatternError(f"block:{rows}x{columns} is an empty block; both sizes must be >= 1")
    return int(rows), int(columns)


def _keep(budget: str) -> int | float:
    """``@0.5`` as a density, ``#8`` as a count."""
    if budget.startswith("#"):
        return int(budget[1:])
    try:
        return float(budget[1:])
    except ValueError:
        raise PatternError(
            f"density {budget[1:]!r} is not a number in (0, 1], such as 0.5"
        ) from None
