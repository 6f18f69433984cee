"""int8 values inside compressed weights: microseconds, bytes and errors beside bfloat16 values and dense.

    python bench/int8.py --out int8.json                   # Qwen3-4B's linears, batches 1, 4, 16
    python bench/int8.py --tune --forms 2:4                # every configuration, the best first
    python bench/int8.py --shapes "" --pruned FOLDER       # perplexity before and after quantize_
    python bench/int8.py --device cpu --shapes 64x128 --repeats 2      # to try it

Each time is the median of CUDA graph replays; a graph runs the product with enough copies of the weight (400
MB of them) that none is found in L2, and the weights of a shape take turns in one run. Every product is
compared with float64 before it is timed: ``error`` is that of the outputs against the product by the float
weight, the rounding to int8 included. What to expect is in the bytes: of a group of four, dense bfloat16
reads 8, 2:4 in bfloat16 4.5, with int8 values 2.5 (coupled2:4 and pair4:8: 4.25 and 2.25, rowpair16: 4.016
and 2.016).

``--pruned FOLDER`` is a model that ``s3tensor.save_pretrained`` wrote compressed; ``--model`` is a dense one,
a .gguf file or a folder, which is pruned by magnitude first, to try it. The JSON is written after each part.
"""

from __future__ import annotations

import argparse
import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    DEVICE,
    compile_all,
    copies_of,
    gpu,
    held_out,
    integers,
    relative_error,
    shapes,
    write_json,
)
from torch import Tensor

import s3tensor as s3
from s3tensor import benchmark

SHAPES = "2560x9728,9728x2560,4096x2560,2560x4096,1024x2560"  # Qwen3-4B: down, up, q, o, k
Case = tuple[str, int, int, int, Any]  # form, rows, columns, batch, configuration or None


def compile_one(case: Case) -> None:
    """Run a product on zeros."""
    form, rows, columns, batch, cut = case
    weight = s3.StructuredSparseTensor.from_dense(
        torch.zeros(rows, columns, device="cuda", dtype=torch.bfloat16), form
    )
    small = s3.Int8SparseTensor.from_sparse(weight)
    x = torch.zeros(batch, columns, device="cuda", dtype=torch.bfloat16)
    if cut is None:
        F.linear(x, weight)
        F.linear(x, small)
    else:
        cut_product(x, small, cut)


def cut_product(x: Tensor, weight: Any, cut: Any) -> Tensor:
    """One product by the kernel for int8 values, in a given configuration."""
    from s3tensor.kernels import matmul

    y: Tensor = matmul.linear(
        x, weight.packed, weight.indices, None, form=str(weight.pattern), rows=weight.shape[0],
        columns=weight.shape[1], tiled=True, overlap=True, config=cut, scales=weight.scales,
    )  # type: ignore[arg-type]  # fmt: skip
    return y


def copies(weight: Any, nbytes: int, device: torch.device) -> list[Any]:
    count = copies_of(nbytes, benchmark.ROTATE / 1e6) if device.type == "cuda" else 1
    return [weight, *(weight.clone() for _ in range(count - 1))]


def products(
    forms: list[str], shape: tuple[int, int], batch: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Dense, and of each form bfloat16 and int8 values, timed in turns on one shape and batch."""
    rows, columns = shape
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, columns, device=device, generator=generator).bfloat16()
    groups: dict[str, list[Any]] = {}
    facts: dict[str, dict[str, Any]] = {}

    def add(name: str, weight: Any, nbytes: int, exact: Tensor, **more: Any) -> None:
        y = F.linear(x, weight)
        groups[name] = [partial(F.linear, x, copy) for copy in copies(weight, nbytes, device)]
        facts[name] = {"name": name, "bytes": nbytes, "error": relative_error(y, exact), **more}

    whole = torch.randn(shape, device=device, generator=generator).bfloat16()
    add("dense", whole, whole.nbytes, x.double() @ whole.double().t())
    for form in forms:
        weight = s3.StructuredSparseTensor.from_dense(whole, form)
        small = s3.Int8SparseTensor.from_sparse(weight)
        exact = x.double() @ weight.to_dense().double().t()
        add(f"{form} bfloat16", weight, weight.nbytes_compressed, exact)
        own = x.double() @ small.to_dense(torch.float64).t()
        kernel = relative_error(F.linear(x, small), own)  # its own rounding, without that to int8
        limit = 5e-3 if small.tiled else 1e-2  # the other path rounds the weight to bfloat16 too
        if not kernel < limit:
            raise s3.ModelError(f"{form} on {rows}x{columns}: wrong, relative error {kernel:.1e}")
        add(f"{form} int8", small, small.nbytes_compressed, exact, kernel_error=kernel)
    times = benchmark.times(groups, device, repeats)
    moved = 2 * batch * (rows + columns)
    return [
        {
            "shape": f"{rows}x{columns}",
            "batch": batch,
            **fact,
            "us": round(times[name], 2),
            "speedup": round(times["dense"] / times[name], 3),
            "bytes_of_dense": round(fact["bytes"] / whole.nbytes, 4),
            "gb_per_s": round((fact["bytes"] + moved) / times[name] / 1e3),
        }
        for name, fact in facts.items()
    ]


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['shape']:>12} batch {row['batch']:>3} {row['name']:<20}{row['us']:>8.1f} us"
        f"{row['speedup']:>7.2f}x{row['bytes_of_dense']:>8.3f} of the bytes{row['gb_per_s']:>6} GB/s"
        f"  error {row['error']:.1e}",
        flush=True,
    )


def cuts(form: str, batch: int) -> list[Any]:
    from s3tensor.kernels.skinny import Skinny

    found = []
    for size in (8,) if batch <= 8 else (16,) if batch <= 16 else (16, 32):
        for warps, units in itertools.product((2, 4, 8, 16), (1, 2, 4, 8)):
            if warps * units > 32 or (size >= 16 and units == 8):
                continue
            for ahead, by_float32 in itertools.product((False, True), repeat=2):
                if form == "2:4" or not by_float32:
                    found.append(Skinny(1, warps, 1, units, size, 1, ahead, by_float32))
        found += [Skinny(1, 4, 2, 2, size, 1, True), Skinny(1, 8, 1, 2, size, 2, True)]
        found += [Skinny(1, 4, 2, 1, size), Skinny(1, 8, 1, 2, size, 2)]
    return found


def tune(
    forms: list[str], shape: tuple[int, int], batch: int, device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Every configuration on one shape and batch, the fastest first."""
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(batch, shape[1], device=device, generator=generator).bfloat16()
    found = []
    for form in forms:
        weight = s3.Int8SparseTensor.from_sparse(
            benchmark.random_weight(form, shape, torch.bfloat16, device)
        )
        twins = copies(weight, weight.nbytes_compressed, device)
        exact = x.double() @ weight.to_dense(torch.float64).t()
        groups: dict[str, list[Any]] = {}
        for cut in cuts(form, batch):
            if cut.columns > shape[1]:
                continue
            try:
                wrong = relative_error(cut_product(x, weight, cut), exact)
            except Exception as error:  # more registers or shared memory than there are
                print("cannot run", cut, str(error)[:120], flush=True)
                continue
            if not wrong < 5e-3:
                raise s3.ModelError(f"{cut} on {shape}: wrong, relative error {wrong:.1e}")
            groups[str(cut)] = [partial(cut_product, x, twin, cut) for twin in twins]
        times = benchmark.times(groups, device, repeats)
        for name, us in sorted(times.items(), key=lambda item: item[1]):
            where = {"form": form, "shape": f"{shape[0]}x{shape[1]}", "batch": batch}
            found.append({**where, "cut": name, "us": us})
    return found


def model_part(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Perplexity, bytes and seconds of a pruned model before and after ``quantize_``."""
    from s3tensor.io import pretrained as hf

    source = args.pruned or args.model
    model, tokenizer = hf.load_model(source, device=str(device))
    if args.pruned is None:
        s3.sparsify_(model, "2:4")
    tokens = held_out(tokenizer, args.eval_samples)
    before = s3.perplexity(model, tokens)
    began = time.time()
    report = s3.quantize_(model)
    seconds = time.time() - began
    print(report)
    after = s3.perplexity(model, tokens)
    print(f"perplexity {before:.4f} before, {after:.4f} with int8 values ({tokens.numel()} tokens)")
    return {
        "source": Path(source).name,
        "pruned_by": "magnitude, 2:4" if args.pruned is None else None,
        "tokens": tokens.numel(),
        "perplexity": before,
        "perplexity_int8": after,
        "bytes": report.before,
        "bytes_int8": report.after,
        "bytes_dense": report.dense,
        "largest_error": max(row.error for row in report.rows),
        "quantize_seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shapes", default=SHAPES, help="rows x columns, by commas; empty for none")
    add("--batches", default="1,4,16")
    add("--forms", default="2:4,rowpair16,coupled2:4,pair4:8")
    add("--repeats", type=int, default=9)
    add("--device", default=DEVICE)
    add("--tune", action="store_true", help="time every configuration of the kernel")
    add("--pruned", type=Path, help="a compressed folder, for perplexity")
    add("--model", type=Path, help="a dense model, pruned by magnitude, for perplexity")
    add("--eval-samples", type=int, default=16, help="held-out sequences of 1024 tokens")
    add("--out", type=Path, help="write JSON there, after each part")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        device = gpu()
    sizes, batches = shapes(args.shapes), integers(args.batches)
    forms = args.forms.split(",")
    record: dict[str, Any] = {**benchmark._machine(device), "rows": []}
    began = time.time()

    def save() -> None:
        if args.out is not None:
            write_json(args.out, record)

    if device.type == "cuda":
        every = itertools.product(forms, sizes, batches)
        cases: list[Case] = []
        for form, (rows, columns), batch in every:
            choices = cuts(form, batch) if args.tune else [None]
            cases += [(form, rows, columns, batch, cut) for cut in choices]
        if cases:
            compile_all(compile_one, cases)
        record["compile_seconds"] = round(time.time() - began, 1)
        record["copy_gb_per_s"] = round(benchmark.copy_bandwidth(device) / 1e9)
        print(
            f"{record['device']}: {record['copy_gb_per_s']} GB/s, compiled in {time.time() - began:.0f} s"
        )
    for shape, batch in itertools.product(sizes, batches):
        if args.tune:
            found = tune(forms, shape, batch, device, args.repeats)
            first = [row for form in forms for row in [r for r in found if r["form"] == form][:4]]
            for row in first:
                print(
                    f"{row['form']} {row['shape']} batch {batch} {row['us']:8.2f} us {row['cut']}",
                    flush=True,
                )
        else:
            found = products(forms, shape, batch, device, args.repeats)
            for row in found:
                show(row)
        record["rows"] += found
        record["seconds"] = round(time.time() - began, 1)
        save()
    if args.pruned is not None or args.model is not None:
        record["model"] = model_part(args, device)
        save()
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    main()
