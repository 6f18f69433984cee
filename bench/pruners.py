"""A benchmark of pruners: the same layers, Hessians and tokens for each; anyone can run and extend it.

    python bench/pruners.py                          # SmolLM2-135M, 2:4: about half an hour on 2 cores
    python bench/pruners.py --patterns "2:4;rowpair16;coupled2:4" --methods "sparsegpt;S-OBS;admm + recovery"
    python bench/pruners.py --extend mine.py         # your own methods

For each method: the error of the linears of one block under the dense model's Hessians, the same for all;
then the whole model pruned from the dense one, its perplexity on held-out topics, the median error of its
linears, seconds and peak memory (on a GPU that of the method, on a CPU that of the process so far). Model,
calibration and held-out text are those of ``examples/demo.py``; the two texts share no topic. The JSON has
the first pattern's rows under "pattern" and "rows", which the README shows, and those of all under "tables".

A method of your own, in a file for ``--extend``::

    from pruners import method
    import s3tensor as s3

    @method("mine")
    def mine(weight, factors, pattern):  # (M, K); s3.Factors of (K, K), damped; s3.Pattern
        mask = s3.project(weight, pattern, weight.abs() * factors.diagonal.sqrt())
        return s3.prune.Pruned(weight * mask, mask)

Rivals from other libraries run if their packages are installed or in ``--rivals FOLDER``; otherwise their
rows say what is missing. ``pip install --no-deps --target FOLDER llmcompressor loguru`` is all that
llm-compressor's SparseGPT and Wanda need: their two files are loaded without the package, which would import
datasets, accelerate and auto-round. ModelOpt's SparseGPT takes ``nvidia-modelopt omegaconf
antlr4-python3-runtime==4.9.3 pulp nvidia-ml-py ninja`` and scipy, pydantic, regex and rich. It only chooses
masks and leaves the kept weights as they are; its damping, 0.1, is its default. All run offline and on a CPU,
on N:M and unstructured patterns only.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import DEVICE, RESULTS, device_name, held_out, packaged_model, versions, write_json
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import llm, prune
from s3tensor.io import pretrained as hf

METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (pruner, options of prune_model)
    "magnitude": ("magnitude", {}),
    "wanda": ("wanda", {}),
    "sparsegpt": ("sparsegpt", {}),
    "S-OBS": ("obs", {"alpha": 0.0}),  # the method of the S3 paper
    "S-OBS, dense target": ("obs", {}),
    "admm, no dense target": ("admm", {"alpha": 0.0}),
    "admm, beta 0": ("admm", {"beta": 0.0}),  # dense target, no correction of drift
    "admm, damp 0.01": ("admm", {}),  # drift of the residual stream corrected, too
    "admm": ("admm", {"damp": None}),  # the default: damp chosen for each input
    # Chosen on calibration sequences, for each input:
    "admm, auto alpha": ("admm", {"alpha": "auto"}),
    "admm, auto alpha and damp": ("admm", {"alpha": "auto", "damp": "auto"}),
    "admm, mixed budgets": ("admm", {"budgets": "mixed"}),
    "admm + recovery": ("admm", {"damp": None, "recover": 300}),
}
DAMP = 0.01  # of every Hessian, where a method names no other


def method(name: str, **options: Any) -> Callable[[Callable[..., prune.Pruned]], Any]:
    """Register a pruner ``(weight, factors, pattern) -> Pruned`` under a name.

    Args:
        options: of ``prune_model``, such as ``recover=300``.
    """

    def register(pruner: Callable[..., prune.Pruned]) -> Callable[..., prune.Pruned]:
        prune.PRUNERS[name] = pruner
        METHODS[name] = name, options
        return pruner

    return register


# Rivals -----------------------------------------------------------------------------------------------


def _file_of(package: str, path: str) -> Any:
    """A module loaded from its file alone, without the package around it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    file = Path(next(iter(spec.submodule_search_locations))) / path
    found = importlib.util.spec_from_file_location(f"_{package}_{file.stem}", file)
    if found is None or found.loader is None or not file.is_file():
        raise ImportError(f"{package} has no {path}")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@functools.cache
def _llmcompressor(name: str, file: str) -> Any:
    return _file_of("llmcompressor", f"modifiers/pruning/{name}/{file}.py")


@functools.cache
def _modelopt() -> Any:
    return importlib.import_module("modelopt.torch.sparsity.weight_sparsity.sparsegpt")


def pruned_of(pattern: s3.Pattern) -> tuple[int, int, float]:
    """What rivals take: N **pruned** of M and 0, or 0 of 0 and the pruned share."""
    if pattern.view is None and pattern.block == (1, 1) and pattern.scope[0] == 1:
        if pattern.scope == (1, -1) and isinstance(pattern.keep, float):
            return 0, 0, 1.0 - pattern.keep
        if pattern.scope != (1, -1):
            return pattern.scope[1] - int(pattern.keep), pattern.scope[1], 0.0
    raise s3.PatternError(f"this library has no {pattern}; it has N:M and unstructured ones")


def undamped(factors: s3.Factors) -> Tensor:
    """The Hessian (K, K) as it was given; a copy, because rivals write into it."""
    hessian = factors.matrix.clone()
    hessian.diagonal().copy_(factors.diagonal)
    return hessian


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@method("llm-compressor sparsegpt")
def llmcompressor_sparsegpt(weight: Tensor, factors: s3.Factors, pattern: Any) -> prune.Pruned:
    """Their blocks of 128 columns and their damping, 0.01."""
    pruned, of, share = pruned_of(pattern)
    linear = _linear(weight)
    hessians = {linear: undamped(factors)}
    rival = _llmcompressor("sparsegpt", "sgpt_sparsify")
    found = rival.sparsify_weight(linear, hessians, share, pruned, of, 128, 0.01, False)[1]
    return prune.Pruned(found, found != 0)


@method("llm-compressor wanda")
def llmcompressor_wanda(weight: Tensor, factors: s3.Factors, pattern: Any) -> prune.Pruned:
    pruned, of, share = pruned_of(pattern)
    linear = _linear(weight)
    scalars = {linear: factors.diagonal.clone()}
    rival = _llmcompressor("wanda", "wanda_sparsify")
    found = rival.sparsify_weight(linear, scalars, share, pruned, of)
    return prune.Pruned(found, found != 0)


@method("ModelOpt sparsegpt")
def modelopt_sparsegpt(weight: Tensor, factors: s3.Factors, pattern: Any) -> prune.Pruned:
    pruned, of, share = pruned_of(pattern)
    if share:
        raise s3.PatternError(f"ModelOpt's SparseGPT has no {pattern}; it has N:M patterns")
    config = {
        "pattern": f"{pruned}:{of} sparsity",
        "hessian_damp": 0.1,
        "col_block_size": 128,
        "row_block_size": -1,
    }
    mask = _modelopt().create_sgpt_mask(weight, undamped(factors), config)
    return prune.Pruned(weight * mask, mask)


_IMPORTS: dict[str, Callable[[], Any]] = {  # made before the clock starts
    "llm-compressor sparsegpt": lambda: _llmcompressor("sparsegpt", "sgpt_sparsify"),
    "llm-compressor wanda": lambda: _llmcompressor("wanda", "wanda_sparsify"),
    "ModelOpt sparsegpt": _modelopt,
}


# What is measured -------------------------------------------------------------------------------------


@torch.no_grad()
def hessians(model: nn.Module, calibration: list[Tensor], block: int) -> dict[str, Tensor]:
    """X'X / N of each linear of one block in the dense model, by full name."""
    prefix, blocks = llm.decoder_blocks(model)
    layers, _ = llm.prunable_layers(
        blocks[block], f"{prefix}.{block}", s3.Pattern.parse("unstructured@1")
    )
    found = {layer.name: s3.Hessian(layer.shape[1]) for layer in layers}
    with llm.ModuleInputCatcher([layer.module for layer in layers], stop=False) as catcher:
        for batch in calibration:
            model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
            for n, layer in enumerate(layers):
                found[layer.name].update(catcher.pop(n)[0][0])
    return {name: hessian.value() for name, hessian in found.items()}


def measure_layers(
    name: str, model: nn.Module, given: dict[str, Tensor], pattern: str
) -> dict[str, Any]:
    """Errors and seconds of the bare pruner under the same Hessians; no dense target, no recovery."""
    pruner = prune.get(METHODS[name][0])
    errors, start = {}, time.perf_counter()
    for layer, hessian in given.items():
        weight = model.get_submodule(layer).weight.detach()
        found = pruner(weight, s3.Factors(hessian, DAMP), s3.Pattern.parse(pattern))
        errors[layer] = s3.output_error(found.weight, weight, hessian)
    return {
        "layer_error": statistics.fmean(errors.values()),
        "layer_seconds": round(time.perf_counter() - start, 3),
        "layer_errors": errors,
    }


def measure(
    name: str,
    dense: nn.Module,
    pattern: str,
    calibration: list[Tensor],  # (1, tokens) each
    windows: Tensor,  # (sequences, tokens), held out
    blocks: int | None,
    given: dict[str, Tensor] | None = None,  # Hessians for measure_layers
) -> dict[str, Any]:
    """A row: errors on the same Hessians, then a copy of the model pruned whole."""
    pruner, options = METHODS[name]
    try:
        _IMPORTS.get(name, bool)()
        row = {"method": name, **(measure_layers(name, dense, given, pattern) if given else {})}
        model = copy.deepcopy(dense)
        report = llm.prune_model(
            model,
            calibration,
            pattern,
            pruner,
            **{"damp": DAMP, "compress": False, "blocks": blocks, "progress": False, **options},
        )
    except (ImportError, s3.S3Error, torch.OutOfMemoryError) as error:
        return {"method": name, "skipped": " ".join(str(error).split())}
    return {
        **row,
        "perplexity": s3.perplexity(model, windows),
        "median_error": report.summary()["median_error"],
        "last_block_error": report.blocks[-1].error,
        "seconds": round(report.seconds, 2),
        "solver_seconds": round(report.solver_seconds, 2),
        "peak_memory_bytes": max(row.peak_memory_bytes for row in report.blocks),
        "patterns": report.patterns,
        "recovery": report.recovery,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures of one pattern as a pandas table."""
    import pandas as pd

    columns = ["layer_error", "layer_seconds", "perplexity", "median_error", "seconds"]
    frame = pd.DataFrame(rows).set_index("method")
    frame["peak GB"] = frame.get("peak_memory_bytes", pd.Series(math.nan, frame.index)) / 1e9
    kept = [c for c in [*columns, "solver_seconds", "peak GB"] if c in frame]
    return frame[kept].to_string(float_format="{:.4g}".format, na_rep="")


# The command ------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="a .gguf file or Hugging Face folder [SmolLM2-135M]"
    )
    parser.add_argument("--patterns", default="2:4", help="patterns divided by ';' [2:4]")
    parser.add_argument("--methods", help="names divided by ';' [all]; a wrong one lists them")
    parser.add_argument("--extend", type=Path, help="a Python file that registers methods")
    parser.add_argument("--rivals", type=Path, help="a folder with the packages of other libraries")
    parser.add_argument("--samples", type=int, default=24, help="calibration sequences")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a calibration sequence")
    parser.add_argument(
        "--eval-samples", type=int, default=16, help="held-out sequences of 1024 tokens"
    )
    parser.add_argument("--blocks", type=int, help="prune only the first so many blocks [all]")
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--store", type=Path, default=RESULTS / "pruners.json")
    args = parser.parse_args()
    if args.rivals:
        sys.path.append(str(args.rivals))  # last: what is installed counts first
    if args.extend:
        sys.modules["pruners"] = sys.modules[__name__]  # so that the file registers here
        spec = importlib.util.spec_from_file_location("extension", args.extend)
        if spec is None or spec.loader is None or not args.extend.is_file():
            parser.error(f"--extend {args.extend}: no Python file")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    names = _list(args.methods) if args.methods else list(METHODS)
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; use {'; '.join(METHODS)}")
    try:
        patterns = [str(s3.Pattern.parse(text)) for text in _list(args.patterns)]
    except s3.PatternError as error:
        parser.error(str(error))

    dense, tokenizer = hf.load_model(args.model or packaged_model(), device=args.device)
    windows = held_out(tokenizer, args.eval_samples)
    calibration = llm.calibration_tokens("pydoc", tokenizer, args.samples, args.seq_len)
    middle = len(llm.decoder_blocks(dense)[1]) // 2
    given = hessians(dense, calibration, middle)
    before = {"method": "dense", "perplexity": s3.perplexity(dense, windows)}
    print(f"{'dense':24} perplexity {before['perplexity']:8.3f}", flush=True)
    tables: list[dict[str, Any]] = []
    document = {
        "pattern": patterns[0],
        "calibration": {"text": "pydoc", "samples": args.samples, "seq_len": args.seq_len},
        "held_out_tokens": windows.numel(),
        "layers_of_block": middle,
        "blocks": args.blocks,
        "damp": DAMP,
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers", "llmcompressor", "nvidia-modelopt"),
    }
    for pattern in patterns:
        tables.append({"pattern": pattern, "rows": [before]})
        for name in names:
            row = measure(name, dense, pattern, calibration, windows, args.blocks, given)
            tables[-1]["rows"].append(row)
            _print_row(pattern, row)
            whole = {**document, "rows": tables[0]["rows"], "tables": tables}
            write_json(args.store, whole)
        print(f"\n{pattern}\n{table(tables[-1]['rows'])}\n", flush=True)
    print(f"stored in {args.store}")


def _print_row(pattern: str, row: dict[str, Any]) -> None:
    if "skipped" in row:
        print(f"{pattern:10} {row['method']:24} left out: {row['skipped']}", flush=True)
        return
    print(
        f"{pattern:10} {row['method']:24} layers {row.get('layer_error', math.nan):.4f}, perplexity "
        f"{row['perplexity']:8.3f}   {row['seconds']:7.1f} s, {row['solver_seconds']:7.1f} s of them in "
        "the pruner",
        flush=True,
    )


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


if __name__ == "__main__":
    main()
