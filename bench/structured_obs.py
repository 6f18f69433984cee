"""One layer, four patterns: the error and the seconds of every method (Table 1 of the S3 paper).

    python bench/structured_obs.py                        # a real layer of SmolLM2-135M; minutes on a CPU
    python bench/structured_obs.py --pattern 24 --ng 64 --layer 29.down
    python bench/structured_obs.py --synthetic            # 2560 x 9728, 32,768 samples; wants a GPU
    python bench/structured_obs.py --W weight.pt --X inputs.safetensors --held-out 0.2

Patterns: ``24`` is 2:4, ``48`` the paper's 4:8 on pairs of columns, ``coupled24`` 2:4 on columns 8 apart,
``block16`` 16 columns with one of two rows 8 apart. Every method prunes the same weight with the same
Hessian; the error is that of ``s3tensor.output_error`` on the undamped Hessian, as a percentage.

``true_obs`` and the rival may be too slow for all rows: ``--slow-rows 256`` gives them the first 256. Rows of
different scopes are independent, so seconds are scaled to all rows, marked as such, and every method's error
on those first rows is printed for a fair comparison.

The rival is ``sparsekit`` 0.1.5 (CC BY-NC 4.0), called through its public names where it is importable; it
needs CUDA and Triton, and is not part of s3tensor.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import functools
import importlib
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import synthetic
import torch
from measure import DEVICE, device_name, packaged_model, shape, start, timed, versions, write_json
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import llm
from s3tensor.io import pretrained as hf

PATTERNS = {"24": "2:4", "48": "pair4:8", "coupled24": "coupled2:4", "block16": "rowpair16"}
SHORT = {pattern: short for short, pattern in PATTERNS.items()}
GROUPS = {"down": "mlp.down_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj"}
GROUPS |= {name: f"self_attn.{name}_proj" for name in "qkvo"}


@dataclass(frozen=True)
class Problem:
    """A layer to prune."""

    name: str
    weight: Tensor  # (M, K)
    hessian: Tensor  # (K, K) X'X / N
    samples: int
    held_out: Tensor | None = None  # (K, K) of other inputs
    held_out_samples: int = 0


@dataclass(frozen=True)
class Row:
    """One method on one pattern."""

    layer: str
    pattern: str
    method: str
    rows: int  # that were pruned
    of_rows: int
    error: float | None  # relative output error of the pruned rows
    first_rows: int  # rows that every method has pruned
    first_rows_error: float | None  # the error on them
    held_out_error: float | None  # of the pruned rows, on inputs that were not calibrated on
    seconds: float | None  # as measured, for ``rows``
    seconds_all_rows: float | None  # scaled where rows < of_rows
    peak_memory_bytes: int | None  # on CUDA, during the call
    satisfies: bool | None
    failed: str = ""


@dataclass(frozen=True)
class Settings:
    """What the methods take besides the layer."""

    ng: int = 64
    splits: int = 8
    damp: float | None = None  # default: each method's own
    memory: int = 2 << 30


Method = Callable[[Tensor, Tensor, str, Settings], Tensor]
"""``(weight, hessian, short pattern, settings) -> pruned weight``; owns the weight that it is given."""


# methods ------------------------------------------------------------------------------------------


def scope_of(kit: Any, weight: Tensor, pattern: str) -> tuple[Any, int]:
    """The paper's scope and budget over a weight, in the vocabulary of ``kit``: s3tensor or its rival."""
    m, k = weight.shape
    if pattern == "24":
        return kit.ScopeSpec(kit.BlockSpec(weight, shape=(1, 1)), shape=(1, 4)), 2
    if pattern == "48":
        return kit.ScopeSpec(kit.BlockSpec(weight, shape=(1, 2)), shape=(1, 4)), 2
    if pattern == "coupled24":
        view = kit.View(weight, shape=(m, k // 16, 8, 2), stride=(k, 16, 1, 8))
        return kit.ScopeSpec(kit.BlockSpec(view, shape=(1, 1, 1, 2)), shape=(1, 1, 4, 1)), 2
    view = kit.View(weight, shape=(m // 16, 8, 2, k), stride=(16 * k, k, 8 * k, 1))
    return kit.ScopeSpec(kit.BlockSpec(view, shape=(1, 1, 1, 16)), shape=(1, 1, 2, 1)), 1


def _given(damp: float | None) -> dict[str, float]:
    return {} if damp is None else {"damp": damp}


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: str, settings: Settings) -> Tensor:
    """SparseGPT (arXiv 2301.00774)."""
    return s3.prune.sparsegpt(weight, hessian, PATTERNS[pattern], **_given(settings.damp)).weight


def sparsegpt_refit(weight: Tensor, hessian: Tensor, pattern: str, settings: Settings) -> Tensor:
    """SparseGPT's masks with the least-squares weights."""
    factors = s3.Factors(hessian, **_given(settings.damp))
    mask = s3.prune.sparsegpt(weight, factors, PATTERNS[pattern]).mask
    return s3.prune.refit(weight, factors, mask)


def admm(weight: Tensor, hessian: Tensor, pattern: str, settings: Settings) -> Tensor:
    """ADMM at its defaults: ours."""
    return s3.prune.admm(weight, hessian, PATTERNS[pattern], **_given(settings.damp)).weight


def one_shot(
    weight: Tensor, hessian: Tensor, pattern: str, settings: Settings, *, compensate: str
) -> Tensor:
    """``StructuredOBS.prune``: all masks of a row from one inverse Hessian."""
    parameter = nn.Parameter(weight, requires_grad=False)
    scope, keep = scope_of(s3, parameter, pattern)
    pruner = s3.StructuredOBS(
        scope, hessian, memory_budget=settings.memory, **_given(settings.damp)
    )
    columns = len(hessian) // 16
    splits = min(settings.splits, columns) if compensate == "interleaved" else 1
    pruner.prune(keep, compensate=compensate, n_splits=splits)
    return parameter.data


def true_obs(
    weight: Tensor,
    hessian: Tensor,
    pattern: str,
    settings: Settings,
    *,
    order: str,
    scoring: str = "independent",
) -> Tensor:
    """``StructuredOBS.prune_true_obs``: the paper's S-OBS, an inverse Hessian for every row."""
    parameter = nn.Parameter(weight, requires_grad=False)
    scope, keep = scope_of(s3, parameter, pattern)
    pruner = s3.StructuredOBS(
        scope, hessian, memory_budget=settings.memory, **_given(settings.damp)
    )
    pruner.prune_true_obs(
        keep, ng=settings.ng, chunk_size=len(weight), order=order, scoring=scoring
    )
    return parameter.data


METHODS: dict[str, Method] = {
    "sparsegpt": sparsegpt,
    "sparsegpt+refit": sparsegpt_refit,
    **{
        f"obs/{name}": functools.partial(one_shot, compensate=name)
        for name in ("local", "full", "split", "interleaved")
    },
    "true_obs/left_to_right": functools.partial(true_obs, order="left_to_right"),
    "true_obs/largest_first": functools.partial(true_obs, order="largest_first"),
    "true_obs/joint": functools.partial(true_obs, order="largest_first", scoring="joint"),
    "admm": admm,
}


def rivals() -> dict[str, Method]:
    """The reference implementation's S-OBS and SparseGPT; none where it cannot run."""
    if importlib.util.find_spec("sparsekit") is None or not torch.cuda.is_available():
        return {}
    kit = importlib.import_module("sparsekit")
    columns = importlib.import_module("sparsekit.pruners.sparsegpt")

    def s_obs(weight: Tensor, hessian: Tensor, pattern: str, settings: Settings) -> Tensor:
        parameter = nn.Parameter(weight, requires_grad=False)
        scope, keep = scope_of(kit, parameter, pattern)
        # float32 working matrices: its default, float16, overflows on some real layers.
        kit.StructuredOBS(scope, hessian, **_given(settings.damp)).prune_true_obs(
            nnz=keep, ng=settings.ng, order="largest_first", c_dtype=torch.float32
        )
        return parameter.data

    def their_sparsegpt(
        weight: Tensor, hessian: Tensor, pattern: str, settings: Settings
    ) -> Tensor:
        if pattern == "coupled24":
            return columns.sparsegpt_coupled_24(weight, hessian)
        if pattern == "block16":
            return columns.sparsegpt_block16(weight, hessian)
        return columns.sparsegpt(weight, hessian, block_size=2 if pattern == "48" else 1)

    return {"sparsekit/sparsegpt": their_sparsegpt, "sparsekit/true_obs": s_obs}


def slow(method: str) -> bool:
    """Whether ``--slow-rows`` applies to a method."""
    return method.startswith(("true_obs", "sparsekit"))


# layers -------------------------------------------------------------------------------------------


def real_layer(model: str | Path, name: str, samples: int, device: torch.device) -> Problem:
    """A linear of a language model and its inputs on Python's documentation topics.

    Args:
        model: a hub name, folder or .gguf file.
        name: ``15.down`` or the module's full name.
        samples: calibration windows of 512 tokens; held out are at most half as many, of other topics.
        device: where the layer is put.
    """
    language_model, tokenizer = hf.load_model(model)
    prefix = llm.decoder_blocks(language_model)[0]
    block, _, short = name.partition(".")
    full = f"{prefix}.{block}.{GROUPS[short]}" if short in GROUPS else name
    try:
        linear = language_model.get_submodule(full)
    except AttributeError:
        raise SystemExit(
            f"error: the model has no layer {full}; give BLOCK.{'|'.join(GROUPS)} or a full name"
        ) from None
    if not isinstance(linear, nn.Linear):
        raise SystemExit(f"error: {full} is a {type(linear).__name__}, not an nn.Linear")
    language_model.to(device)
    hessians = []
    for part, most in (("calibration", samples), ("held-out", max(1, samples // 2))):
        tokens = llm.tokenize(llm.load_text("pydoc", part), tokenizer)
        picked = llm.windows(tokens, min(most, len(tokens) // 512), 512)
        hessian = s3.Hessian(linear.in_features, device)
        with llm.ModuleInputCatcher(linear) as catcher, torch.no_grad():
            for batch in picked.split(8):
                catcher.run(language_model, input_ids=batch.to(device), use_cache=False)
                hessian.update(catcher.pop()[0][0])
        hessians.append(hessian)
    calibration, held_out = hessians
    return Problem(
        full,
        linear.weight.detach().float(),
        calibration.value(),
        calibration.samples,
        held_out.value(),
        held_out.samples,
    )


def synthetic_layer(size: str, samples: int, seed: int, device: torch.device) -> Problem:
    """The layer of ``bench/synthetic.py``; ``size`` is MxK."""
    m, k = shape(size)
    made = synthetic.layer(m, k, samples, seed=seed, device=device)
    name = f"synthetic {m}x{k}, seed {seed}"
    held_out = made.held_out if made.held_out_samples else None
    return Problem(name, made.weight, made.hessian, made.samples, held_out, made.held_out_samples)


def layer_of_files(
    weight_file: Path, inputs_file: Path, held_out: float, device: torch.device
) -> Problem:
    """A weight (M, K) and inputs (..., K) from files; a last share of the inputs is held out."""
    weight = read_tensor(weight_file).to(device, torch.float32)
    x = read_tensor(inputs_file)
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise SystemExit(
            f"error: W of shape {tuple(weight.shape)} and X of shape {tuple(x.shape)}; they must be "
            "(out_features, in_features) and (..., in_features)"
        )
    if not 0.0 <= held_out < 1.0:
        raise SystemExit(f"error: --held-out {held_out} must be a share from 0 to below 1")
    x = x.flatten(0, -2)
    first = len(x) - int(len(x) * held_out)
    hessians = []
    for rows in (x[:first], x[first:]):
        hessian = s3.Hessian(weight.shape[1], device)
        hessian.update(rows)
        hessians.append(hessian)
    calibration, other = hessians
    return Problem(
        weight_file.stem,
        weight,
        calibration.value(),
        calibration.samples,
        other.value() if other.samples else None,
        other.samples,
    )


def read_tensor(path: Path) -> Tensor:
    """The tensor in a .safetensors or .pt file that holds one tensor, by itself or in a dict."""
    if not path.is_file():
        raise SystemExit(f"error: no file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: Any = load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, dict) and len(found) == 1:
        found = next(iter(found.values()))
    if not isinstance(found, Tensor):
        held = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise SystemExit(f"error: {path} must hold one tensor; it holds {held}")
    return found.detach()


# measuring ----------------------------------------------------------------------------------------


def measure(
    name: str,
    method: Method,
    problem: Problem,
    pattern: str,
    settings: Settings,
    slow_rows: int | None = None,
) -> Row:
    """One method on one pattern; a failure is recorded, not hidden."""
    total = len(problem.weight)
    first = total if slow_rows is None else min(slow_rows, total)
    rows = first if slow(name) else total
    weight = problem.weight[:rows]
    empty = Row(
        problem.name, pattern, name, rows, total, None, first, None, None, None, None, None, None
    )
    cuda = weight.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    given = weight.clone(), problem.hessian.clone(), pattern, settings
    try:
        pruned, seconds = timed(lambda: method(*given), weight.device)
    except Exception as error:  # a rival may raise anything, and one row must not end the table
        return _changed(empty, failed=f"{type(error).__name__}: {error}".splitlines()[0][:200])
    scaled = seconds * total / rows
    if not bool(torch.isfinite(pruned).all()):
        return _changed(
            empty, failed="NaN or Inf in the result", seconds=seconds, seconds_all_rows=scaled
        )
    others = problem.held_out
    return _changed(
        empty,
        error=s3.output_error(pruned, weight, problem.hessian),
        first_rows_error=s3.output_error(pruned[:first], weight[:first], problem.hessian),
        held_out_error=None if others is None else s3.output_error(pruned, weight, others),
        seconds=seconds,
        seconds_all_rows=scaled,
        peak_memory_bytes=torch.cuda.max_memory_allocated() if cuda else None,
        satisfies=s3.satisfies(pruned, PATTERNS[pattern]),
    )


def _changed(row: Row, **values: Any) -> Row:
    return Row(**{**asdict(row), **values})


def line(row: Row) -> str:
    """A row of the printed table."""
    start = f"{row.pattern:10}{row.method:24}"
    if row.failed:
        return f"{start}failed: {row.failed}"
    assert row.error is not None and row.first_rows_error is not None and row.seconds is not None
    errors = f"{_percent(row.error if row.rows == row.of_rows else None)}"
    # The held-out error of other rows would not compare.
    held_out = row.held_out_error if row.rows == row.of_rows else None
    errors += f"{_percent(row.first_rows_error)}{_percent(held_out)}"
    scaled = f"  (from {row.rows} of {row.of_rows} rows)" if row.rows < row.of_rows else ""
    broken = "" if row.satisfies else "  PATTERN BROKEN"
    return f"{start}{errors}{row.seconds_all_rows:10.2f}{scaled}{broken}"


def header(first_rows: int) -> str:
    """The line above the rows."""
    first = f"{first_rows} rows"
    return f"{'pattern':10}{'method':24}{'error %':>10}{first:>10}{'held out':>10}{'seconds':>10}"


def _percent(error: float | None) -> str:
    return f"{'-':>10}" if error is None else f"{100 * error:10.3f}"


def store(rows: Sequence[Row], record: dict[str, Any], stem: Path) -> None:
    """Write ``stem``.csv and ``stem``.json."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{stem}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    write_json(Path(f"{stem}.json"), {**record, "rows": [asdict(row) for row in rows]})


def warm_up(device: torch.device, methods: dict[str, Method], settings: Settings) -> None:
    """Compile and load what first calls need, so that no row includes it."""
    tiny = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).to(device)
    problem = Problem("warm-up", tiny, torch.eye(128, device=device), 128)
    for name, method in methods.items():
        measure(name, method, problem, "24", settings)


# command line -------------------------------------------------------------------------------------


def add_layer(parser: argparse.ArgumentParser) -> None:
    """The options that choose a layer, for :func:`problem_of`; all but those of files."""
    add = parser.add_argument
    add("--model", type=Path, help="of --layer: folder, hub name or .gguf; default SmolLM2-135M")
    add("--layer", default="15.down", help="BLOCK.down|gate|up|q|k|v|o, or a module's full name")
    add("--samples", type=int, default=64, help="calibration windows of 512 tokens, for --layer")
    add(
        "--synthetic", nargs="?", const="2560x9728", metavar="MxK", help="a synthetic layer instead"
    )
    add("--tokens", type=int, default=32_768, help="samples of --synthetic")
    add("--seed", type=int, default=0, help="of --synthetic")
    add("--device", default=DEVICE)


def check_layer(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse values of :func:`add_layer` that make no sense."""
    if args.synthetic is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.synthetic):
        parser.error(f"--synthetic {args.synthetic} must be ROWSxCOLUMNS, for example 2560x9728")
    if min(args.samples, args.tokens) < 1:
        parser.error("--samples and --tokens must be 1 or more")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no CUDA device is available")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--pattern", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    add("--methods", nargs="+", default=["*"], metavar="NAME", help="names or globs of methods")
    add("--ng", type=int, default=64, help="scopes of a row that true OBS decides at once")
    add("--splits", type=int, default=8, help="parts of obs/interleaved")
    add("--damp", type=float, help="share of the mean diagonal; default each method's own")
    add("--slow-rows", type=int, help="rows for true OBS, a multiple of 16; default all")
    add("--memory", type=float, metavar="GIB", help="working memory of OBS")
    add_layer(parser)
    add("--W", type=Path, metavar="FILE", help="a weight: .safetensors or .pt")
    add("--X", type=Path, metavar="FILE", help="its inputs")
    add("--held-out", type=float, default=0.0, help="share of X for the held-out error")
    add("--out", type=Path, default=Path("demo-out/paper/table1"), help="folder of CSV and JSON")
    args = parser.parse_args(given)
    if (args.W is None) != (args.X is None):
        parser.error("--W and --X go together")
    if args.slow_rows is not None and (args.slow_rows < 1 or args.slow_rows % 16):
        parser.error(
            f"--slow-rows {args.slow_rows} must be a multiple of 16: block16 couples 16 rows"
        )
    if args.memory is not None and not args.memory > 0:
        parser.error(f"--memory {args.memory} must be above 0, in GiB")
    if min(args.ng, args.splits) < 1:
        parser.error("--ng and --splits must be 1 or more")
    check_layer(parser, args)
    return args


def chosen(globs: Sequence[str]) -> dict[str, Method]:
    """The methods that some glob matches, in the order of the table."""
    known = {**METHODS, **rivals()}
    for glob in globs:
        if not fnmatch.filter(known, glob):
            raise SystemExit(f"error: no method {glob!r}; there are {', '.join(known)}")
    return {
        name: method
        for name, method in known.items()
        if any(fnmatch.fnmatch(name, glob) for glob in globs)
    }


def problem_of(args: argparse.Namespace, device: torch.device) -> Problem:
    """The layer that the command line asks for."""
    if args.W is not None:
        return layer_of_files(args.W, args.X, args.held_out, device)
    if args.synthetic is not None:
        return synthetic_layer(args.synthetic, args.tokens, args.seed, device)
    return real_layer(args.model or packaged_model(), args.layer, args.samples, device)


def main(given: Sequence[str] | None = None) -> list[Row]:
    args = arguments(given)
    device = torch.device(args.device)
    methods = chosen(args.methods)
    problem = problem_of(args, device)
    m, k = problem.weight.shape
    memory = 2.0 if device.type == "cpu" else 0.4 * torch.cuda.mem_get_info()[1] / 2**30
    memory = args.memory or memory
    settings = Settings(args.ng, args.splits, args.damp, int(memory * 2**30))
    print(
        f"{problem.name}: {m} x {k}, {problem.samples:,} samples and {problem.held_out_samples:,} "
        f"held out; {device_name(device)}"
    )
    if problem.samples < k:
        print(
            f"warning: {problem.samples:,} samples are fewer than the {k:,} inputs: errors on them are "
            "too low; look at the held-out error, and give 8 samples an input"
        )
    warm_up(device, methods, settings)
    print(header(min(args.slow_rows or m, m)), flush=True)
    record = {
        "command": " ".join([Path(sys.argv[0]).name, *(sys.argv[1:] if given is None else given)]),
        "date": time.strftime("%Y-%m-%d"),
        "layer": problem.name,
        "shape": [m, k],
        "samples": problem.samples,
        "held_out_samples": problem.held_out_samples,
        "settings": asdict(settings),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "triton", "s3tensor", "sparsekit"),
    }
    stem = args.out / re.sub(r"[^A-Za-z0-9]+", "-", problem.name)
    rows = []
    for pattern in args.pattern:
        for name, method in methods.items():
            row = measure(name, method, problem, pattern, settings, args.slow_rows)
            rows.append(row)
            print(line(row), flush=True)
            store(rows, record, stem)  # each time: an interrupted run keeps what it measured
    print(f"stored in {stem}.csv and .json")
    return rows


if __name__ == "__main__":
    start(main)
