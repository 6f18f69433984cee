"""``s3tensor prune``: a whole model, resumable."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from s3tensor.cli.group import (
    COUNT,
    DEVICE,
    DTYPES,
    PATTERN,
    SEED,
    SHARE,
    as_usage,
    check_writable,
    default_device,
    err,
    load,
    main,
    megabytes,
    out,
    perplexity_on,
    read_yaml,
)
from s3tensor.errors import ModelError, PatternError
from s3tensor.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from s3tensor.llm import PruneReport, Recovery

SAMPLES = 128  # calibration sequences by default, or fewer if the text has fewer


@main.command(
    epilog="""Examples:

\b
  s3tensor prune HuggingFaceTB/SmolLM2-135M --pattern 2:4 --out sparse
  s3tensor prune ./model --pattern rowpair16 --pruner sparsegpt --calibration text.txt --out sparse
  s3tensor prune ./model --calibration articles.jsonl:body --out sparse
  s3tensor prune model.gguf --calibration wikitext2 --samples 64 --device cuda --out sparse
  s3tensor prune ./model --recover 300 --recover-seconds 600 --out sparse
  s3tensor prune ./model --blocks 2 --samples 4 --eval-samples 0 --out trial --report trial.json

An interrupted run resumes when the same command is given again."""
)
@click.argument("model")
@click.option(
    "--pattern",
    type=PATTERN,
    default="2:4",
    show_default=True,
    help="listed by: s3tensor show --help",
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
    help="pydoc, c4, wikitext2, a file or folder of text, or FILE:COLUMN of a table (.jsonl, .json, .csv, "
    ".tsv, .parquet)",
)
@click.option(
    "--text-column",
    metavar="COLUMN",
    help="text column of --calibration's table [text, or the only one with text]",
)
@click.option(
    "--samples",
    type=COUNT,
    help=f"calibration sequences [{SAMPLES}, or fewer if the text has fewer]",
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
    type=SHARE,
    help="weight of the dense model's outputs in the target, 0 to 1, or auto: chosen for each linear on "
    "calibration sequences held back from its fit [0.5 for admm and obs]",
)
@click.option(
    "--beta",
    type=float,
    help="share of the residual stream's drift that the linears writing into it correct, 0 to 1 [alpha]",
)
@click.option(
    "--damp",
    type=SHARE,
    help="share of a Hessian's mean diagonal added to it, or auto: chosen like --alpha [auto with a dense "
    "target (alpha > 0) and at least 2 sequences; else 0.01]",
)
@click.option(
    "--recover",
    type=click.IntRange(min=0),
    metavar="STEPS",
    help="steps that train each pruned block towards the dense block's output [0; 300 is a good "
    "choice]",
)
@click.option(
    "--recover-seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="time limit for recovery of all blocks [none]; without --recover: up to 300 steps per block",
)
@click.option(
    "--budgets",
    metavar="mixed|FILE.yaml",
    help="mixed: keep more weights where pruning costs most and fewer elsewhere, at the same total; or a "
    "file that maps names or globs of linears to patterns, the rest get --pattern",
)
@click.option("--blocks", type=COUNT, help="prune only the first N decoder blocks")
@click.option(
    "--misfit",
    type=click.Choice(["skip", "error"]),
    default="skip",
    show_default=True,
    help="linears that the pattern does not fit: leave dense, or fail",
)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--device", type=DEVICE, help="where blocks are pruned [cuda if available, else cpu]")
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
    "--seed", type=SEED, default=0, show_default=True, help="seed of the calibration sequences"
)
@click.option(
    "--out",
    "directory",
    required=True,
    type=click.Path(path_type=Path),
    help="folder for the pruned model; an interrupted run resumes from it",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="write the figures as JSON to this file",
)
@click.option("--json", "as_json", is_flag=True, help="print the figures as JSON")
def prune(
    model: str,
    pattern: Pattern,
    pruner: str,
    calibration: str,
    text_column: str | None,
    samples: int | None,
    seq_len: int,
    alpha: Any,  # float, "auto" or None
    beta: float | None,
    damp: Any,  # float, "auto" or None
    recover: int | None,
    recover_seconds: float | None,
    budgets: str | None,
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
    as_json: bool,
) -> None:
    """Prune the linears of MODEL (a folder, a hub name or a .gguf file) and save it."""
    from s3tensor import llm
    from s3tensor.files import json_text, write_output
    from s3tensor.io import pretrained as hf

    start = time.perf_counter()
    # Refuse what is cheap to check before anything is loaded.
    with as_usage():
        llm.check_options(pruner, alpha, damp, beta)
        recovery = _recovery(recover, recover_seconds, seed)
        wanted = read_budgets(budgets)
    llm.check_out(directory)
    if report is not None:
        check_writable(report)
    where = device or default_device()
    loaded, tokenizer = load(model, dtype)
    batches, held_out = _texts(
        tokenizer, calibration, samples, seq_len, seed, eval_text, eval_samples, text_column
    )
    evaluated = held_out if held_out is not None and _predicts(loaded) else None
    with llm.locked(directory), _resume_hint():
        llm.check_out(directory)  # again: another run may have ended here meanwhile
        dense_ppl = perplexity_on(loaded, evaluated, seq_len, where, "dense perplexity")
        result = llm.prune_model(
            loaded,
            batches,
            pattern,
            pruner,
            alpha=alpha,
            beta=beta,
            damp=damp,
            recover=recovery,
            budgets=wanted,
            held_out=held_out.split(1)
            if held_out is not None and _few_tokens(loaded, batches)
            else None,
            device=where,
            blocks=blocks,
            on_misfit=misfit,
            work_dir=directory,
        )
        pruned_ppl = perplexity_on(loaded, evaluated, seq_len, where, "pruned perplexity")
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
            "evaluation": {
                "source": eval_text or calibration,
                "samples": eval_samples,
                "seq_len": seq_len,
            },
            "dense_bytes": dense,
            "compressed_bytes": now,
            "total_seconds": round(time.perf_counter() - start, 3),
        }
        # Everything in the folder is of this run, even a model that it was saving when it was killed.
        card = {**figures, "pattern": result.patterns_text}
        card["command"] = shlex.join(["s3tensor", *sys.argv[1:]])
        if evaluated is None:
            del card["evaluation"]
        saved = hf.save_pretrained(
            loaded, directory, tokenizer, dense=form == "dense", overwrite=True, card=card
        )
        llm.forget_run(directory)
    if report is not None:
        write_output(report, json_text(figures))
    if as_json:
        click.echo(json.dumps({**figures, "saved": str(saved)}))
        return
    _print_result(result, figures, saved)


def _recovery(steps: int | None, seconds: float | None, seed: int) -> Recovery | None:
    from s3tensor.llm import Recovery

    if steps is None and seconds is None:
        return None
    if steps is None:
        return Recovery(seconds=seconds, seed=seed)
    return Recovery(steps, seconds=seconds, seed=seed)


def _predicts(model: Any) -> bool:
    """Whether a model has a perplexity; says why where it has none."""
    from s3tensor.evaluate.perplexity import check_predicts

    try:
        check_predicts(model)
    except ModelError as error:
        err.print(f"no perplexity: {error}")
        return False
    return True


@contextlib.contextmanager
def _resume_hint() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        err.print("\nfinished blocks are kept; the same command resumes from there")
        raise


def read_budgets(text: str | None) -> Any:
    """The ``budgets`` of ``prune_model`` from ``--budgets``: the patterns in a file, or the word itself.

    Raises:
        PatternError: no file, one that does not map names to patterns, or a pattern that does not parse.
    """
    if text is None or text == "mixed":
        return text
    try:
        found = read_yaml(Path(text))
    except OSError as error:
        raise PatternError(
            f"--budgets {text}: give 'mixed' or a YAML file ({error.strerror})"
        ) from None
    except ValueError as error:
        raise PatternError(str(error)) from None
    if not isinstance(found, dict) or not all(
        isinstance(word, str) for pair in found.items() for word in pair
    ):
        raise PatternError(
            f"{text} must map names of linears to patterns, as in '*.down_proj': 3:4"
        )
    for pattern in found.values():
        Pattern.parse(pattern)
    return found


def _few_tokens(model: Any, batches: list[Tensor]) -> bool:
    """Whether there are fewer calibration tokens than some linear of the blocks has inputs."""
    from s3tensor import llm

    pattern = Pattern.parse("unstructured@1")
    blocks = llm.decoder_blocks(model)[1]
    widths = [x.shape[1] for b in blocks for x in llm.prunable_layers(b, "", pattern)[0]]
    return sum(batch.numel() for batch in batches) < max(widths, default=0)


def _texts(
    tokenizer: Any,
    calibration: str,
    samples: int | None,
    seq_len: int,
    seed: int,
    eval_text: str | None,
    eval_samples: int,
    text_column: str | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """Calibration batches of one sequence, and other sequences for perplexity."""
    from s3tensor import llm

    tokens = llm.load_tokens(calibration, tokenizer, column=text_column)
    same = eval_text is None and not llm.has_parts(calibration)
    # A text without its own parts gives both: different windows in one random order.
    extra = eval_samples if same else 0
    if samples is None:
        samples = max(1, min(SAMPLES, tokens.numel() // seq_len - extra))
    picked = llm.windows(tokens, samples + extra, seq_len, seed)
    batches = list(picked[:samples].split(1))
    if same or eval_samples == 0:
        return batches, picked[samples:] if extra else None
    held_out = llm.load_tokens(eval_text or calibration, tokenizer, "held-out")
    return batches, llm.windows(held_out, eval_samples, seq_len)


def _print_result(result: PruneReport, figures: dict[str, Any], saved: Path) -> None:
    files = saved.glob("*.safetensors") if saved.is_dir() else [saved]
    disk = sum(file.stat().st_size for file in files)
    table = Table("", "dense", "pruned")
    dense, pruned = figures["dense_perplexity"], figures["pruned_perplexity"]
    if dense is not None:
        table.add_row("perplexity", f"{dense:.2f}", f"{pruned:.2f}")
    whole = megabytes(figures["dense_bytes"])
    table.add_row("weights in memory", whole, megabytes(figures["compressed_bytes"]))
    table.add_row("weights on disk", whole, megabytes(disk))
    table.add_row("density of the linears", "1", f"{figures['density']:.4g}")
    out.print(str(result))
    out.print(table)
    out.print(
        f"saved to {saved}; rows for each linear and block beside it in linears.csv and blocks.csv"
        if not saved.is_dir()
        else f"saved in {saved}, with rows for each linear and block in linears.csv and blocks.csv"
    )
