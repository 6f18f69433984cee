"""Stored results: what each says of the versions it is of, and what a run in parts may keep of its file."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import s3tensor as s3


def versions(*packages: str) -> dict[str, str | None]:
    """Of packages by name; None for one that is not installed. s3tensor need not be, to be imported."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = s3.__version__ if name == "s3tensor" else None
    return found


def rows_before(file: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows stored under the same settings: all fields of ``record`` but its rows and date are equal."""
    if not file.is_file():
        return []
    stored = json.loads(file.read_text(encoding="utf-8"))
    if any(stored.get(key) != record[key] for key in record if key not in ("rows", "date")):
        return []
    rows: list[dict[str, Any]] = stored["rows"]
    return rows
