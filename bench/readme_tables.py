"""Write the measured tables of the README from the stored results of the benchmarks.

python bench/readme_tables.py            # rewrites what stands between the markers in README.md
python bench/readme_tables.py --check    # exit code 1 when README.md does not show the stored results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"


def pruners(stored: dict[str, Any]) -> str:
    """Perplexity of a whole model after each pruner (bench/pruners.py)."""
    calibration = stored["calibration"]
    lines = [
        f"SmolLM2-135M, all linears to {stored['pattern']}, {calibration['samples']} x "
        f"{calibration['seq_len']} calibration tokens, {stored['held_out_tokens']:,} held-out tokens of "
        f"other topics, {_where(stored)} (`bench/pruners.py`):",
        "",
        "| pruner | perplexity | seconds, whole run | seconds in the pruner |",
        "|---|---|---|---|",
    ]
    for row in stored["rows"]:
        times = (f"{row[key]:.0f}" if key in row else "" for key in ("seconds", "solver_seconds"))
        lines.append(f"| {row['method']} | {row['perplexity']:.2f} | {' | '.join(times)} |")
    return "\n".join(lines)


def layer_errors(stored: dict[str, Any]) -> str:
    """Output errors of single layers beside the reference implementation (bench/layer_errors.py)."""
    methods = ("sparsekit SparseGPT", "sparsekit S-OBS", "sparsegpt", "sparsegpt+refit", "admm")
    rows = {(r["layer"], r["pattern"], r["method"]): r for r in stored["rows"]}
    lines = [
        f"Relative output error of real layers, and seconds, on {_where(stored)} (`bench/layer_errors.py`; "
        "sparsekit is the reference implementation of the S3 paper, whose method is S-OBS):",
        "",
        f"| layer, pattern | {' | '.join(methods)} |",
        "|---|" + "---|" * len(methods),
    ]
    for layer, pattern in dict.fromkeys((r["layer"], r["pattern"]) for r in stored["rows"]):
        cells = (_cell(rows.get((layer, pattern, method))) for method in methods)
        lines.append(f"| {layer}, {pattern} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return "NaN" if row["failed"].startswith("NaN") else "failed"
    return f"{row['error']:.4f}, {row['seconds']:.2f} s"


def _where(stored: dict[str, Any]) -> str:
    device = stored["device"]
    threads = "" if "NVIDIA" in device else f", {stored['threads']} threads"
    return f"{device}{threads}, torch {stored['versions']['torch']}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "pruners": pruners,
    "layer_errors": layer_errors,
}


def rendered(text: str) -> str:
    """``text`` with the table of each stored result between its markers."""
    for name, table in TABLES.items():
        stored = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        block = f"<!-- {name} -->\n{table(stored)}\n<!-- /{name} -->"
        marked = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        text, count = marked.subn(lambda _, block=block: block, text)
        if count != 1:
            raise SystemExit(
                f"README.md needs one pair of markers <!-- {name} --> <!-- /{name} -->"
            )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = rendered(before)
    if args.check:
        if before != after:
            sys.exit(
                "README.md does not show the stored results; run python bench/readme_tables.py"
            )
        return
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
