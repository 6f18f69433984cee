"""Seconds of the ADMM solver by phase, the cost of each way to invert, and an estimate for larger models.

    python bench/solver_time.py                          # H100: under a minute
    python bench/solver_time.py --quick --device cpu     # toy sizes

1. inverses: ``inv(H + rho I)`` by Cholesky, by triangular products, by a step from the last inverse, by eigh.
2. solves: every problem that pruning SmolLM2-135M poses (linears of one input stacked), and square ones of
   three widths, split into phases. A phase is timed with the device synchronised around it; ``ms`` is a call
   without that.
3. model: ``launches + a K^3 + b M K^2`` fitted to the solves, and the solver's seconds for Llama 3's shapes.

The JSON is written after every row.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import synthetic
import torch
from measure import DEVICE, RESULTS, device_name, timed, versions, write_json
from measure import shape as shape_of
from torch import Tensor

import s3tensor as s3
from s3tensor.prune.linalg import ShiftedInverse, full_precision, tensor_cores

admm_module = importlib.import_module("s3tensor.prune.admm")  # the function hides it

Shape = tuple[int, int]  # (out_features, in_features)


def decoder(hidden: int, kv: int, intermediate: int) -> dict[str, Shape]:
    """The problems of one decoder layer: linears of one input are one problem."""
    return {
        "q+k+v": (hidden + 2 * kv, hidden),
        "o": (hidden, hidden),
        "gate+up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
    }


MODELS: dict[str, tuple[int, dict[str, Shape]]] = {  # layers, problems of each
    "SmolLM2-135M": (30, decoder(576, 192, 1536)),
    "Llama-3-8B": (32, decoder(4096, 1024, 14336)),
    "Llama-3-70B": (80, decoder(8192, 1024, 28672)),
}
SINGLE: dict[str, Shape] = {"q": (576, 576), "k or v": (192, 576), "gate or up": (1536, 576)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1536, 4096])
    parser.add_argument(
        "--large",
        nargs="*",
        default=["2560x9728", "4096x14336"],
        help="MxK measured once",
    )
    parser.add_argument("--quick", action="store_true", help="a sixth of every size, nothing large")
    parser.add_argument("--device", default=DEVICE)
    parser.add_argument("--store", type=Path, default=RESULTS / "solver_time.json")
    args = parser.parse_args()
    large = [] if args.quick else [shape_of(text) for text in args.large]
    small = 6 if args.quick else 1
    if min(args.widths) < 16 * small:
        parser.error(f"--widths {min(args.widths)} must be {16 * small} or more")
    widths = [width // small // 16 * 16 for width in args.widths]
    device = torch.device(args.device)
    document: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "s3tensor"),
        "pattern": args.pattern,
    }

    def save(part: str, rows: Any) -> None:
        document[part] = rows
        write_json(args.store, document)

    inverses: list[dict[str, Any]] = []
    print(f"{document['device']}\n\nmilliseconds of an inverse, and of a product (K, K) x (K, K)")
    for width in (*widths, *(columns for _, columns in large)):
        row = {"K": width, **inverse_times(hessian(width, device))}
        inverses.append(row)
        save("inverses", inverses)
        print("  ".join(f"{name} {_figure(value)}" for name, value in row.items()), flush=True)

    solves: list[dict[str, Any]] = []
    names = {shape: name for name, shape in {**SINGLE, **MODELS["SmolLM2-135M"][1]}.items()}
    named = {(m // small // 16 * 16, k // small // 16 * 16): name for (m, k), name in names.items()}
    shapes = [*named, *((width, width) for width in widths), *large]
    print("\nmilliseconds of a solve, and of its phases where the device waits around each")
    solve((64, 64), args.pattern, device, 1)  # what the first call of a process loads
    for shape in dict.fromkeys(shapes):
        row = {"name": named.get(shape, "square" if shape[0] == shape[1] else "large")}
        row |= {"M": shape[0], "K": shape[1]}
        row |= solve(shape, args.pattern, device, 1 if shape in large else 3)
        solves.append(row)
        save("solves", solves)
        print("  ".join(f"{name} {_figure(value)}" for name, value in row.items()), flush=True)

    model = fit(solves)
    for row in solves:
        row["estimate"] = estimate(model, (row["M"], row["K"]))
    save("solves", solves)
    save("model", model)
    print("\nseconds = launches + a K^3 + b M K^2:", {k: f"{v:.3g}" for k, v in model.items()})
    totals = {}
    for name, (layers, problems) in MODELS.items():
        parts = {part: estimate(model, shape) for part, shape in problems.items()}
        totals[name] = {"layers": layers, "a layer": parts, "seconds": layers * sum(parts.values())}
        print(f"{name}: {totals[name]['seconds']:.1f} s estimated")
    if not args.quick:
        times = {(row["M"], row["K"]): row["ms"] / 1e3 for row in solves}
        layers, problems = MODELS["SmolLM2-135M"]
        measured = layers * sum(times[shape] for shape in problems.values())
        totals["SmolLM2-135M"]["measured"] = measured
        print(f"SmolLM2-135M: {measured:.2f} s as the sum of its measured solves")
    save("models", totals)
    print(f"stored in {args.store}")


@functools.cache
def hessian(width: int, device: torch.device) -> Tensor:
    """Correlated, heavy-tailed inputs (K, K)."""
    samples = 8 * width if width <= 4096 else 2 * width
    return synthetic.layer(width // 4, width, samples, 64, device=device).hessian


def inverse_times(matrix: Tensor) -> dict[str, float | None]:
    """Milliseconds of each way from H to ``inv(H + rho I)``."""
    eye = torch.eye(len(matrix), device=matrix.device)
    scale = matrix.diagonal().rsqrt()
    scaled = matrix * scale[:, None] * scale
    shifted = scaled + 0.85 * eye
    lower = torch.linalg.cholesky(shifted)
    inverses = ShiftedInverse(scaled, follow=True)
    inverses.at(0.85)
    rhos = itertools.cycle((0.94, 0.85))

    def triangular() -> Tensor:
        factor = torch.linalg.cholesky_ex(shifted).L
        half = torch.linalg.solve_triangular(factor, eye, upper=False)
        return half.T @ half

    with full_precision():
        found: dict[str, float | None] = {
            "cholesky": milliseconds(lambda: torch.linalg.cholesky_ex(shifted), matrix.device),
            "cholesky_inverse": milliseconds(lambda: torch.cholesky_inverse(lower), matrix.device),
            "cholesky + inverse": milliseconds(
                lambda: ShiftedInverse(scaled, follow=False).at(0.85), matrix.device
            ),
            "cholesky + triangular": milliseconds(triangular, matrix.device),
            "followed": milliseconds(lambda: inverses.at(next(rhos)), matrix.device),
            "product": milliseconds(lambda: scaled @ scaled, matrix.device),
            "eigh": None,
        }
        with tensor_cores(scaled):
            found["product, TF32"] = milliseconds(lambda: scaled @ scaled, matrix.device)
        if len(matrix) <= 2048:
            found["eigh"] = milliseconds(lambda: torch.linalg.eigh(scaled), matrix.device, 2)
    return found


def milliseconds(call: Callable[[], Any], device: torch.device, most: int = 20) -> float:
    """Median of up to ``most`` calls, or of as many as half a second holds, after one to warm up."""
    call()
    times: list[float] = []
    while len(times) < most and (not times or sum(times) < 500):
        times.append(1e3 * timed(call, device)[1])
    return statistics.median(times)


def solve(shape: Shape, pattern: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds of one call of admm from a plain Hessian, by phase, and its rounds."""
    given = hessian(shape[1], device)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    weight *= 0.02

    def call() -> Any:
        # The damping of prune_model where it chooses none; a choice costs a factorisation for each.
        return s3.prune.admm(weight, s3.Factors(given, 0.01), pattern)

    whole = milliseconds(call, device, repeats)
    phases: dict[str, float] = defaultdict(float)
    with by_phase(phases, device):
        phases["whole"] = 1e3 * timed(call, device)[1]
    known = ("scale", "inverse", "round", "refit")
    split = {
        "scale and first inverse": phases["scale"],
        "inverses": phases["inverse"],
        "products": phases["round"] - phases["projection"],
        "projection": phases["projection"],
        "refit": phases["refit"],
        "rest": phases["whole"] - sum(phases[name] for name in known),
    }
    return {"ms": whole, "rounds": int(phases["rounds"]), **split}


@contextmanager
def by_phase(phases: dict[str, float], device: torch.device) -> Iterator[None]:
    """Milliseconds of the solver's phases, while the block runs."""
    places: list[tuple[Any, str, str]] = [
        (admm_module, "block_scale", "scale"),
        (admm_module.ShiftedInverse, "at", "inverse"),
        (admm_module._Rows, "round", "round"),
        (admm_module, "select", "projection"),
        (admm_module, "masked_least_squares", "refit"),
    ]
    before = [getattr(place, name) for place, name, _ in places]

    def wrap(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            found, seconds = timed(functools.partial(function, *args, **options), device)
            phases[phase] += 1e3 * seconds
            phases["rounds"] += phase == "inverse"
            return found

        return call

    for (place, name, phase), function in zip(places, before, strict=True):
        setattr(place, name, wrap(function, phase))
    try:
        yield
    finally:
        for (place, name, _), function in zip(places, before, strict=True):
            setattr(place, name, function)


def fit(solves: list[dict[str, Any]]) -> dict[str, float]:
    """The non-negative launches, a and b of the least relative error."""
    names = ("launches", "a", "b")
    terms = torch.tensor(
        [[1.0, row["K"] ** 3, row["M"] * row["K"] ** 2] for row in solves], dtype=torch.float64
    )
    terms = terms / torch.tensor([row["ms"] / 1e3 for row in solves])[:, None]
    size = terms.amax(0)
    best: tuple[float, dict[str, float]] | None = None
    for count in (1, 2, 3):
        for used in itertools.combinations(range(3), count):
            some = (terms / size)[:, list(used)]
            ones = torch.ones(len(solves), 1, dtype=torch.float64)
            found = torch.linalg.lstsq(some, ones).solution
            off = float((some @ found - 1).square().mean().sqrt())
            if bool((found >= 0).all()) and (best is None or off < best[0]):
                model = dict.fromkeys(names, 0.0)
                for i, value in zip(used, found.flatten().tolist(), strict=True):
                    model[names[i]] = value / float(size[i])
                best = off, model
    assert best is not None  # one term alone is never negative
    return {**best[1], "relative misfit": best[0]}


def estimate(model: dict[str, float], shape: Shape) -> float:
    """Seconds of a solve."""
    rows, columns = shape
    return model["launches"] + model["a"] * columns**3 + model["b"] * rows * columns**2


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
