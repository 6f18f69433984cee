"""Results of earlier runs: what a benchmark that runs in parts may keep of its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows_before(file: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows stored under the same settings: all fields of ``record`` but its rows and date are equal."""
    if not file.is_file():
        return []
    stored = json.loads(file.read_text(encoding="utf-8"))
    if any(stored.get(key) != record[key] for key in record if key not in ("rows", "date")):
        return []
    rows: list[dict[str, Any]] = stored["rows"]
    return rows
