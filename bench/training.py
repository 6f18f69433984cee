"""Time of a training step under 2:4: every mode of S3Sparse as a ratio to dense.

    python bench/training.py            # one H200: about three minutes, half of it compilation
    python bench/training.py --tiny     # on a CPU, to see that it runs

A block of three linears, width 4096 to 4096, 4096 to 14336 and 14336 to 4096, is trained with float32
masters, bfloat16 autocast and fused AdamW. A step is forward, backward, optimizer and, where the mode needs
it, s3.step. All variants take turns in every round of ten steps, so that "refresh 10" refreshes once in
each; a ratio is the median over rounds of a variant's time over dense's in the same round. Ways are eager,
compiled, and "graphs" (compiled with CUDA graphs). Variants with "sparse cores" are under s3.sparse_cores_.
The file is written after each part.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import DEVICE, RESULTS, device_name, integers, relative_error, versions, write_json
from torch import Tensor, nn

import s3tensor as s3

STEPS = 10  # of a round
VARIANTS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "dense": None,
    "fixed": ("fixed", {}),
    "ste": ("ste", {}),
    "srste": ("srste", {}),
    "soft": ("soft", {}),
    "ste, refresh 10": ("ste", {"refresh": 10}),
    "srste, refresh 10": ("srste", {"refresh": 10}),
    "soft, refresh 10": ("soft", {"refresh": 10}),
    "ste, transposable, refresh 10": ("ste", {"refresh": 10, "transposable": True}),
    "fixed, sparse cores": ("fixed", {}),
    "ste, sparse cores": ("ste", {}),
    "soft, sparse cores": ("soft", {}),
    "fixed, transposable, sparse cores": ("fixed", {"transposable": True}),
    "ste, transposable, sparse cores": ("ste", {"transposable": True}),
    "ste, transposable, refresh 10, sparse cores": ("ste", {"refresh": 10, "transposable": True}),
    "soft, transposable, refresh 10, sparse cores": ("soft", {"refresh": 10, "transposable": True}),
}


@dataclass
class Trainer:
    """One variant: its block, its forward, its optimizer."""

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    counts: bool  # whether s3.step is part of a step

    def step(self, x: Tensor, grad: Tensor) -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = self.forward(x)
        y.backward(grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.counts:
            s3.step(self.model)


def build(
    name: str, pattern: str, widths: tuple[int, int], device: torch.device, way: str
) -> Trainer:
    variant = VARIANTS[name]
    torch.manual_seed(0)
    narrow, wide = widths
    with device:
        model = nn.Sequential(
            nn.Linear(narrow, narrow, bias=False),
            nn.Linear(narrow, wide, bias=False),
            nn.GELU(),
            nn.Linear(wide, narrow, bias=False),
        )
    if variant is not None:
        s3.sparsify_training_(model, pattern, variant[0], **variant[1])
    if name.endswith("sparse cores"):
        s3.sparse_cores_(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    forward = model
    if way == "compiled":
        forward = torch.compile(model, fullgraph=True, dynamic=True)
    elif way == "graphs":
        forward = torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead")
    return Trainer(model, forward, optimizer, variant is not None and "refresh" in variant[1])


def seconds(run: Callable[[], None], device: torch.device) -> Callable[[], float]:
    """Run, and return a function that gives the seconds once the device is idle."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        spent = time.perf_counter() - start
        return lambda: spent
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    return lambda: first.elapsed_time(last) / 1000


def compare(
    trainers: dict[str, Trainer], tokens: int, width: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a step by variant, for each round."""
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    x.requires_grad_()  # as inside a network: the gradient goes on
    times: dict[str, list[float]] = {name: [] for name in trainers}

    def ten(trainer: Trainer) -> None:
        for _ in range(STEPS):
            trainer.step(x, grad)
            x.grad = None

    for trainer in trainers.values():
        ten(trainer)  # compiles, and warms up
    names = list(trainers)
    for number in range(rounds):
        turn = number % len(names)
        told = {}
        for name in names[turn:] + names[:turn]:
            told[name] = seconds(lambda name=name: ten(trainers[name]), device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        for name, tell in told.items():
            times[name].append(tell() / STEPS)
    return times


def in_a_graph(run: Callable[[], Any], calls: int = 20) -> tuple[float, str]:
    """Milliseconds of a call, and "graph"; or "stream", where no graph takes it and the host is in it."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()

    def many() -> None:
        for _ in range(calls):
            run()

    call, way = many, "stream"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            many()
        call, way = graph.replay, "graph"
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"not captured: {str(error).splitlines()[0]}", flush=True)
    times = [seconds(call, torch.device("cuda")) for _ in range(5)]
    torch.cuda.synchronize()
    return 1e3 * statistics.median(tell() for tell in times) / calls, way


def sparse_cores(shape: list[int], tokens: int, turned: bool) -> dict[str, Any]:
    """One product by a 2:4 weight, dense and by sparse tensor cores, and compressing the weight for it."""
    from s3tensor.kernels import cores, transposable

    master = torch.randn(shape, device="cuda")
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    weight = torch.where(s3.transposable(weight, "2:4"), weight, 0)
    if turned:  # the gradient of the input
        weight = weight.t()
    x = torch.randn(tokens, weight.shape[1], device="cuda", dtype=torch.bfloat16)
    held = cores.compress(weight)
    # Without its search cuSPARSELt takes an algorithm that may be slower than dense.
    algorithm, split, mode = torch._C._cusparselt.mm_search(held, x.t(), None, None, None, True)[:3]

    def product() -> Tensor:
        y: Tensor = torch._cslt_sparse_mm(
            held,
            x.t(),
            transpose_result=True,
            alg_id=algorithm,
            split_k=split,
            split_k_mode=mode,
        )
        return y

    error = relative_error(product(), torch.nn.functional.linear(x, weight).double())
    assert error < 0.02, f"the sparse product of {shape} differs by {error}"
    whole = weight.contiguous()
    calls = {
        "dense": lambda: torch.nn.functional.linear(x, weight),
        "product": product,
        "compress": lambda: cores.compress(weight),
        "torch_compress": lambda: torch._cslt_compress(whole),
        "transposable_mask": lambda: transposable.best(master, squared=True),
    }
    found = {name: in_a_graph(call) for name, call in calls.items()}
    return {
        "linear": shape,
        "tokens": tokens,
        "product": "input gradient" if turned else "forward",
        **{f"{name}_ms": ms for name, (ms, _) in found.items()},
        "timed_in": {name: way for name, (_, way) in found.items()},
    }


def check(trainers: dict[str, Trainer], pattern: str, device: torch.device, width: int) -> None:
    """Weights satisfy the pattern, and the two forwards agree."""
    x = torch.randn(32, width, device=device, dtype=torch.bfloat16)
    for name, trainer in trainers.items():
        if name != "dense":
            assert s3.satisfies(trainer.model[0].weight, pattern), name
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            y, expected = trainer.forward(x), trainer.model(x)
        error = relative_error(y, expected.double())
        assert error < 0.02, f"{name}: compiled differs from eager by {error}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--tokens", help="of a step [4096,16384]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--ways", default="eager,compiled,graphs", help='"" for single products alone'
    )
    parser.add_argument("--variants", help=f"of {'; '.join(VARIANTS)} [all, dense always]")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, help="[bench/results/training.json]")
    args = parser.parse_args()
    torch._dynamo.config.cache_size_limit = 64
    device = torch.device(DEVICE)
    widths = (64, 128) if args.tiny else (4096, 14336)
    batches = integers(args.tokens or ("32" if args.tiny else "4096,16384"))
    chosen = dict(VARIANTS)
    if args.variants:
        wanted = {"dense", *(name.strip() for name in args.variants.split(";"))}
        if wanted - VARIANTS.keys():
            parser.error(f"unknown variant {(wanted - VARIANTS.keys()).pop()!r}")
        chosen = {name: VARIANTS[name] for name in VARIANTS if name in wanted}
    record: dict[str, Any] = {
        "device": device_name(device),
        "versions": {
            "python": platform.python_version(),
            **versions("torch", "s3tensor"),
        },
        "date": time.strftime("%Y-%m-%d"),
        "pattern": args.pattern,
        "linears": [[widths[0], widths[0]], [widths[1], widths[0]], [widths[0], widths[1]]],
        "rows": [],
    }
    out = args.out or (None if args.tiny else RESULTS / "training.json")
    for way in filter(None, args.ways.split(",")):
        start = time.perf_counter()
        trainers = {name: build(name, args.pattern, widths, device, way) for name in chosen}
        for tokens in batches:
            times = compare(trainers, tokens, widths[0], args.rounds, device)
            for name in trainers:
                ratios = [t / d for t, d in zip(times[name], times["dense"], strict=True)]
                row = {
                    "way": way,
                    "tokens": tokens,
                    "variant": name,
                    "ms": 1e3 * statistics.median(times[name]),
                    "ratio": statistics.median(ratios),
                    "ratios": [round(r, 4) for r in ratios],
                }
                record["rows"].append(row)
                print(
                    f"{way:<9} {tokens:>6} tokens  {name:<30} {row['ms']:9.3f} ms  {row['ratio']:.3f} "
                    f"of dense ({min(ratios):.3f} to {max(ratios):.3f})",
                    flush=True,
                )
            if out is not None:
                write_json(out, record)
        check(trainers, args.pattern, device, widths[0])
        print(f"{way}: {time.perf_counter() - start:.0f} s", flush=True)
        del trainers
        torch._dynamo.reset()
    if device.type != "cuda" or not torch.backends.cusparselt.is_available():
        print("no cuSPARSELt here: the product by sparse tensor cores is not measured")
        return
    record["sparse_cores"] = []
    for tokens, shape, turned in itertools.product(batches, record["linears"], (False, True)):
        row = sparse_cores(shape, tokens, turned)
        record["sparse_cores"].append(row)
        ratio = (row["product_ms"] + row["compress_ms"]) / row["dense_ms"]
        print(
            f"{shape[0]}x{shape[1]}, {tokens} tokens, {row['product']}: dense {row['dense_ms']:.3f} ms, "
            f"sparse {row['product_ms']:.3f} + {row['compress_ms']:.3f} to compress "
            f"({row['torch_compress_ms']:.3f} by torch): {ratio:.2f} of dense",
            flush=True,
        )
        if out is not None:
            write_json(out, record)


if __name__ == "__main__":
    main()
