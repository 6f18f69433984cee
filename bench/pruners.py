"""Perplexity of a whole model after each pruner, same calibration, on held-out text.

    python bench/pruners.py                         # SmolLM2-135M, 2:4, pydoc topics: about 25 min on 2 cores
    python bench/pruners.py --patterns "2:4;rowpair16;coupled2:4" --methods "sparsegpt;S-OBS;admm + recovery"

The model is the one of ``examples/demo.py``; so are calibration and held-out text, which share no topic.
Each method starts from the dense model. The tables are printed and stored as JSON: the first pattern's rows
under "pattern" and "rows", which the README shows, those of all patterns under "tables".
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import s3tensor as s3
from s3tensor import hf, llm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from demo import packaged_model

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (pruner, options of prune_model)
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {}),
    "S-OBS": ("obs", {}),  # the method of the S3 paper
    "admm, no dense target": ("admm", {"alpha": 0.0}),
    "admm": ("admm", {}),  # the default: dense target
    "admm + recovery": ("admm", {"recover": 300}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a .gguf file or Hugging Face folder [SmolLM2-135M]"
    )
    parser.add_argument("--patterns", default="2:4", help="patterns divided by ';' [2:4]")
    parser.add_argument("--methods", help=f"names divided by ';', of: {'; '.join(METHODS)} [all]")
    parser.add_argument("--samples", type=int, default=24, help="calibration sequences")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a calibration sequence")
    parser.add_argument(
        "--eval-samples", type=int, default=16, help="held-out sequences of 1024 tokens"
    )
    parser.add_argument("--blocks", type=int, help="prune only the first so many blocks [all]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--store", type=Path, default=Path("bench/results/pruners.json"))
    args = parser.parse_args()
    names = _list(args.methods) if args.methods else list(METHODS)
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; use {'; '.join(METHODS)}")
    try:
        patterns = [str(s3.Pattern.parse(text)) for text in _list(args.patterns)]
    except s3.PatternError as error:
        parser.error(str(error))

    dense, tokenizer = hf.load_model(args.model or packaged_model(), device=args.device)
    held_out = llm.windows(
        llm.tokenize(llm.load_text("pydoc", "held-out"), tokenizer), args.eval_samples, 1024
    )
    calibration = llm.calibration_tokens("pydoc", tokenizer, args.samples, args.seq_len)
    before = {"method": "dense", "perplexity": s3.perplexity(dense, held_out)}
    print(f"{'dense':24} perplexity {before['perplexity']:8.3f}", flush=True)
    tables: list[dict[str, Any]] = []
    for pattern in patterns:
        tables.append({"pattern": pattern, "rows": [before]})
        print(pattern)
        for name in names:
            row = measure(name, dense, pattern, calibration, held_out, args.blocks)
            tables[-1]["rows"].append(row)
            print(
                f"{name:24} perplexity {row['perplexity']:8.3f}   {row['seconds']:7.1f} s, "
                f"{row['solver_seconds']:7.1f} s of them in the pruner",
                flush=True,
            )
    document = {
        "pattern": patterns[0],
        "calibration": {"text": "pydoc", "samples": args.samples, "seq_len": args.seq_len},
        "held_out_tokens": held_out.numel(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "rows": tables[0]["rows"],
        "tables": tables,
    }
    args.store.parent.mkdir(parents=True, exist_ok=True)
    args.store.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"stored in {args.store}")


def measure(
    name: str,
    dense: torch.nn.Module,
    pattern: str,
    calibration: list[torch.Tensor],  # (1, tokens) each
    held_out: torch.Tensor,  # (sequences, tokens)
    blocks: int | None,
) -> dict[str, Any]:
    """Perplexity and seconds of a copy of the model pruned by one method."""
    pruner, options = METHODS[name]
    model = copy.deepcopy(dense)
    report = llm.prune_model(
        model, calibration, pattern, pruner, compress=False, blocks=blocks, **options
    )
    return {
        "method": name,
        "perplexity": s3.perplexity(model, held_out),
        "seconds": round(report.seconds, 2),
        "solver_seconds": round(report.solver_seconds, 2),
        "recovery": report.recovery,
        "median_error": report.summary()["median_error"],
    }


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


if __name__ == "__main__":
    main()
