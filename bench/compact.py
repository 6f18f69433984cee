"""A real model with whole channels and heads taken out: equal outputs, parameters, seconds per token.

    python bench/compact.py                   # SmolLM2-135M on a CPU, about 4 minutes

The model is the one of ``examples/demo.py``. Each case prunes it by the coupled norms of its blocks, keeps a
copy that is only masked, compacts it, and compares the two on held-out text: the answer first, then the
time. The masked model is as large and as slow as the dense one. Perplexity shows what the decision alone
costs: nothing is compensated or recovered here.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import s3tensor as s3
from s3tensor import hf, llm
from s3tensor.compaction import units

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from demo import packaged_model

CASES: dict[str, dict[str, float]] = {
    "channels 0.75": {"channels": 0.75},
    "heads 2/3": {"heads": 2 / 3},
    "channels 0.75, heads 2/3": {"channels": 0.75, "heads": 2 / 3},
    "channels 0.75, heads 2/3, hidden 0.75": {"channels": 0.75, "heads": 2 / 3, "hidden": 0.75},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="another .gguf file or Hugging Face folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded one by one")
    parser.add_argument("--rounds", type=int, default=5, help="timings of which the median counts")
    parser.add_argument("--eval-samples", type=int, default=4, help="held-out windows of 512")
    parser.add_argument("--out", type=Path, default=Path("bench/results/compact.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = hf.load_model(args.model or packaged_model())
    model.eval()
    text = llm.tokenize(llm.load_text("pydoc", "held-out"), tokenizer)
    windows = llm.windows(text, args.eval_samples, 512)
    record: dict[str, Any] = {
        "model": getattr(model.config, "name_or_path", "") or packaged_model().name,
        "device": platform.processor() or platform.machine(),
        "threads": args.threads,
        "new_tokens": args.new_tokens,
        "held_out_tokens": windows.numel(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "s3tensor")
        },
        "dense": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "perplexity": s3.perplexity(model, windows, seq_len=512),
        },
        "cases": {},
    }
    print(f"dense: {record['dense']}", flush=True)
    for name, densities in CASES.items():
        record["cases"][name] = measure(model, windows, densities, args.new_tokens, args.rounds)
        print(f"{name}: {json.dumps(record['cases'][name])}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))


def measure(
    model: nn.Module,
    windows: torch.Tensor,  # (B, 512)
    densities: dict[str, float],
    new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """One case: the masked model against the compacted one."""
    masked, small = copy.deepcopy(model), copy.deepcopy(model)
    choices = []
    for kind, density in densities.items():
        for unit in units(masked, kind):  # type: ignore[arg-type]
            scope = unit.scope()
            choices.append(scope.get_masks(nnz=int(density * unit.count + 0.5)))
    for masks in choices:
        for spec, mask in masks.items():
            spec.set_data(spec.data * mask)
    start = time.perf_counter()
    report = s3.compact(small, **densities)
    seconds = time.perf_counter() - start
    tokens = windows[:1, :256]
    with torch.inference_mode():
        expected, found = masked(input_ids=tokens).logits, small(input_ids=tokens).logits
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)  # type: ignore[operator]
        reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.inference_mode():
            again = reloaded(input_ids=tokens).logits
    timings: dict[str, dict[str, list[float]]] = {"masked": {}, "compact": {}}
    for _ in range(rounds):  # in turn, so that a busy machine slows both
        for which, each in (("masked", masked), ("compact", small)):
            for what, value in timed(each, tokens, new_tokens).items():
                timings[which].setdefault(what, []).append(value)
    middle = {
        which: {what: statistics.median(values) for what, values in found.items()}
        for which, found in timings.items()
    }
    return {
        "relative_difference": float((found - expected).norm() / expected.norm()),
        "reload_equal": bool(torch.equal(again, found)),
        "configuration": report.problem or "describes the model",
        "parameters": {"before": report.parameters_before, "after": report.parameters_after},
        "seconds_to_compact": round(seconds, 3),
        "seconds_per_token": {
            what: {"before": middle["masked"][what], "after": middle["compact"][what]}
            for what in middle["masked"]
        },
        "perplexity": s3.perplexity(small, windows, seq_len=512),
    }


def timed(model: nn.Module, tokens: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Seconds per token of a prompt of 256 and of greedy decoding behind it."""
    with torch.inference_mode():
        start = time.perf_counter()
        state = model(input_ids=tokens, use_cache=True)
        prompt = (time.perf_counter() - start) / tokens.numel()
        following, cache = state.logits[:, -1:].argmax(-1), state.past_key_values
        start = time.perf_counter()
        for _ in range(new_tokens):
            state = model(input_ids=following, past_key_values=cache, use_cache=True)
            following, cache = state.logits[:, -1:].argmax(-1), state.past_key_values
        return {"prompt": prompt, "decoding": (time.perf_counter() - start) / new_tokens}


def table(record: dict[str, Any]) -> str:
    """The figures in Markdown."""
    dense = record["dense"]
    lines = [
        f"{record['model']}, {record['device']}, {record['threads']} thread(s), torch "
        f"{record['versions']['torch']}; dense perplexity {dense['perplexity']:.2f}",
        "",
        "| kept | difference to masked | parameters | ms/token, prompt | ms/token, decoding | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in record["cases"].items():
        sizes, times = case["parameters"], case["seconds_per_token"]
        pairs = [
            f"{1e3 * times[what]['before']:.2f} to {1e3 * times[what]['after']:.2f}"
            for what in ("prompt", "decoding")
        ]
        lines.append(
            f"| {name} | {case['relative_difference']:.1e} | {sizes['before'] / 1e6:.1f} to "
            f"{sizes['after'] / 1e6:.1f} M | {pairs[0]} | {pairs[1]} | {case['perplexity']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
