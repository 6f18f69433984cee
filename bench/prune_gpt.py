"""A whole language model, one-shot: perplexity, errors and seconds of each method (Table 2 of the S3 paper).

    python bench/prune_gpt.py --method sparsegpt_24 true_obs_24 admm_24 --eval_every 5
    python bench/prune_gpt.py --method true_obs_24 --model Qwen/Qwen3-1.7B --ng 64 --samples 1024
    python bench/plot_results.py demo-out/paper/results --model SmolLM2-135M

A method is PRUNER_PATTERN: ``sparsegpt``, ``true_obs`` (the paper's S-OBS), ``obd``, ``wanda``,
``magnitude``, ``admm`` (ours, fitted to the dense model's outputs) or ``admm_recovery`` (and then trained
block by block), on ``24`` (2:4), ``48`` (the paper's 4:8 on pairs of columns), ``coupled24`` or ``block16``.
Each starts from the dense model.

Text: ``--calibration`` and ``--text`` default to ``c4`` and ``wikitext2``, through ``datasets``; if those are
not available, to disjoint topics of Python's documentation, and the record says so.

Into OUT/MODEL/METHOD, or OUT/MODEL/METHOD-TAG, go ``linears.csv`` and ``blocks.csv`` (error, seconds, name,
index, shapes), ``perplexity.csv`` (by blocks pruned, with ``--eval_every``) and ``run.json``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measure import DEVICE, device_name, packaged_model, start, versions, write_json
from structured_obs import PATTERNS
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import llm, prune
from s3tensor.evaluate.harness import evaluate_tasks
from s3tensor.io import pretrained as hf
from s3tensor.model.weights import is_linear

PRUNERS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (pruner of s3tensor, its settings)
    "sparsegpt": ("sparsegpt", {}),
    # As in the paper: the pruned stream's own outputs are the target.
    "true_obs": ("obs", {"alpha": 0.0, "order": "largest_first"}),
    "obd": ("obd", {}),
    "wanda": ("wanda", {}),
    "magnitude": ("magnitude", {}),
    "admm": ("admm", {}),
    "admm_recovery": ("admm", {"recover": 300}),
}
METHODS = [f"{pruner}_{pattern}" for pruner in PRUNERS for pattern in PATTERNS]
_EVALUATION_TOKENS = 1024  # in a window

Evaluate = Callable[[nn.Module], float]  # perplexity


@dataclass(frozen=True)
class Text:
    """Tokens of one part of a source."""

    source: str
    part: str
    tokens: Tensor  # (sequences, tokens) int64

    @property
    def described(self) -> str:
        """``pydoc held-out, 16 x 1024 tokens``."""
        sequences, length = self.tokens.shape
        return f"{self.source} {self.part}, {sequences} x {length} tokens"


@dataclass(frozen=True)
class Settings:
    """How models are pruned; everything that ``run.json`` needs to tell."""

    damp: float = 0.01
    alpha: float | None = None  # default: each method's own
    ng: int = 64
    chunk_size: int | None = None  # rows that obs prunes at once
    blocks: int | None = None
    cache_device: str = "cpu"
    original_h: bool = False
    eval_every: int = 0
    tag: str = ""  # after the method's name in the results
    options: Mapping[str, Any] = field(default_factory=dict)  # of the pruner


@dataclass(frozen=True)
class Outcome:
    """One method on one model."""

    method: str  # with a tag, if there is one
    report: llm.PruneReport
    perplexities: list[tuple[int, float]]  # (blocks pruned, perplexity), from 0 to all


# text ---------------------------------------------------------------------------------------------


def text_of(
    source: str | None, online: str, part: str, tokenizer: Any, samples: int | None, seq_len: int
) -> Text:
    """Windows of a source; without one, of ``online`` if it is available, else of pydoc.

    Args:
        source: ``c4``, ``wikitext2``, ``pydoc``, a path, or None.
        online: what is tried first then.
        part: ``calibration``, ``development`` or ``held-out``.
        tokenizer: of the model.
        samples: windows; default all that there are.
        seq_len: tokens in a window.
    """
    try:
        text = llm.load_text(source or online, part)
        source = source or online
    except s3.CalibrationError as error:
        if source is not None:
            raise
        print(f"{part} text: pydoc, because {error}")
        text, source = llm.load_text("pydoc", part), "pydoc"
    tokens = llm.tokenize(text, tokenizer)
    available = len(tokens) // seq_len
    if samples is not None and samples > available and source == "pydoc":
        print(f"{part} text: {available} windows, all that {source} has, instead of {samples}")
        samples = available
    return Text(source, part, llm.windows(tokens, samples or available, seq_len))


# Hessians of the dense stream ---------------------------------------------------------------------


class OriginalHessians:
    """Second moments of every linear's inputs in the dense model, for ``--original_h``.

    Linears of one input share them. All are held at once, on the device of the model: 0.4 GB for
    SmolLM2-135M, 5.6 GB for Qwen3-1.7B.
    """

    def __init__(self, model: nn.Module, calibration: Sequence[Tensor], damp: float) -> None:
        prefix, blocks = llm.decoder_blocks(model)
        linears = {
            f"{prefix}.{name}": module
            for name, module in blocks.named_modules()
            if is_linear(module)
        }
        self._leaders: dict[str, str] = {}
        self._hessians: dict[str, s3.Hessian] = {}
        self._factors: tuple[str, s3.Factors] | None = None
        self._damp = damp
        last: list[Any] = [None, ""]  # the input of the linear that was called last, and its leader

        def look(name: str, args: tuple[Tensor, ...]) -> None:
            if args[0] is not last[0]:
                last[:] = [args[0], name]
                known = self._hessians.setdefault(name, s3.Hessian(args[0].shape[-1]))
                known.update(args[0])
            self._leaders[name] = last[1]

        hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: look(name, args))
            for name, module in linears.items()
        ]
        device = next(model.parameters()).device
        try:
            with torch.no_grad():
                for batch in calibration:
                    model(input_ids=batch.to(device), use_cache=False)
                    last[:] = [None, ""]
        finally:
            for hook in hooks:
                hook.remove()

    def factors(self, name: str) -> s3.Factors:
        """Of one linear; computed once for linears that share an input and are asked for in sequence."""
        leader = self._leaders[name]
        if self._factors is None or self._factors[0] != leader:
            self._factors = leader, s3.Factors(self._hessians[leader].value(), self._damp)
        return self._factors[1]

    @contextmanager
    def pruner(self, name: str, model: nn.Module) -> Iterator[str]:
        """A temporary pruner that uses these Hessians in place of those that it is given.

        ``prune_model`` passes a weight, not its name; the linear of ``model`` that holds the weight's memory
        has the name.
        """
        inner = prune.get(name)
        linears = {n: m for n, m in model.named_modules() if is_linear(m)}

        @functools.wraps(inner)  # its signature tells prune_model which options there are
        def pruned(
            weight: Tensor, hessian: Any, pattern: s3.Pattern | str, **options: Any
        ) -> prune.Pruned:
            mine = next(n for n, m in linears.items() if m.weight.data_ptr() == weight.data_ptr())
            return inner(weight, self.factors(mine), pattern, **options)

        entry = f"{name} on the dense model's inputs"
        prune.PRUNERS[entry] = pruned
        try:
            yield entry
        finally:
            del prune.PRUNERS[entry]


# one method ---------------------------------------------------------------------------------------


def run_method(
    dense: nn.Module,
    calibration: Sequence[Tensor],
    method: str,
    settings: Settings,
    evaluate: Evaluate,
    dense_perplexity: float,
    original: OriginalHessians | None = None,
) -> tuple[nn.Module, Outcome]:
    """Prune a copy of ``dense``; returns it, with dense weights that hold zeros, and what was measured.

    The errors of the report are on the inputs of the pruned model, also with ``original``.
    """
    pruner, pattern, alpha, options = method_of(method, settings)
    model = copy.deepcopy(dense)
    same = {
        "damp": settings.damp,
        "blocks": settings.blocks,
        "cache_device": settings.cache_device,
        "compress": False,
        **options,
        **settings.options,
    }
    if original is None:
        report = llm.prune_model(model, calibration, pattern, pruner, alpha=alpha, **same)
    else:
        with original.pruner(pruner, model) as entry:
            report = llm.prune_model(model, calibration, pattern, entry, alpha=0.0, **same)
    pruned = len(report.blocks)
    found = perplexity_by_block(model, dense, pruned, settings.eval_every, evaluate)
    label = f"{method}-{settings.tag}" if settings.tag else method
    return model, Outcome(label, report, [(0, dense_perplexity), *found])


def method_of(method: str, settings: Settings) -> tuple[str, str, float | None, dict[str, Any]]:
    """Pruner, pattern, alpha and options of a method's name."""
    name, _, short = method.rpartition("_")
    if name not in PRUNERS or short not in PATTERNS:
        raise SystemExit(f"error: no method {method!r}; there are {', '.join(METHODS)}")
    pruner, own = PRUNERS[name]
    options = dict(own)
    alpha = options.pop("alpha", None)
    if pruner in ("obs", "admm") and settings.alpha is not None:
        alpha = settings.alpha
    if pruner == "obs":
        options["ng"] = settings.ng
        if settings.chunk_size is not None:
            options["chunk_size"] = settings.chunk_size
    return pruner, PATTERNS[short], alpha, options


def perplexity_by_block(
    pruned: nn.Module, dense: nn.Module, blocks: int, every: int, evaluate: Evaluate
) -> list[tuple[int, float]]:
    """Perplexity with the first ``every``, 2 ``every``, ... and all ``blocks`` pruned.

    The pruned model with the dense model's blocks after a point is the model as it was when pruning had
    come that far. ``every`` 0 gives the end alone.
    """
    modules = llm.decoder_blocks(pruned)[1]
    originals = llm.decoder_blocks(dense)[1]
    finished = list(modules)
    points = sorted({blocks, *range(every or blocks, blocks + 1, every or blocks)})
    found = []
    try:
        for point in points:
            for index in range(blocks):
                modules[index] = finished[index] if index < point else originals[index]
            found.append((point, evaluate(pruned)))
            print(
                f"  {point:3} of {blocks} blocks pruned: perplexity {found[-1][1]:.3f}", flush=True
            )
    finally:
        for index, block in enumerate(finished):
            modules[index] = block
    return found


def harness(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], folder: Path | None = None
) -> dict[str, float]:
    """Figures of lm_eval tasks, ``TASK/METRIC``; ``folder`` holds your own tasks as YAML files.

    Without tasks, lm_eval's WikiText-2 or, if it is not available, Python's documentation.
    """
    try:
        report = evaluate_tasks(model, tokenizer, tasks or ["wikitext"], include_path=folder)
    except s3.CalibrationError as error:
        if tasks:
            raise
        print(f"  lm_eval: s3_pydoc, because {error}")
        report = evaluate_tasks(model, tokenizer, ["s3_pydoc"])
    return {f"{score.task}/{score.metric}": score.value for score in report.scores}


# results ------------------------------------------------------------------------------------------


def frames(outcome: Outcome, model: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows of the linears, of the decoder blocks and of the perplexities, with model and method."""
    linears, blocks = outcome.report.frames()
    linears = linears.rename(columns={"block": "index"})
    blocks = blocks.rename(columns={"block": "index"})
    linears.insert(2, "sublayer", linears["name"].str.rpartition(".")[2])
    perplexities = pd.DataFrame(outcome.perplexities, columns=["blocks_pruned", "perplexity"])
    perplexities["of_blocks"] = len(blocks)
    for frame in (linears, blocks, perplexities):
        frame.insert(0, "method", outcome.method)
        frame.insert(0, "model", model)
    return linears, blocks, perplexities


def store(outcome: Outcome, model: str, record: Mapping[str, Any], out: Path) -> Path:
    """Write the CSV files and ``run.json`` of one method; returns their folder."""
    folder = out / short_name(model) / outcome.method
    folder.mkdir(parents=True, exist_ok=True)
    named = zip(("linears", "blocks", "perplexity"), frames(outcome, model), strict=True)
    for name, frame in named:
        frame.to_csv(folder / f"{name}.csv", index=False)
    document = {
        "model": model,
        "method": outcome.method,
        **outcome.report.summary(),
        "dense_perplexity": outcome.perplexities[0][1],
        "perplexity": outcome.perplexities[-1][1],
        **record,
    }
    write_json(folder / "run.json", document)
    return folder


def short_name(model: str) -> str:
    """A model's name as a folder: ``Qwen/Qwen3-1.7B`` and ``models/Qwen3-1.7B`` are ``Qwen3-1.7B``."""
    name = Path(model).stem if model.endswith(".gguf") else Path(model).name
    return re.sub(r"[^\w.-]+", "-", name)


def environment(device: str) -> dict[str, Any]:
    """Date, device, threads and versions."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions("s3tensor", "torch", "transformers"),
    }


# command line -------------------------------------------------------------------------------------


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--method", nargs="+", required=True, metavar="PRUNER_PATTERN", help=", ".join(METHODS))
    add("--model", help="hub name, folder or .gguf file [SmolLM2-135M, if it is installed]")
    add("--name", help="the model's name in the results [from --model]")
    add("--ng", type=int, default=64, help="scopes of a row that true_obs decides at once [64]")
    add("--chunk_size", type=int, help="rows that true_obs prunes at once [what memory holds]")
    add("--calibration", metavar="SOURCE", help="c4, wikitext2, pydoc or a path [c4, else pydoc]")
    count = {"type": int, "metavar": "N"}
    add(
        "--samples", "--num_samples", **count, default=128,
        help="calibration windows [128, or what pydoc has]",
    )  # fmt: skip
    add(
        "--seq_len", "--seq_length", **count, default=1024,
        help="tokens in a calibration window [1024]",
    )  # fmt: skip
    add("--batch", type=int, default=4, help="calibration windows in one pass [4]")
    add("--text", metavar="SOURCE", help="of the perplexity [wikitext2, else pydoc]")
    add("--eval_samples", type=int, help="windows of 1024 tokens of it [all]")
    add(
        "--eval_every",
        type=int,
        default=0,
        help="perplexity after each so many blocks [0: at the end]",
    )
    add("--original_h", action="store_true", help="Hessians of the dense model's inputs")
    add("--alpha", type=float, help="share of the dense target, for true_obs and admm [0; default]")
    add("--damp", type=float, default=0.01, help="share of the mean diagonal of the Hessian [0.01]")
    add("--blocks", type=int, help="only the first so many blocks")
    add(
        "--lm_eval",
        nargs="*",
        metavar="TASK",
        help="lm_eval tasks, after pruning [with no name: wikitext, else s3_pydoc]",
    )
    add("--lm_eval_path", type=Path, help="folder of task YAML files")
    add(
        "--save_model", type=Path, metavar="DIR", help="save models as DIR/MODEL/METHOD, compressed"
    )
    add("--dtype", default="auto", help="of the weights [the checkpoint's]")
    add("--device", default=DEVICE)
    add("--cache_device", default="cpu", help="where calibration activations wait [cpu]")
    add("--tag", help="added to the methods' names in the results [original_h with that option]")
    add(
        "--out",
        "--output",
        type=Path,
        default=Path("demo-out/paper/results"),
        help="folder of the results",
    )
    args = parser.parse_args(given)
    for method in args.method:
        method_of(method, Settings())
    for option in ("batch", "samples", "eval_samples", "seq_len", "blocks", "chunk_size"):
        count = getattr(args, option)
        if count is not None and count < 1:
            parser.error(f"--{option} {count} must be 1 or more")
    if args.alpha is not None and not 0 <= args.alpha <= 1:
        parser.error(f"--alpha {args.alpha} must lie from 0 to 1")
    if args.damp is not None and not args.damp >= 0:
        parser.error(f"--damp {args.damp} must be 0 or more")
    if args.eval_every < 0:
        parser.error(f"--eval_every {args.eval_every} must be >= 0 blocks")
    if args.text is not None and args.text == args.calibration and not llm.has_parts(args.text):
        parser.error(f"--text {args.text} is the calibration text; its perplexity would flatter")
    if args.lm_eval is not None and importlib.util.find_spec("lm_eval") is None:
        parser.error("--lm_eval needs the package lm_eval: pip install 's3tensor[eval]'")
    if args.original_h and args.alpha:
        parser.error("--original_h and --alpha > 0 exclude each other: both say whose inputs count")
    return args


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    source = args.model or str(packaged_model())
    name = args.name or (short_name(args.model) if args.model else "SmolLM2-135M")
    dense, tokenizer = hf.load_model(source, args.dtype, args.device)
    calibration = text_of(
        args.calibration, "c4", "calibration", tokenizer, args.samples, args.seq_len
    )
    held_out = text_of(
        args.text, "wikitext2", "held-out", tokenizer, args.eval_samples, _EVALUATION_TOKENS
    )
    batches = list(calibration.tokens.split(args.batch))
    settings = Settings(
        args.damp,
        args.alpha,
        args.ng,
        args.chunk_size,
        args.blocks,
        args.cache_device,
        args.original_h,
        args.eval_every,
        args.tag if args.tag is not None else "original_h" * args.original_h,
    )
    print(f"{name}: calibration {calibration.described}; perplexity of {held_out.described}")

    def evaluate(model: nn.Module) -> float:
        return s3.perplexity(model, held_out.tokens, _EVALUATION_TOKENS)

    of_dense = evaluate(dense)
    print(f"dense: perplexity {of_dense:.3f}")
    original = OriginalHessians(dense, batches, args.damp) if args.original_h else None
    rows = []
    for method in args.method:
        print(f"{method}", flush=True)
        model, outcome = run_method(dense, batches, method, settings, evaluate, of_dense, original)
        record = {
            "command": " ".join(["prune_gpt.py", *(sys.argv[1:] if given is None else given)]),
            "calibration": calibration.described,
            "text": held_out.described,
            "settings": asdict(settings),
            **environment(args.device),
        }
        if args.lm_eval is not None:
            record["lm_eval"] = harness(model, tokenizer, args.lm_eval, args.lm_eval_path)
        folder = store(outcome, name, record, args.out)
        if args.save_model is not None:
            save(model, tokenizer, outcome, args.save_model / short_name(name) / outcome.method)
        rows.append(
            f"{method:22}{outcome.perplexities[-1][1]:12.3f}{outcome.report.solver_seconds:10.1f}"
            f"{outcome.report.seconds:10.1f}   {folder}"
        )
        del model
    print(f"\n{'method':22}{'perplexity':>12}{'solver s':>10}{'all s':>10}")
    print(f"{'dense':22}{of_dense:12.3f}")
    print("\n".join(rows))


def save(model: nn.Module, tokenizer: Any, outcome: Outcome, folder: Path) -> None:
    """Compress what was pruned, and write the model with its tokenizer."""
    pruned = {row.name for row in outcome.report.linears}
    s3.sparsify_(model, outcome.report.pattern, lambda _, name: name in pruned)
    s3.save_pretrained(model, folder, tokenizer, overwrite=True)
    print(f"  saved in {folder}")


if __name__ == "__main__":
    start(main)
