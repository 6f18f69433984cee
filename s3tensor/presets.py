"""Patterns by name. To add one, write a function of five lines like those below.

N of ``N:M`` always counts what is **kept**. ``4:8`` keeps 4 of 8 single weights; the column pairs that
the S3 paper calls 4:8 are ``pair4:8``.
"""

from __future__ import annotations

from s3tensor.errors import PatternError
from s3tensor.pattern import Pattern, preset


@preset(
    "N:M", r"([0-9]+):([0-9]+)", "keep N of every M consecutive weights of a row, for example 2:4"
)
def n_of_m(n: str, m: str) -> Pattern:
    """N of M along the input dim; 2:4 is what sparse tensor cores take."""
    if not 1 <= int(n) <= int(m):
        raise PatternError(f"{n}:{m} keeps {n} of {m} weights; N counts what is kept, from 1 to M")
    return Pattern(block=(1, 1), scope=(1, int(m)), keep=int(n))


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
    r"block:([0-9]+)x([0-9]+)@([0-9.]+)",
    "RxC blocks at density D of each row of blocks",
)
def blocks(rows: str, columns: str, density: str) -> Pattern:
    """Dense blocks; every row of blocks keeps the same number, so that work is balanced."""
    if int(rows) < 1 or int(columns) < 1:
        raise PatternError(f"block:{rows}x{columns} is an empty block; both sizes must be >= 1")
    return Pattern(block=(int(rows), int(columns)), scope=(1, -1), keep=_density(density))


@preset("unstructured@D", r"unstructured@([0-9.]+)", "single weights at density D of each row")
def unstructured(density: str) -> Pattern:
    """No structure but a budget a row."""
    return Pattern(block=(1, 1), scope=(1, -1), keep=_density(density))


@preset("row@D", r"row@([0-9.]+)", "whole rows (output channels) at density D of the weight")
def rows(density: str) -> Pattern:
    """Output channels compete with each other: one decision a row."""
    return Pattern(block=(1, -1), scope=(-1, 1), keep=_density(density))


@preset(
    "column@D", r"column@([0-9.]+)", "whole columns (input features) at density D of the weight"
)
def columns(density: str) -> Pattern:
    """Input features compete with each other: one decision a column."""
    return Pattern(block=(-1, 1), scope=(1, -1), keep=_density(density))


@preset("head:N@D", r"head:([0-9]+)@([0-9.]+)", "heads of N rows at density D of the weight")
def heads(size: str, density: str) -> Pattern:
    """Attention heads of ``size`` output channels compete with each other."""
    if int(size) < 1:
        raise PatternError(f"head:{size} is an empty head; give its rows, for example head:64@0.5")
    return Pattern(block=(int(size), -1), scope=(-1, 1), keep=_density(density))


def _density(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PatternError(f"density {text!r} is not a number in (0, 1], such as 0.5") from None
