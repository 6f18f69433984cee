"""The command line: prune, eval, verify, show. Bad input ends in one line and a non-zero exit code."""

from __future__ import annotations

import contextlib
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

from s3tensor.errors import S3Error
from s3tensor.pattern import Pattern, grammar

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = ("auto", "float32", "bfloat16", "float16")
out = Console(soft_wrap=True)


class _Group(click.Group):
    """A group whose commands turn the errors of s3tensor into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except S3Error as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo(
                "\nstopped; finished blocks are kept: the same command goes on from there", err=True
            )
            raise SystemExit(130) from None


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="s3tensor")
def main() -> None:
    """Structured sparsity for PyTorch: prune, hold compressed, evaluate, check and picture."""


@main.command(
    epilog="Example: s3tensor prune HuggingFaceTB/SmolLM2-135M --pattern 2:4 --calibration pydoc --out sparse"
)
@click.argument("model")
@click.option("--pattern", default="2:4", show_default=True, help="see: s3tensor show --help")
@click.option(
    "--pruner", default="admm", show_default=True, help="admm, sparsegpt, wanda, obd, magnitude"
)
@click.option(
    "--calibration",
    default="pydoc",
    show_default=True,
    help="pydoc, c4, wikitext2 or a path to text",
)
@click.option("--samples", default=128, show_default=True, help="calibration sequences")
@click.option("--seq-len", default=1024, show_default=True, help="tokens in a calibration sequence")
@click.option(
    "--alpha", type=float, help="weight of the dense model's outputs in the target [0.3 for admm]"
)
@click.option(
    "--damp", default=0.01, show_default=True, help="share of the mean diagonal added to a Hessian"
)
@click.option("--blocks", type=int, help="only the first so many decoder blocks")
@click.option(
    "--misfit",
    type=click.Choice(["skip", "error"]),
    default="skip",
    show_default=True,
    help="what to do with a linear that the pattern does not fit",
)
@click.option("--dtype", type=click.Choice(_DTYPES), default="auto", show_default=True)
@click.option("--device", help="where blocks are pruned [cuda when there is one, else cpu]")
@click.option(
    "--eval-text", default=None, help="text for perplexity, as for --calibration [the same source]"
)
@click.option(
    "--eval-samples", default=16, show_default=True, help="sequences for perplexity; 0 for none"
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["compressed", "dense"]),
    default="compressed",
    show_default=True,
    help="dense: plain safetensors with zeros, for use without s3tensor",
)
@click.option("--seed", default=0, show_default=True, help="choice of calibration sequences")
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
    pattern: str,
    pruner: str,
    calibration: str,
    samples: int,
    seq_len: int,
    alpha: float | None,
    damp: float,
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
    from s3tensor import prune as pruners
    from s3tensor.checkpoint import write_json

    wanted = Pattern.parse(pattern)  # what is cheap to refuse is refused before anything is loaded
    pruners.get(pruner)
    llm.check_out(directory)
    start = time.perf_counter()
    loaded, tokenizer = _load(model, dtype)
    batches = llm.calibration_tokens(calibration, tokenizer, samples, seq_len, seed)
    held_out = _held_out(eval_text or calibration, tokenizer, eval_samples, seq_len)
    where = device or _default_device()
    dense_ppl = _perplexity(loaded, held_out, seq_len, where, "dense perplexity")
    result = llm.prune_model(
        loaded,
        batches,
        wanted,
        pruner,
        alpha=alpha,
        damp=damp,
        device=where,
        blocks=blocks,
        on_misfit=misfit,
        work_dir=directory,
    )
    pruned_ppl = _perplexity(loaded, held_out, seq_len, where, "pruned perplexity")
    saved = hf.save_pretrained(loaded, directory, tokenizer, dense=form == "dense")
    llm.forget_run(directory)
    now, dense = hf.weight_bytes(loaded)
    figures = {
        "model": model,
        **result.summary(),
        "dense_perplexity": dense_ppl,
        "pruned_perplexity": pruned_ppl,
        "calibration": {
            "source": calibration,
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
        },
        "dense_bytes": dense,
        "compressed_bytes": now,
        "total_seconds": round(time.perf_counter() - start, 3),
    }
    if report is not None:
        write_json(report, figures)
    out.print(str(result))
    _table(
        ("", "dense", "pruned"),
        ("perplexity", _number(dense_ppl), _number(pruned_ppl)),
        ("weights in memory", _megabytes(dense), _megabytes(now)),
    )
    out.print(
        f"saved to {saved}; rows for each linear and block beside it in linears.csv and blocks.csv"
    )


@main.command("eval")
@click.argument("model")
@click.option(
    "--text", default="pydoc", show_default=True, help="pydoc, c4, wikitext2 or a path to text"
)
@click.option("--samples", default=16, show_default=True, help="sequences")
@click.option("--seq-len", default=1024, show_default=True, help="tokens in a sequence")
@click.option("--dtype", type=click.Choice(_DTYPES), default="auto", show_default=True)
@click.option("--device", help="[cuda when there is one, else cpu]")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def evaluate(
    model: str, text: str, samples: int, seq_len: int, dtype: str, device: str | None, as_json: bool
) -> None:
    """Perplexity of MODEL, pruned or not, on held-out text."""
    if samples < 1:
        raise click.BadParameter("must be >= 1", param_hint="--samples")
    loaded, tokenizer = _load(model, dtype)
    tokens = _held_out(text, tokenizer, samples, seq_len)
    value = _perplexity(loaded, tokens, seq_len, device or _default_device(), "perplexity")
    figures = {
        "model": model,
        "text": text,
        "samples": samples,
        "seq_len": seq_len,
        "perplexity": value,
    }
    click.echo(json.dumps(figures) if as_json else f"perplexity {value:.3f}")


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
def verify(directory: Path) -> None:
    """Check DIRECTORY: every checksum holds, every sparse weight satisfies its pattern."""
    from s3tensor import hf

    rows = hf.verify(directory)
    patterns = sorted({pattern for _, pattern, _ in rows})
    density = sum(row[2] for row in rows) / len(rows) if rows else 1.0
    out.print(
        f"{len(rows)} sparse weights satisfy {', '.join(patterns) or 'nothing'}; mean density {density:.4f}"
    )


@main.command(epilog="Patterns:\n\n\b\n" + grammar())
@click.argument("pattern")
@click.option("--shape", default=None, help="ROWSxCOLUMNS [a small shape that fits]")
@click.option(
    "--out", "path", type=click.Path(path_type=Path, dir_okay=False), help="write a picture (.png)"
)
def show(pattern: str, shape: str | None, path: Path | None) -> None:
    """Explain PATTERN in words and figures, and draw it with --out."""
    from s3tensor import viz

    wanted = Pattern.parse(pattern)
    size = _shape(shape)
    click.echo(viz.describe(wanted, size))
    if path is not None:
        viz.save_picture(wanted, size, path)
        click.echo(f"picture in {path}")


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not ROWSxCOLUMNS, such as 16x64", param_hint="--shape"
        ) from None


def _load(model: str, dtype: str) -> tuple[Any, Any]:
    import torch

    from s3tensor import hf

    with out.status(f"loading {model}"):
        return hf.load_model(model, "auto" if dtype == "auto" else getattr(torch, dtype))


def _held_out(source: str, tokenizer: Any, samples: int, seq_len: int) -> Tensor | None:
    from s3tensor import llm

    if samples == 0:
        return None
    tokens = llm.tokenize(llm.load_text(source, "held-out"), tokenizer)
    return llm.windows(tokens, samples, seq_len)


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

    bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _table(head: tuple[str, ...], *rows: tuple[str, ...]) -> None:
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
