"""Measured times of every path to multiply by a compressed weight: tables, and what they predict.

A table is a JSON file of one device: cells of (pattern, dtype, rows, columns, batch), each with the time
of every path there, in microseconds. The package ships tables of the devices that were measured;
``s3tensor bench --calibrate`` writes one for the user's GPU into the cache folder, which is read first.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s3tensor.errors import OptionError
from s3tensor.files import cache_folder

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent / "data"

# Microseconds by the name of a path (``s3tensor.tensor.linear.PATHS``).
Times = Mapping[str, float]
Plan = tuple[int, int, int]  # cuSPARSELt's algorithm, split of K and its mode
DEFAULT_PLAN: Plan = (0, 1, -1)


@dataclass(frozen=True)
class Cell:
    """The times of one product: (batch, columns) by a (rows, columns) weight under a pattern."""

    pattern: str
    dtype: str
    rows: int
    columns: int
    batch: int
    us: Times
    vendor: Plan = DEFAULT_PLAN  # of cuSPARSELt


@dataclass(frozen=True)
class Timings:
    """The table of one device."""

    device: str
    capability: tuple[int, int]
    cells: tuple[Cell, ...]
    vendor_call_us: float = 2000.0  # of the host, for cuSPARSELt's plan outside a CUDA graph

    @staticmethod
    def from_json(text: str) -> Timings:
        """The table that :meth:`to_json` wrote.

        Raises:
            OptionError: a document that is not one.
        """
        try:
            document = json.loads(text)
            if document["format"] != FORMAT:
                raise OptionError(f"format {document['format']!r}, this version reads {FORMAT}")
            cells = tuple(_cell(fields) for fields in document["cells"])
            major, minor = (int(n) for n in document["capability"])
            return Timings(
                str(document["device"]), (major, minor), cells, float(document["vendor_call_us"])
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OptionError(f"not a table of timings: {error!r:.100}") from None

    def to_json(self, **facts: Any) -> str:
        """The table, with further facts about its measurement (versions, date)."""
        document = {
            "format": FORMAT,
            "device": self.device,
            "capability": list(self.capability),
            **facts,
            "vendor_call_us": self.vendor_call_us,
        }
        head = json.dumps(document, indent=1)[:-2]
        cells = ",\n".join(
            "  " + json.dumps({**vars(cell), "us": {k: round(v, 2) for k, v in cell.us.items()}})
            for cell in self.cells
        )
        return f'{head},\n "cells": [\n{cells}\n ]\n}}\n'

    def times(self, pattern: str, dtype: str, rows: int, columns: int, batch: int) -> Times | None:
        """Times at any size, from the measured weight nearest in shape; None for an unknown pattern.

        Between two measured batches, times are interpolated linearly in both logarithms; outside them,
        the nearest batch counts. The times are those of the measured weight: only their order matters.
        """
        cells = self._of_weight(pattern, dtype, rows, columns)
        if not cells:
            return None
        above = next((i for i, cell in enumerate(cells) if cell.batch >= batch), len(cells) - 1)
        upper = cells[above]
        lower = cells[above - 1] if above and upper.batch > batch else upper
        if lower.batch == upper.batch or batch >= upper.batch:
            return upper.us
        weight = math.log(batch / lower.batch) / math.log(upper.batch / lower.batch)
        return {
            path: math.exp((1 - weight) * math.log(lower.us[path]) + weight * math.log(time))
            for path, time in upper.us.items()
            if path in lower.us
        }

    def cusparselt_plan(
        self, pattern: str, dtype: str, rows: int, columns: int, batch: int
    ) -> Plan:
        """cuSPARSELt's plan of the nearest measured batch of this very weight, or its default."""
        cells = [
            cell
            for cell in self._of_weight(pattern, dtype, rows, columns)
            if "vendor" in cell.us and (cell.rows, cell.columns) == (rows, columns)
        ]
        if not cells:
            return DEFAULT_PLAN
        return min(cells, key=lambda cell: abs(math.log(cell.batch / batch))).vendor

    def cusparselt_plans(self, rows: int, columns: int, batch: int, count: int = 3) -> list[Plan]:
        """Up to ``count`` plans of cuSPARSELt for a 2:4 weight, those of the nearest products first."""

        def distance(cell: Cell) -> float:
            sizes = (cell.rows, rows), (cell.columns, columns), (cell.batch, batch)
            return sum(abs(math.log(measured / asked)) for measured, asked in sizes)

        cells = [cell for cell in self.cells if cell.pattern == "2:4" and "vendor" in cell.us]
        return list(dict.fromkeys(cell.vendor for cell in sorted(cells, key=distance)))[:count]

    def _of_weight(self, pattern: str, dtype: str, rows: int, columns: int) -> list[Cell]:
        """Cells of the measured weight nearest in shape, by increasing batch."""
        cells = [cell for cell in self.cells if cell.pattern == pattern and cell.dtype == dtype]
        if not cells:
            return []

        def distance(cell: Cell) -> tuple[float, int, int]:
            apart = abs(math.log(cell.rows / rows)) + abs(math.log(cell.columns / columns))
            return apart, cell.rows, cell.columns

        nearest = min(cells, key=distance)
        same = [c for c in cells if (c.rows, c.columns) == (nearest.rows, nearest.columns)]
        return sorted(same, key=lambda cell: cell.batch)


def _cell(fields: Any) -> Cell:
    us = {str(path): float(time) for path, time in fields["us"].items()}
    rows, columns, batch = (int(fields[name]) for name in ("rows", "columns", "batch"))
    if (
        min(rows, columns, batch) < 1
        or not us
        or not all(0 < time < math.inf for time in us.values())
    ):
        raise OptionError(f"sizes and times of a cell must be positive: {fields!r:.100}")
    algorithm, split, mode = (int(n) for n in fields["vendor"])
    names = str(fields["pattern"]), str(fields["dtype"])
    return Cell(*names, rows, columns, batch, us, (algorithm, split, mode))


def file_name(device: str) -> str:
    """The file of a device's table: ``timings-NVIDIA-H100-80GB-HBM3.json``."""
    return f"timings-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}.json"


@functools.lru_cache(maxsize=16)
def load(device: str, capability: tuple[int, int]) -> Timings | None:
    """The table of a device: the user's, the shipped one, or a shipped one of the same capability."""
    own = cache_folder() / file_name(device)
    for path in (own, SHIPPED / file_name(device), *sorted(SHIPPED.glob("timings-*.json"))):
        try:
            table = Timings.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            warnings.warn(
                f"{path} is ignored ({error}); write it again with s3tensor bench --calibrate",
                UserWarning,
                stacklevel=2,
            )
            continue
        if table.device == device or table.capability == capability:
            return table
    return None


def of_device(device: torch.device) -> Timings | None:
    """The table of a CUDA device; None for other devices and without one."""
    return None if device.type != "cuda" else load(*_identity(device))


@functools.lru_cache(maxsize=64)
def _identity(device: torch.device) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)


def save(table: Timings, **facts: Any) -> Path:
    """Write a table into the user's cache folder, atomically; the next :func:`load` reads it."""
    path = cache_folder() / file_name(table.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(table.to_json(**facts), encoding="utf-8")
    part.replace(path)
    load.cache_clear()
    return path


def guess(density: float, rows: int, columns: int, batch: int) -> dict[str, float]:
    """Times in microseconds on a GPU that was not measured, from bytes and operations alone.

    The constants are those of a current data-centre GPU: 2 TB/s, 400 TFLOP/s, 4 us for a launch. The
    packed kernels are assumed slower than dense from 65 rows on, and cuSPARSELt a tenth faster from 1024.
    """
    weight = rows * columns * 2 / 2e6
    work = 2 * batch * rows * columns / 4e8
    moved = batch * (rows + columns) * 2 / 2e6
    dense = 4 + max(weight + moved, work)
    bytes_kept = density + 1 / 16
    packed = 4 + weight * bytes_kept * (1 + batch / 80) + moved
    return {
        "dense": dense,
        "packed": packed,
        "general": 4 + weight * bytes_kept * (1 + batch / 8) + moved,
        "scratch": dense + 4 + weight * (1 + bytes_kept),
        "vendor": dense * (0.9 if batch >= 1024 else 2.0),
    }
