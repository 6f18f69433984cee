"""A real model with whole channels and heads taken out: equal outputs, parameters, seconds per token.

    python bench/compact.py                   # SmolLM2-135M on a CPU, about 10 minutes

Each case prunes the model of ``examples/demo.py``, keeps a masked copy, compacts the model, and compares the
two: outputs first, then time. The masked model is as large and as slow as the dense one. Blocks are chosen by
the coupled norms of their weights, or by Structured OBS on the projection that reads them (whole columns of
``down_proj`` and ``o_proj``), which also adjusts the weights that stay; perplexity shows the difference.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, device_name, held_out, packaged_model, versions, write_json
from torch import nn
from transformers import AutoModelForCausalLM

import s3tensor as s3
from s3tensor import llm
from s3tensor.io import pretrained as hf
from s3tensor.model.compact import units

BY_NORM: dict[str, dict[str, float]] = {
    "channels 0.75": {"channels": 0.75},
    "heads 2/3": {"heads": 2 / 3},
    "channels 0.75, heads 2/3, hidden 0.75": {"channels": 0.75, "heads": 2 / 3, "hidden": 0.75},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="another .gguf file or Hugging Face folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32, help="decoded one by one")
    parser.add_argument("--rounds", type=int, default=7, help="timings to take the median of")
    parser.add_argument("--eval-samples", type=int, default=4, help="held-out windows of 512")
    parser.add_argument("--samples", type=int, default=6, help="calibration windows of 512")
    parser.add_argument("--out", type=Path, default=RESULTS / "compact.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = hf.load_model(args.model or packaged_model())
    model.eval()
    windows = held_out(tokenizer, args.eval_samples, 512)
    calibration = llm.calibration_tokens("pydoc", tokenizer, args.samples, 512)
    record: dict[str, Any] = {
        "model": (args.model or packaged_model()).name,
        "device": device_name("cpu"),
        "threads": args.threads,
        "new_tokens": args.new_tokens,
        "held_out_tokens": windows.numel(),
        "calibration_tokens": sum(batch.numel() for batch in calibration),
        "versions": versions("torch", "transformers", "s3tensor"),
        "dense": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "perplexity": s3.perplexity(model, windows, seq_len=512),
        },
        "cases": {},
    }
    print(f"dense: {record['dense']}", flush=True)

    def add(name: str, masked: nn.Module) -> None:
        record["cases"][name] = measure(masked, windows, name, args.new_tokens, args.rounds)
        print(f"{name}: {json.dumps(record['cases'][name])}", flush=True)

    for name, densities in BY_NORM.items():
        add(f"{name}, by norm", masked_by_norm(model, densities))
    prune_columns(model, calibration, "down_proj", 1, 0.75)
    add("channels 0.75, by OBS", model)
    group = units(model, "heads")[0].parts[-1].size
    prune_columns(model, calibration, "o_proj", group, 2 / 3)
    add("channels 0.75, heads 2/3, by OBS", model)

    if hasattr(os, "getloadavg"):  # above the number of threads, the machine was busy
        record["load_average"] = [round(load, 1) for load in os.getloadavg()]
    write_json(args.out, record)
    print(table(record))


def masked_by_norm(model: nn.Module, densities: dict[str, float]) -> nn.Module:
    """A copy of the model with each unit's blocks of the smallest norms at zero."""
    masked = copy.deepcopy(model)
    choices = []
    for kind, density in densities.items():
        for unit in units(masked, kind):  # type: ignore[arg-type]
            choices.append(unit.scope().get_masks(nnz=int(density * unit.count + 0.5)))
    for masks in choices:
        for spec, mask in masks.items():
            spec.set_data(spec.data * mask)
    return masked


def prune_columns(
    model: nn.Module, calibration: list[torch.Tensor], name: str, width: int, density: float
) -> None:
    """Prune blocks of ``width`` whole columns of every linear of a name, in place, by Structured OBS."""
    pattern = s3.Pattern(block=(-1, width), scope=(1, -1), keep=density)
    llm.prune_model(
        model,
        calibration,
        pattern,
        "obs",
        damp=0.01,
        compress=False,
        filter_fn=lambda _, own: own.endswith(name),
    )


def measure(
    masked: nn.Module,
    windows: torch.Tensor,  # (B, 512)
    name: str,
    new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """One case: the masked model against the compacted one."""
    small = copy.deepcopy(masked)
    # Zero channels and heads are removed by default; the residual stream is only narrowed when asked.
    densities = {"hidden": 0.75} if "hidden" in name else {}
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
        which: {what: statistics.median(values) for what, values in taken.items()}
        for which, taken in timings.items()
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
    """Seconds per token of a prompt of 256 tokens and of greedy decoding after it."""
    # The argument's name changed in transformers 5.
    known = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in known else "past_key_values"
    with torch.inference_mode():
        start = time.perf_counter()
        state = model(input_ids=tokens, use_cache=True)
        prompt = (time.perf_counter() - start) / tokens.numel()
        following, held = state.logits[:, -1:].argmax(-1), state.past_key_values
        start = time.perf_counter()
        for _ in range(new_tokens):
            state = model(input_ids=following, use_cache=True, **{argument: held})
            following, held = state.logits[:, -1:].argmax(-1), state.past_key_values
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
