"""Host time of a product, dense and compressed: microseconds a weight, eager and in a compiled model.

    python bench/host.py                       # on the CUDA device, if there is one, else on the CPU
    python bench/host.py --patterns 2:4,4:8 --rows 1,16

Small weights, so that the device is done before the host is; on a CPU the arithmetic of a compressed product
is left out (the time of a call stays), as there it takes longer than the call. Rounds take turns; medians.
``eager`` is a call of ``nn.Linear``. ``compiled`` is a call of a compiled stack of them, by the layer: what
Dynamo's guards, the inputs of the graph and the operator cost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import versions, write_json
from torch import Tensor, nn

import s3tensor as s3

SIZE, LAYERS = 512, 48


def stack(device: str, pattern: str | None, layers: int) -> nn.Module:
    """Linears without a bias, dense or compressed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = SIZE if device == "cuda" else 64
    model = nn.Sequential(
        *(nn.Linear(size, size, bias=False, device=device, dtype=dtype) for _ in range(layers))
    ).requires_grad_(False)
    if pattern is not None:
        name, _, values = pattern.partition("+")
        s3.sparsify_(model, name)
        if values:
            s3.quantize_(model, values)  # type: ignore[arg-type]
    return model


def microseconds(
    calls: dict[str, Callable[[Tensor], Any]], x: Tensor, rounds: int, each: int
) -> dict[str, float]:
    """Host time of a call, for each of several that take turns: medians over rounds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):
            call(x)
    for _ in range(rounds):
        for name, call in calls.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(each):
                call(x)
            found[name].append((time.perf_counter() - began) / each * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


def nothing(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """In place of a product: memory for its result."""
    return x.new_empty(*x.shape[:-1], weight.features[0])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", default="2:4,rowpair16,2:4+int8,4:8")
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # every stack is the same code
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # the arithmetic is left out
        from s3tensor.tensor.linear import PATHS

        PATHS["scratch"] = replace(PATHS["scratch"], run=nothing)
    kinds: dict[str, str | None] = {"dense": None, **{p: p for p in args.patterns.split(",")}}
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions("torch", "triton", "s3tensor"), "date": time.strftime("%Y-%m-%d"),
        "layers": LAYERS, "rows": [],
    }  # fmt: skip
    for rows in map(int, args.rows.split(",")):
        x: Tensor = torch.randn(rows, SIZE if device == "cuda" else 64, device=device)
        x = x.bfloat16() if device == "cuda" else x
        eager = {name: stack(device, kind, 1)[0] for name, kind in kinds.items()}  # type: ignore[index]
        compiled = {
            name: torch.compile(stack(device, kind, LAYERS), fullgraph=True)
            for name, kind in kinds.items()
        }
        modes = {
            "eager": (microseconds(eager, x, args.rounds, 200), 1),
            "compiled": (microseconds(compiled, x, args.rounds, 10), LAYERS),
        }
        for mode, (times, layers) in modes.items():
            for name, time_us in times.items():
                row = {
                    "mode": mode, "x_rows": rows, "weights": name, "us": time_us / layers,
                    "ratio": time_us / times["dense"],
                }  # fmt: skip
                record["rows"].append(row)
                print(
                    f"{mode:<8} {rows:>3} rows  {name:<10} {row['us']:7.2f} us a weight  "
                    f"{row['ratio']:.2f} of dense",
                    flush=True,
                )
    if args.out:
        write_json(args.out, record)


if __name__ == "__main__":
    main()
