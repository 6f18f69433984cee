"""The command line: prune, eval, verify, show, bench.

Bad input ends in one line and an exit code: 2 for a command that cannot be meant so, 1 for one that fails,
130 when it is interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from s3tensor.errors import CheckpointError, S3Error
from s3tensor.pattern import Pattern, grammar

if TYPE_CHECKING:
    from torch import Tensor

    from s3tensor.llm import PruneReport, Recovery

    ParamType = click.ParamType[Any]  # generic in the stubs of click 8.2 and later only
else:
    ParamType = click.ParamType

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SAMPLES = 128  # calibration sequences when none are asked for, or all that the text has

out = Console(soft_wrap=True, markup=False, highlight=False)
err = Console(soft_wrap=True, markup=False, highlight=False, stderr=True)


class _Refused(click.ClickException):
    """A command that cannot be meant so, in one line."""

    exit_code = 2


class _Group(click.Group):
    """A group whose commands end in one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # of click 8.2 and later
                raise
            command = error.ctx.command_path if error.ctx else ctx.command_path
            message = error.format_message().rstrip(".")
            hint = "" if "\n" in message else f" (see {command} --help)"
            raise _Refused(message + hint) from error
        except S3Error as error:
            raise click.ClickException(str(error)) from error
        except ImportError as error:  # of an optional package
            raise click.ClickException(f"{error}; pip install 's3tensor[all]'") from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise click.ClickException(str(error)) from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            first = str(error).splitlines()[0]
            raise click.ClickException(f"{first} Give fewer or shorter sequences") from error
        except KeyboardInterrupt:
            err.print("\nstopped")
            raise SystemExit(130) from None


class _PatternType(ParamType):
    """A pattern by its string."""

    name = "pattern"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Pattern:
        try:
            return Pattern.parse(value)
        except S3Error as error:
            self.fail(str(error), param, ctx)


class _ShapeType(ParamType):
    """A weight's shape, such as 16x64."""

    name = "shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(n) for n in value.lower().split("x"))
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            self.fail(f"{value!r} is not ROWSxCOLUMNS, such as 16x64", param, ctx)
        return sizes


class _DeviceType(ParamType):
    """A device that is there."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        import torch

        try:
            torch.empty(1, device=value)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            self.fail(f"{value!r} cannot be used ({str(error).splitlines()[0]})", param, ctx)
        return str(value)


PATTERN, SHAPE, DEVICE = _PatternType(), _ShapeType(), _DeviceType()
COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**63 - 1)


@click.group(
    name="s3tensor",
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""Examples:

\b
  s3tensor show 2:4
  s3tensor prune HuggingFaceTB/SmolLM2-135M --pattern 2:4 --out sparse
  s3tensor verify sparse
  s3tensor eval sparse""",
)
@click.version_option(package_name="s3tensor")
def main() -> None:
    """Structured sparsity for PyTorch: prune, hold compressed, evaluate, check and picture."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@main.command(
    epilog="""Examples:

\b
  s3tensor prune HuggingFaceTB/SmolLM2-135M --pattern 2:4 --out sparse
  s3tensor prune ./model --pattern rowpair16 --pruner sparsegpt --calibration text.txt --out sparse
  s3tensor prune model.gguf --calibration wikitext2 --samples 64 --device cuda --out sparse
  s3tensor prune ./model --recover 300 --recover-seconds 600 --out sparse
  s3tensor prune ./model --blocks 2 --samples 4 --eval-samples 0 --out trial --report trial.json

A run that was broken off goes on when the same command is given again."""
)
@click.argument("model")
@click.option(
    "--pattern", type=PATTERN, default="2:4", show_default=True, help="see: s3tensor show --help"
)
@click.option(
    "--pruner",
    default="admm",
    show_default=True,
    help="admm, obs, sparsegpt, wanda, obd, magnitude",
)
@click.option(
    "--calibration",
    default="pydoc",
    show_default=True,
    help="pydoc, c4, wikitext2 or a path to text",
)
@click.option(
    "--samples",
    type=COUNT,
    help=f"calibration sequences [{_SAMPLES}, or all that the text has if they are fewer]",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="tokens in a sequence",
)
@click.option(
    "--alpha",
    type=float,
    help="weight of the dense model's outputs in the target, 0 to 1 [0.5 for admm]",
)
@click.option(
    "--damp",
    type=float,
    default=0.01,
    show_default=True,
    help="share of the mean diagonal added to a Hessian",
)
@click.option(
    "--recover",
    type=click.IntRange(min=0),
    metavar="STEPS",
    help="train what is kept of each block towards the dense block's output, so many steps [0; 300 is "
    "a good number]",
)
@click.option(
    "--recover-seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="time for that in all blocks together [no limit]; alone: in at most 300 steps a block",
)
@click.option("--blocks", type=COUNT, help="only the first so many decoder blocks")
@click.option(
    "--misfit",
    type=click.Choice(["skip", "error"]),
    default="skip",
    show_default=True,
    help="what to do with a linear that the pattern does not fit",
)
@click.option("--dtype", type=click.Choice(_DTYPES), default="auto", show_default=True)
@click.option(
    "--device", type=DEVICE, help="where blocks are pruned [cuda when there is one, else cpu]"
)
@click.option(
    "--eval-text",
    help="text for perplexity, as for --calibration [the held-out part of the same source]",
)
@click.option(
    "--eval-samples",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="sequences for perplexity; 0 for none",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["compressed", "dense"]),
    default="compressed",
    show_default=True,
    help="dense: plain safetensors with zeros, for use without s3tensor",
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="choice of calibration sequences"
)
@click.option(
    "--out",
    "directory",
    required=True,
    type=click.Path(path_type=Path),
    help="folder for the pruned model; started again after a break, the run goes on",
)
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="write the figures as JSON"
)
def prune(
    model: str,
    pattern: Pattern,
    pruner: str,
    calibration: str,
    samples: int | None,
    seq_len: int,
    alpha: float | None,
    damp: float,
    recover: int | None,
    recover_seconds: float | None,
    blocks: int | None,
    misfit: Any,
    dtype: str,
    device: str | None,
    eval_text: str | None,
    eval_samples: int,
    form: str,
    seed: int,
    directory: Path,
    report: Path | None,
) -> None:
    """Prune the linears of MODEL (a folder, a hub name or a .gguf file) and save it."""
    from s3tensor import hf, llm
    from s3tensor.checkpoint import write_json

    start = time.perf_counter()
    # What is cheap to refuse is refused before anything is loaded.
    with _as_usage():
        llm.check_options(pruner, alpha, damp)
        recovery = _recovery(recover, recover_seconds, seed)
    llm.check_out(directory)
    if report is not None:
        _check_writable(report)
    where = device or _default_device()
    loaded, tokenizer = _load(model, dtype)
    batches, held_out = _texts(
        tokenizer, calibration, samples, seq_len, seed, eval_text, eval_samples
    )
    with llm.locked(directory), _says_how_to_go_on():
        dense_ppl = _perplexity(loaded, held_out, seq_len, where, "dense perplexity")
        result = llm.prune_model(
            loaded,
            batches,
            pattern,
            pruner,
            alpha=alpha,
            damp=damp,
            recover=recovery,
            device=where,
            blocks=blocks,
            on_misfit=misfit,
            work_dir=directory,
        )
        pruned_ppl = _perplexity(loaded, held_out, seq_len, where, "pruned perplexity")
        # What is in the folder is of this run, also a model that it was saving when it was killed.
        saved = hf.save_pretrained(
            loaded, directory, tokenizer, dense=form == "dense", overwrite=True
        )
        llm.forget_run(directory)
    now, dense = hf.weight_bytes(loaded)
    figures = {
        "model": model,
        **result.summary(),
        "dense_perplexity": dense_ppl,
        "pruned_perplexity": pruned_ppl,
        "calibration": {
            "source": calibration,
            "samples": len(batches),
            "seq_len": seq_len,
            "seed": seed,
        },
        "evaluation": {"source": eval_text or calibration, "samples": eval_samples},
        "dense_bytes": dense,
        "compressed_bytes": now,
        "total_seconds": round(time.perf_counter() - start, 3),
    }
    if report is not None:
        write_json(report, figures)
    _print_result(result, figures, saved)


@main.command(
    "eval",
    epilog="""Examples:

\b
  s3tensor eval sparse
  s3tensor eval HuggingFaceTB/SmolLM2-135M --text wikitext2 --samples 64 --json""",
)
@click.argument("model")
@click.option(
    "--text", default="pydoc", show_default=True, help="pydoc, c4, wikitext2 or a path to text"
)
@click.option("--samples", type=COUNT, default=16, show_default=True, help="sequences")
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="tokens in a sequence",
)
@click.option("--dtype", type=click.Choice(_DTYPES), default="auto", show_default=True)
@click.option("--device", type=DEVICE, help="[cuda when there is one, else cpu]")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def evaluate(
    model: str, text: str, samples: int, seq_len: int, dtype: str, device: str | None, as_json: bool
) -> None:
    """Perplexity of MODEL, pruned or not, on held-out text."""
    from s3tensor import llm

    loaded, tokenizer = _load(model, dtype)
    tokens = llm.windows(llm.tokenize(llm.load_text(text, "held-out"), tokenizer), samples, seq_len)
    value = _perplexity(loaded, tokens, seq_len, device or _default_device(), "perplexity")
    figures = {
        "model": model,
        "text": text,
        "samples": samples,
        "seq_len": seq_len,
        "perplexity": value,
    }
    click.echo(json.dumps(figures) if as_json else f"perplexity {value:.3f}")


@main.command(
    epilog="""Example:

\b
  s3tensor verify sparse"""
)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print JSON, a row for each weight")
def verify(directory: Path, as_json: bool) -> None:
    """Check DIRECTORY: every checksum holds, every sparse weight satisfies its pattern."""
    from s3tensor import hf

    rows = hf.verify(directory)
    if as_json:
        names = ("name", "pattern", "density")
        click.echo(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
        return
    if not rows:
        click.echo("every checksum holds; the model has no sparse weights")
        return
    patterns = ", ".join(sorted({pattern for _, pattern, _ in rows}))
    density = sum(row[2] for row in rows) / len(rows)
    click.echo(
        f"every checksum holds; {len(rows)} sparse weights satisfy {patterns}; mean density {density:.4f}"
    )


@main.command(
    epilog=f"""Patterns:

\b
{grammar()}

Examples:

\b
  s3tensor show pair4:8
  s3tensor show "block=1,2; scope=1,4; keep=2" --shape 8x32 --out pattern.png"""
)
@click.argument("pattern", type=PATTERN)
@click.option("--shape", type=SHAPE, help="ROWSxCOLUMNS [a small shape that fits]")
@click.option(
    "--out", "path", type=click.Path(path_type=Path, dir_okay=False), help="write a picture (.png)"
)
def show(pattern: Pattern, shape: tuple[int, ...] | None, path: Path | None) -> None:
    """Explain PATTERN in words and figures, and draw it with --out."""
    from s3tensor import viz

    with _as_usage():
        click.echo(viz.describe(pattern, shape))
        if path is not None:
            viz.save_picture(pattern, shape, path)
            click.echo(f"picture in {path}")


@main.command(
    epilog="""Examples:

\b
  s3tensor bench
  s3tensor bench --pattern 2:4 --shape 4096x4096 --batch 1 --batch 16
  s3tensor bench --calibrate    # measure this GPU: what runs is chosen by its times from then on"""
)
@click.option(
    "--pattern",
    "patterns",
    type=PATTERN,
    multiple=True,
    help="[2:4; with --calibrate all that have kernels]",
)
@click.option("--shape", "shapes", type=SHAPE, multiple=True, help="ROWSxCOLUMNS of a weight")
@click.option("--batch", "batches", type=COUNT, multiple=True, help="rows of x")
@click.option("--dtype", type=click.Choice(_DTYPES[1:]), help="[bfloat16, on a CPU float32]")
@click.option("--device", type=DEVICE, help="[cuda when there is one, else cpu]")
@click.option(
    "--calibrate", is_flag=True, help="measure every path and store the times for this GPU"
)
@click.option(
    "--out", "path", type=click.Path(path_type=Path, dir_okay=False), help="write JSON to a file"
)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def bench(
    patterns: tuple[Pattern, ...],
    shapes: tuple[tuple[int, ...], ...],
    batches: tuple[int, ...],
    dtype: str | None,
    device: str | None,
    calibrate: bool,
    path: Path | None,
    as_json: bool,
) -> None:
    """Time products by compressed weights beside dense ones, on this machine.

    lean is the compressed weight alone, fast may keep a second form of it (set_memory_).
    """
    from s3tensor import benchmark

    place = device or _default_device()
    if any(len(shape) != 2 for shape in shapes):
        raise _Refused("a weight to multiply by has two dims, such as 4096x4096")
    if calibrate and not place.startswith("cuda"):
        raise _Refused("--calibrate is for a CUDA device; on a CPU there is nothing to choose")
    plan = benchmark.Plan(
        tuple(str(pattern) for pattern in patterns)
        or (benchmark.CALIBRATED if calibrate else benchmark.FORMS[:1]),
        tuple((shape[0], shape[1]) for shape in shapes)
        or (benchmark.SHAPES if calibrate else benchmark.SHAPES[5:7]),
        tuple(sorted(set(batches))) or benchmark.BATCHES[: None if place != "cpu" else 5],
        dtype or ("float32" if place == "cpu" else "bfloat16"),
        place,
    )
    say = err.print if err.is_terminal or not as_json else (lambda line: None)
    with _as_usage():
        plan.check()
    if calibrate:
        saved = benchmark.calibrate(plan, say)
        click.echo(f"times of {place} in {saved}; they are used from now on")
        if path is not None:
            path.write_text(saved.read_text(encoding="utf-8"), encoding="utf-8")
        return
    record = benchmark.run(plan, say)
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps(record) if as_json else benchmark.table(record))


def _recovery(steps: int | None, seconds: float | None, seed: int) -> Recovery | None:
    from s3tensor.llm import Recovery

    if steps is None and seconds is None:
        return None
    if steps is None:
        return Recovery(seconds=seconds, seed=seed)
    return Recovery(steps, seconds=seconds, seed=seed)


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    """What is refused here is the command's own fault."""
    try:
        yield
    except S3Error as error:
        raise _Refused(str(error)) from error


@contextlib.contextmanager
def _says_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        err.print("\nfinished blocks are kept: the same command goes on from there")
        raise


def _check_writable(report: Path) -> None:
    """Refuse at the start a report that could not be written at the end."""
    folder = next(p for p in report.resolve().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CheckpointError(f"cannot write {report}: {folder} is no folder that can be written")


def _load(model: str, dtype: str) -> tuple[Any, Any]:
    import torch

    from s3tensor import hf

    with err.status(f"loading {model}") if err.is_terminal else contextlib.nullcontext():
        return hf.load_model(model, "auto" if dtype == "auto" else getattr(torch, dtype))


def _texts(
    tokenizer: Any,
    calibration: str,
    samples: int | None,
    seq_len: int,
    seed: int,
    eval_text: str | None,
    eval_samples: int,
) -> tuple[list[Tensor], Tensor | None]:
    """Calibration batches of one sequence, and the sequences for perplexity: never the same ones."""
    from s3tensor import llm

    tokens = llm.tokenize(llm.load_text(calibration), tokenizer)
    same = eval_text is None and not llm.has_parts(calibration)
    # A text without parts of its own gives both: different windows of one random order.
    extra = eval_samples if same else 0
    if samples is None:
        samples = max(1, min(_SAMPLES, tokens.numel() // seq_len - extra))
    picked = llm.windows(tokens, samples + extra, seq_len, seed)
    batches = list(picked[:samples].split(1))
    if same or eval_samples == 0:
        return batches, picked[samples:] if extra else None
    held_out = llm.tokenize(llm.load_text(eval_text or calibration, "held-out"), tokenizer)
    return batches, llm.windows(held_out, eval_samples, seq_len)


def _perplexity(
    model: Any, tokens: Tensor | None, seq_len: int, device: str, title: str
) -> float | None:
    if tokens is None:
        return None
    from s3tensor.evaluate import perplexity

    home = next(model.parameters()).device
    model.to(device)
    try:
        with _bar(title) as advance:
            return perplexity(model, tokens, seq_len, progress=advance)
    finally:
        model.to(home)


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    bar = Progress(console=err, disable=not err.is_terminal, transient=True)
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _print_result(result: PruneReport, figures: dict[str, Any], saved: Path) -> None:
    files = saved.glob("*.safetensors") if saved.is_dir() else [saved]
    disk = sum(file.stat().st_size for file in files)
    table = Table("", "dense", "pruned")
    dense, pruned = figures["dense_perplexity"], figures["pruned_perplexity"]
    if dense is not None:
        table.add_row("perplexity", f"{dense:.2f}", f"{pruned:.2f}")
    whole = _megabytes(figures["dense_bytes"])
    table.add_row("weights in memory", whole, _megabytes(figures["compressed_bytes"]))
    table.add_row("weights on disk", whole, _megabytes(disk))
    table.add_row("density of the linears", "1", f"{figures['density']:.4g}")
    out.print(str(result))
    out.print(table)
    out.print(
        f"saved to {saved}; rows for each linear and block beside it in linears.csv and blocks.csv"
        if not saved.is_dir()
        else f"saved in {saved}, with rows for each linear and block in linears.csv and blocks.csv"
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    sys.exit(main())
