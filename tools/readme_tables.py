"""Write the measured tables of the README and of the pages of docs/ from the stored results.

python tools/readme_tables.py            # rewrites what stands between the markers of these pages
python tools/readme_tables.py --check    # exit code 1 when a page does not show the stored results
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
# Each page, and the tables that it must have.
PAGES = {
    ROOT / "README.md": ("gains", "inference", "decoder", "pruners"),
    ROOT / "docs" / "benchmarks.md": (
        "inference",
        "inference-NVIDIA-H200",
        "decoder",
        "pruners",
        "pruners-patterns",
        "layer_errors",
        "synthetic",
        "loading",
        "faults",
    ),
    ROOT / "docs" / "training.md": ("training", "finetune"),
    ROOT / "docs" / "pruners.md": ("room", "room-29.down"),
    ROOT / "docs" / "interop.md": ("int8", "int8-NVIDIA-H200"),
}


def gains(stored: dict[str, Any]) -> str:
    """What 2:4 gains, each line from one benchmark; ``stored`` is the result of bench/pruners.py."""
    perplexity = {row["method"]: f"{row['perplexity']:.2f}" for row in stored["rows"]}
    inference, decoder, finetune, training = map(
        _stored, ("inference", "decoder", "finetune", "training")
    )
    speed = [_ratio(inference["rows"], "2:4", batch, "lean_us") for batch in (1, 16)]
    single = {row["weights"]: row for row in decoder["rows"] if row["batch"] == 1}
    step = {(row["way"], row["tokens"], row["variant"]): row["ratio"] for row in training["rows"]}
    lines = [
        "| | dense | 2:4 | measured on |",
        "|---|---|---|---|",
        f"| bytes of a bfloat16 weight | 1 | {_bytes(inference['rows'], '2:4', 'lean_bytes')} | |",
        f"| speed of a linear layer, 1 to 16 rows of x | 1 | {' to '.join(speed)} | {_where(inference)} |",
        f"| tokens/s of a compiled decoder, one sequence | {single['dense']['tokens_per_s']:.0f} | "
        f"{single['2:4']['tokens_per_s']:.0f} ({single['2:4']['ratio']:.2f}x) | {decoder['model']}, "
        f"{decoder['layers']} layers; {_where(decoder)} |",
        f"| perplexity after pruning | {perplexity['dense']} | {perplexity['admm']} (SparseGPT: "
        f"{perplexity['sparsegpt']}) | SmolLM2-135M; {_where(stored)} |",
        f"| perplexity after pruning with recovery | {perplexity['dense']} | "
        f"{perplexity['admm + recovery']} | SmolLM2-135M; {_where(stored)} |",
        f"| perplexity after fine-tuning with distillation | {finetune['dense_perplexity']:.2f} | "
        f"{finetune['rows'][-1]['perplexity']:.2f} (pruned: {finetune['pruned_perplexity']:.2f}) | "
        f"SmolLM2-135M; {_where(finetune)} |",
        "| time of a compiled training step, 16384 tokens | 1 | "
        f"{step['compiled', 16384, 'ste, transposable, sparse cores']:.2f} | three linear layers, "
        f"transposable masks, sparse tensor cores; {_where(training)} |",
    ]
    return "\n".join(lines)


def pruners(stored: dict[str, Any]) -> str:
    """Perplexity of a whole model after each pruner (bench/pruners.py)."""
    calibration = stored["calibration"]
    lines = [
        f"SmolLM2-135M, all linears to {stored['pattern']}, {calibration['samples']} x "
        f"{calibration['seq_len']} calibration tokens, {stored['held_out_tokens']:,} held-out tokens of "
        f"other topics, {_where(stored)} (`bench/pruners.py`; `admm`, the default, and `admm + recovery` "
        f"choose damp; the others use {stored['damp']} unless they say otherwise):",
        "",
        "| pruner | perplexity | seconds, whole run | seconds in the pruner |",
        "|---|---|---|---|",
    ]
    for row in stored["rows"]:
        times = (f"{row[key]:.0f}" if key in row else "" for key in ("seconds", "solver_seconds"))
        lines.append(f"| {row['method']} | {row['perplexity']:.2f} | {' | '.join(times)} |")
    return "\n".join(lines)


def pruners_patterns(stored: dict[str, Any]) -> str:
    """The same for every pattern that was measured: perplexities alone."""
    tables = {
        entry["pattern"]: {r["method"]: r for r in entry["rows"]} for entry in stored["tables"]
    }
    methods = dict.fromkeys(name for rows in tables.values() for name in rows)
    shared = [name for name in methods if sum(name in rows for rows in tables.values()) > 1]
    lines = [
        f"Perplexity under other patterns, on the same model, tokens and device ({_where(stored)}, "
        "`bench/pruners.py --patterns`):",
        "",
        f"| pruner | {' | '.join(tables)} |",
        "|---|" + "---|" * len(tables),
    ]
    for name in shared:
        cells = (_perplexity(rows.get(name)) for rows in tables.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _perplexity(row: dict[str, Any] | None) -> str:
    if row is None or "perplexity" not in row:
        return ""
    return f"{row['perplexity']:.2f}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.1e}"


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


def synthetic(stored: dict[str, Any]) -> str:
    """Output errors of a synthetic layer, with the reference's S-OBS (bench/structured_obs.py)."""
    rows = {(row["pattern"], row["method"]): row for row in stored["rows"]}
    most = min(row["rows"] for row in stored["rows"])
    lines = [
        f"A synthetic layer of {stored['shape'][0]} x {stored['shape'][1]}, {stored['samples']:,} "
        f"correlated, heavy-tailed samples, {_where(stored)} (`bench/structured_obs.py --synthetic`; "
        f"patterns named as in the S3 paper). Errors are of the first {most} rows, the only "
        "ones that the reference's S-OBS pruned; its seconds are scaled to all rows:",
        "",
        "| pattern | sparsekit S-OBS | sparsegpt | sparsegpt+refit | admm | admm / S-OBS |",
        "|---|---|---|---|---|---|",
    ]
    for pattern in dict.fromkeys(row["pattern"] for row in stored["rows"]):
        each = [
            rows[pattern, name]
            for name in ("sparsekit/true_obs", "sparsegpt", "sparsegpt+refit", "admm")
        ]
        cells = [f"{row['first_rows_error']:.4f}, {row['seconds_all_rows']:.1f} s" for row in each]
        ratio = each[-1]["first_rows_error"] / each[0]["first_rows_error"]
        lines.append(f"| {pattern} | {' | '.join(cells)} | {ratio:.3f} |")
    return "\n".join(lines)


def inference(stored: dict[str, Any]) -> str:
    """Products by compressed weights beside dense ones (s3tensor bench)."""
    rows = stored["rows"]
    patterns = dict.fromkeys(row["pattern"] for row in rows)
    batches = sorted({row["batch"] for row in rows})
    shapes = list(dict.fromkeys(f"{row['rows']}x{row['columns']}" for row in rows))
    lines = [
        f"Speedup over dense (cuBLAS, {rows[0]['dtype']}), geometric mean over weights of "
        f"{', '.join(shapes[:-1])} and {shapes[-1]}, in CUDA graphs, with cold caches; {_where(stored)}; a "
        f"device copy runs at {stored['copy_gb_per_s']} GB/s (`s3tensor bench`):",
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
    lines += [
        "",
        f"The slowest of the {len(rows)} products under `fast` has a speedup of {worst:.2f}.",
    ]
    return "\n".join(lines)


def int8(stored: dict[str, Any]) -> str:
    """Products by weights with int8 values, and with those of bfloat16 (bench/int8.py)."""
    rows = [row for row in stored["rows"] if row["name"] != "dense"]
    patterns = list(dict.fromkeys(row["name"].split()[0] for row in rows))
    lines = [f"| {_where(stored)}, rows of x | {' | '.join(patterns)} |"]
    lines += ["|---|" + "---|" * len(patterns)]
    for batch in sorted({row["batch"] for row in rows}):
        for values in ("bfloat16", "int8"):
            cells = []
            for pattern in patterns:
                name = f"{pattern} {values}"
                times = [r["speedup"] for r in rows if (r["batch"], r["name"]) == (batch, name)]
                cells.append(f"{statistics.geometric_mean(times):.2f}")
            lines.append(f"| {batch}, {values} | {' | '.join(cells)} |")
    return "\n".join(lines)


def room(stored: dict[str, Any]) -> str:
    """What a search of the masks finds beside each method (bench/room.py)."""
    named = {
        "sparsekit/true_obs": "S-OBS (sparsekit)", "true_obs": "S-OBS (ours)",
        "sparsegpt": "SparseGPT", "admm": "ADMM",
    }  # fmt: skip
    device = f"{stored['device']}, " if "NVIDIA" in stored["device"] else "a CPU, "
    lines = [
        f"The first {stored['groups']} rows (`rowpair16`: pairs of rows) of {stored['layer']}, "
        f"{stored['samples']:,} samples; errors in %, {stored['steps']:,} swaps of tabu search for each "
        f"({device}torch {stored['versions']['torch']}, `bench/room.py`):",
        "",
        "| pattern | start | as given | refitted | no swap helps | after the search | relative to S-OBS |",
        "|---|---|---|---|---|---|---|",
    ]
    base = {r["pattern"]: r["as_given"] for r in stored["rows"] if "true_obs" in r["start"]}
    for row in stored["rows"]:
        start = named.get(row["start"], "a random mask")
        errors = (row["as_given"], row["refitted"], row["descent"], row["search"])
        cells = " | ".join("" if error is None else f"{100 * error:.3f}" for error in errors)
        ratio = row["search"] / base[row["pattern"]]
        lines.append(f"| {row['pattern']} | {start} | {cells} | {ratio:.4f} |")
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
        f"{stored['model']}, {stored['layers']} layers, static cache, one token per step, compiled and in a "
        f"CUDA graph, bfloat16; {_where(stored)} (`bench/decoder.py`):",
        "",
        "| sequences | weights | tokens/s | ms per step | speedup |",
        "|---|---|---|---|---|",
    ]
    for row in stored["rows"]:
        lines.append(
            f"| {row['batch']} | {row['weights']} | {row['tokens_per_s']:.0f} | {row['ms_per_step']:.3f} | "
            f"{row['ratio']:.2f} |"
        )
    return "\n".join(lines)


def loading(stored: dict[str, Any]) -> str:
    """Memory of loading a model with transformers (bench/loading.py)."""
    model = stored["model"]
    what = {
        "dense": "dense files",
        "compressed": "compressed files",
        "verified": "compressed files, every checksum verified",
        "afterwards": "dense files, compressed after loading",
    }
    lines = [
        f"A Llama of {model['parameters'] / 1e6:.0f} M parameters, bfloat16, {stored['pattern']}, on a CPU, "
        f"torch {stored['torch']}, transformers {stored['transformers']} (`bench/loading.py`); peak memory, "
        "file pages included, while loading and in one forward pass over 16 tokens after it:",
        "",
        "| loaded from | MB held by the model | peak MB | seconds |",
        "|---|---|---|---|",
    ]
    for way, row in stored["rows"].items():
        peak = max(row["load_with_files"], row["run_with_files"])
        lines.append(
            f"| {what[way]} | {row['held'] / 1e6:.0f} | {peak / 1e6:.0f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines)


def faults(stored: dict[str, Any]) -> str:
    """Runs killed at random moments, and checkpoints with changed bytes (bench/faults.py)."""
    kills, fuzz = stored["kills"], stored["fuzz"]
    lines = [
        f"`s3tensor prune` of a toy model, killed by SIGKILL at {kills['kills']} random moments and started "
        f"again with the same command: {kills['results']} results, {kills['equal']} of them equal, byte for "
        f"byte, to an uninterrupted run. Checkpoints with changed bytes, {fuzz['cases']:,} cases, under a "
        "limit of 1 GiB of further memory "
        f"({stored['date']}, torch {stored['versions']['torch']}, `bench/faults.py`):",
        "",
        "| change | cases | refused | loaded as saved | another valid state | faults |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in fuzz["outcomes"].items():
        names = ("refused", "as it was saved", "another sound state", "fault")
        cells = " | ".join(f"{found.get(name, 0):,}" for name in names)
        lines.append(f"| {kind} | {sum(found.values()):,} | {cells} |")
    return "\n".join(lines)


def training(stored: dict[str, Any]) -> str:
    """Time of a training step under each mode beside dense (bench/training.py)."""
    rows = {(row["way"], row["tokens"], row["variant"]): row for row in stored["rows"]}
    columns = list(dict.fromkeys((way, tokens) for way, tokens, _ in rows))
    widths = ", ".join(f"{rows}x{columns}" for rows, columns in stored["linears"])
    lines = [
        f"Time of a training step relative to dense, for linears of {widths} under {stored['pattern']}, "
        f"float32 masters, bfloat16 autocast, fused AdamW: median of {_rounds(stored)} rounds of ten steps, "
        f'and range; {_where(stored)} (`bench/training.py`; steps of "refresh 10" include `s3.step`):',
        "",
        f"| | {' | '.join(f'{way}, {tokens} tokens' for way, tokens in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for variant in dict.fromkeys(variant for *_, variant in rows):
        cells = (_overhead(rows.get((*column, variant))) for column in columns)
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join([*lines, *_sparse_cores(stored.get("sparse_cores", []))])


def _sparse_cores(rows: list[dict[str, Any]]) -> list[str]:
    """The products that sparse tensor cores can take, alone."""
    if not rows:
        return []
    lines = [
        "",
        "One product, bfloat16, dense and on sparse tensor cores (cuSPARSELt), for which the weight is "
        "compressed in each step; last, the time that torch takes to compress it:",
        "",
        "| product | dense, ms | sparse, ms | compression, ms | sparse + compression, relative to dense | "
        "compression by torch, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense, product, compress = (row[f"{of}_ms"] for of in ("dense", "product", "compress"))
        name = "x".join(map(str, row["linear"]))
        late = "" if set(row["timed_in"].values()) == {"graph"} else " (with the host)"
        lines.append(
            f"| {name}, {row['tokens']} tokens, {row['product']}{late} | {dense:.3f} | {product:.3f} | "
            f"{compress:.3f} | {(product + compress) / dense:.2f} | {row['torch_compress_ms']:.3f} |"
        )
    return lines


def _rounds(stored: dict[str, Any]) -> int:
    return len(stored["rows"][0]["ratios"])


def _overhead(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["variant"] == "dense":
        return f"{row['ms']:.2f} ms"
    return f"{row['ratio']:.3f} ({min(row['ratios']):.2f} to {max(row['ratios']):.2f})"


def finetune(stored: dict[str, Any]) -> str:
    """A pruned language model, fine-tuned under its masks (examples/finetune.py)."""
    settings = stored["settings"]
    notes = f"; {stored['notes']}" if "notes" in stored else ""
    lines = [
        f"{settings['model']}, {stored['pruned_linears']} linears to {settings['pattern']} by "
        f"`{settings['pruner']}`, then {settings['steps']} steps of {settings['batch']} x "
        f"{settings['seq_len']} tokens, drawn from {stored['tokens']['training']:,} of the calibration "
        f"topics; perplexity on {stored['tokens']['held_out']:,} held-out tokens of other topics, of the "
        f"compressed model after saving and reloading; {_where(stored)} (`examples/finetune.py`{notes}):",
        "",
        "| | perplexity | loss from pruning recovered | step kept | ms per step |",
        "|---|---|---|---|---|",
        f"| dense | {stored['dense_perplexity']:.2f} | | | |",
        f"| pruned | {stored['pruned_perplexity']:.2f} | | | |",
    ]
    lost = stored["pruned_perplexity"] - stored["dense_perplexity"]
    for row in stored["rows"]:
        regained = (stored["pruned_perplexity"] - row["perplexity"]) / lost
        lines.append(
            f"| {row['method']} | {row['perplexity']:.2f} | {100 * regained:.0f} % | {row['kept_step']} | "
            f"{row['ms_per_step']:.0f} |"
        )
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "failed" in row:
        return "NaN" if row["failed"].startswith("NaN") else "failed"
    return f"{row['error']:.4f}, {row['seconds']:.2f} s"


def _stored(name: str) -> dict[str, Any]:
    """The stored result of a benchmark."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _where(stored: dict[str, Any]) -> str:
    device = stored["device"]
    threads = "" if "NVIDIA" in device else f", {stored['threads']} threads"
    return f"{device}{threads}, torch {stored['versions']['torch']}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "gains": gains,
    "pruners": pruners,
    "pruners-patterns": pruners_patterns,
    "layer_errors": layer_errors,
    "synthetic": synthetic,
    "inference": inference,
    "inference-NVIDIA-H200": inference,
    "int8": int8,
    "int8-NVIDIA-H200": int8,
    "room": room,
    "room-29.down": room,
    "decoder": decoder,
    "loading": loading,
    "faults": faults,
    "training": training,
    "finetune": finetune,
}
# Tables that are made from the result of another one; each other has a file of its name.
SHARED = {"gains": "pruners", "pruners-patterns": "pruners"}


def rendered(text: str, page: Path, promised: tuple[str, ...]) -> str:
    """``text`` with the table of each result between its markers; of one not stored, with none."""
    for name, table in TABLES.items():
        if f"<!-- {name} -->" not in text and name not in promised:
            continue
        stored = SHARED.get(name, name)
        shown = ""
        if (RESULTS / f"{stored}.json").exists():
            shown = table(_stored(stored)) + "\n"
        block = f"<!-- {name} -->\n{shown}<!-- /{name} -->"
        marked = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        text, count = marked.subn(lambda _, block=block: block, text)
        if count != 1:
            raise SystemExit(
                f"{page.name} needs one pair of markers <!-- {name} --> <!-- /{name} -->"
            )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    for page, promised in PAGES.items():
        before = page.read_text(encoding="utf-8")
        after = rendered(before, page, promised)
        if args.check and before != after:
            sys.exit(
                f"{page.name} does not show the stored results; run python tools/readme_tables.py"
            )
        if before != after:
            page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
