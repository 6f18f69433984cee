"""Write the measured tables of the README from the stored results of the benchmarks.

python bench/readme_tables.py            # rewrites what stands between the markers in README.md
python bench/readme_tables.py --check    # exit code 1 when README.md does not show the stored results
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
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


def inference(stored: dict[str, Any]) -> str:
    """Products by compressed weights beside dense ones (s3tensor bench)."""
    rows = stored["rows"]
    patterns = dict.fromkeys(row["pattern"] for row in rows)
    batches = sorted({row["batch"] for row in rows})
    shapes = list(dict.fromkeys(f"{row['rows']}x{row['columns']}" for row in rows))
    lines = [
        f"How often faster than the dense product (cuBLAS, {rows[0]['dtype']}), geometric mean over weights "
        f"of {', '.join(shapes[:-1])} and {shapes[-1]}, in CUDA graphs, no weight in a cache; "
        f"{_where(stored)}; a copy moves {stored['copy_gb_per_s']} GB/s (`s3tensor bench`, "
        "`bench/results/inference.json`):",
        "",
        f"| rows of x | {' | '.join(map(str, batches))} |",
        "|---|" + "---|" * len(batches),
    ]
    for pattern in patterns:
        for kind in ("lean", "fast"):
            cells = [_ratio(rows, pattern, batch, f"{kind}_us") for batch in batches]
            share = _bytes(rows, pattern, f"{kind}_bytes")
            lines.append(f"| {pattern}, {kind} ({share} of the bytes) | {' | '.join(cells)} |")
    rival = [_ratio(rows, "2:4", batch, "torch_us") for batch in batches]
    lines.append(f"| 2:4, torch's own tensor | {' | '.join(rival)} |")
    worst = min(row["dense_us"] / row["fast_us"] for row in rows)
    lines += ["", f"The worst of the {len(rows)} products under `fast` is {worst:.2f} of dense."]
    return "\n".join(lines)


def _ratio(rows: list[dict[str, Any]], pattern: str, batch: int, time: str) -> str:
    of = [row for row in rows if row["pattern"] == pattern and row["batch"] == batch]
    if not all(row[time] for row in of):
        return ""
    return f"{statistics.geometric_mean(row['dense_us'] / row[time] for row in of):.2f}"


def _bytes(rows: list[dict[str, Any]], pattern: str, held: str) -> str:
    shares = [row[held] / row["dense_bytes"] for row in rows if row["pattern"] == pattern]
    low, high = f"{min(shares):.2f}", f"{max(shares):.2f}"
    return low if low == high else f"{low} to {high}"


def decoder(stored: dict[str, Any]) -> str:
    """A compiled decoder, dense and compressed (bench/decoder.py)."""
    lines = [
        f"{stored['model']}, {stored['layers']} layers, a static cache, one token a step, compiled and in a "
        f"CUDA graph, bfloat16; {_where(stored)} (`bench/decoder.py`):",
        "",
        "| sequences | weights | tokens/s | ms a step | times dense |",
        "|---|---|---|---|---|",
    ]
    for row in stored["rows"]:
        lines.append(
            f"| {row['batch']} | {row['weights']} | {row['tokens_per_s']:.0f} | {row['ms_per_step']:.3f} | "
            f"{row['ratio']:.2f} |"
        )
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
    "inference": inference,
    "decoder": decoder,
}


def rendered(text: str) -> str:
    """``text`` with the table of each stored result between its markers."""
    for name, table in TABLES.items():
        if not (RESULTS / f"{name}.json").exists() and f"<!-- {name} -->" not in text:
            continue  # not measured yet, and not promised
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
