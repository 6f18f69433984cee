"""``s3tensor eval``: a model's perplexity and lm_eval scores. ``s3tensor lm-eval``: lm_eval's own command."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s3tensor.cli.group import (
    COUNT,
    DEVICE,
    DTYPES,
    Refused,
    as_usage,
    check_writable,
    default_device,
    err,
    load,
    main,
    perplexity_on,
)

if TYPE_CHECKING:
    from s3tensor.evaluate.harness import TaskReport

SEQ_LEN = 1024  # tokens in a window for perplexity, by default


@dataclass(frozen=True)
class _Wanted:
    """What is measured of each model."""

    text: str | None  # None: no perplexity
    text_column: str | None
    samples: int
    seq_len: int | None
    dtype: str
    device: str
    tasks: tuple[str, ...]
    settings: dict[str, Any]  # of the tasks

    def of(self, model: str) -> tuple[float | None, TaskReport | None]:
        from s3tensor import llm

        loaded, tokenizer = load(model, self.dtype)
        value = report = None
        if self.text is not None:
            length = self.seq_len or SEQ_LEN
            tokens = llm.load_tokens(self.text, tokenizer, "held-out", column=self.text_column)
            picked = llm.windows(tokens, self.samples, length)
            value = perplexity_on(loaded, picked, length, self.device, f"perplexity of {model}")
        if self.tasks:
            from s3tensor.evaluate.harness import evaluate_tasks

            report = evaluate_tasks(
                loaded.to(self.device),
                tokenizer,
                self.tasks,
                seq_len=self.seq_len,
                **self.settings,
            )
        return value, report


@main.command(
    "eval",
    epilog="""Examples:

\b
  s3tensor eval sparse
  s3tensor eval sparse --text notes.jsonl:body --samples 32
  s3tensor eval HuggingFaceTB/SmolLM2-135M --text wikitext2 --samples 64 --json
  s3tensor eval sparse --tasks s3_pydoc,s3_pydoc_choice --limit 20
  s3tensor eval sparse --tasks hellaswag,wikitext --against HuggingFaceTB/SmolLM2-135M --out figures.json

Tasks are those of lm_eval (pip install 's3tensor[eval]'); list them with: s3tensor lm-eval ls tasks.
s3_pydoc (perplexity) and s3_pydoc_choice (accuracy; chance is 0.25) need no network.""",
)
@click.argument("model")
@click.option(
    "--text",
    help="text for perplexity: pydoc, c4, wikitext2, a file or folder of text, or FILE:COLUMN of a table "
    "(.jsonl, .json, .csv, .tsv, .parquet) [pydoc; none with --tasks]",
)
@click.option(
    "--text-column",
    metavar="COLUMN",
    help="text column of a table [text, or the only one with text]",
)
@click.option(
    "--samples", type=COUNT, default=16, show_default=True, help="sequences for perplexity"
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=2),
    help=f"tokens in a window [{SEQ_LEN} for perplexity, the model's maximum for tasks]",
)
@click.option("--tasks", multiple=True, metavar="A,B", help="lm_eval tasks, groups or YAML files")
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    help="documents per task, or a share below 1 [all]",
)
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), help="few-shot examples [set by the task]"
)
@click.option("--batch-size", default="1", show_default=True, help="documents per batch, or auto")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="folder of YAML files with more tasks",
)
@click.option("--against", metavar="MODEL", help="also evaluate this model, and show the change")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--device", type=DEVICE, help="[cuda if available, else cpu]")
@click.option(
    "--out",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="write the figures as JSON to this file",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def evaluate(
    model: str,
    text: str | None,
    text_column: str | None,
    samples: int,
    seq_len: int | None,
    tasks: tuple[str, ...],
    limit: float | None,
    num_fewshot: int | None,
    batch_size: str,
    include_path: Path | None,
    against: str | None,
    dtype: str,
    device: str | None,
    file: Path | None,
    as_json: bool,
) -> None:
    """Evaluate MODEL, pruned or not: perplexity on held-out text, or --tasks of lm_eval."""
    from s3tensor.files import json_text, write_output

    if text is None and not tasks:
        text = "pydoc"
    if text is None and text_column is not None:
        raise Refused("--text-column needs --text")
    if file is not None:
        check_writable(file)
    names = _names(tasks, limit, num_fewshot, batch_size, include_path)
    settings: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "batch_size": int(batch_size) if batch_size.isdecimal() else batch_size,
        "include_path": include_path,
    }
    where = device or default_device()
    wanted = _Wanted(text, text_column, samples, seq_len, dtype, where, names, settings)
    value, report = wanted.of(model)
    figures = _figures(model, wanted, value, report)
    dense: tuple[float | None, TaskReport | None] = (None, None)
    if against is not None:
        dense = wanted.of(against)
        figures["against"] = _figures(against, wanted, *dense)
    if file is not None:
        write_output(file, json_text(figures))
    if as_json:
        click.echo(json.dumps(figures))
        return
    if value is not None:
        other = "" if dense[0] is None else f"; {dense[0]:.3f} of {against}"
        click.echo(f"perplexity {value:.3f}{other}")
    if report is not None:
        table = report.frame(dense[1])
        click.echo(table.to_string(index=False, float_format="%.4f", na_rep=""))
        count = report.settings["limit"]
        limited = "" if count is None else f"; partial: --limit {count:g} for each task"
        err.print(f"lm_eval {report.settings['versions']['lm_eval']}{limited}")
    if file is not None:
        err.print(f"figures in {file}")


def _reading(what: str) -> contextlib.AbstractContextManager[Any]:
    return err.status(f"reading {what}") if err.is_terminal else contextlib.nullcontext()


def _names(
    tasks: tuple[str, ...],
    limit: float | None,
    num_fewshot: int | None,
    batch_size: str,
    include_path: Path | None,
) -> tuple[str, ...]:
    """The tasks; unknown ones and wrong usage are refused before a model is loaded."""
    if not tasks:
        given = {
            "--limit": limit is not None,
            "--num-fewshot": num_fewshot is not None,
            "--batch-size": batch_size != "1",
            "--include-path": include_path is not None,
        }
        lonely = next((option for option, there in given.items() if there), None)
        if lonely is not None:
            raise Refused(f"{lonely} needs --tasks, such as --tasks s3_pydoc")
        return ()
    from s3tensor.evaluate.harness import check_tasks

    with as_usage(), _reading("the tasks of lm_eval"):
        return tuple(
            check_tasks(
                tasks,
                limit=limit,
                num_fewshot=num_fewshot,
                batch_size=int(batch_size) if batch_size.isdecimal() else batch_size,
                include_path=include_path,
            )
        )


def _figures(
    model: str, wanted: _Wanted, value: float | None, report: TaskReport | None
) -> dict[str, Any]:
    figures: dict[str, Any] = {"model": model}
    if value is not None:
        figures |= {
            "text": wanted.text,
            "samples": wanted.samples,
            "seq_len": wanted.seq_len or SEQ_LEN,
            "perplexity": value,
        }
    if report is not None:
        figures["tasks"] = report.to_dict()
    return figures


@main.command(
    "lm-eval",
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
        "help_option_names": [],
    },
    epilog="""Examples:

\b
  s3tensor lm-eval run --model hf --model_args pretrained=sparse --tasks s3_pydoc
  s3tensor lm-eval ls tasks""",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def lm_eval(arguments: tuple[str, ...]) -> None:
    """Run lm_eval's own command with support for compressed models and the tasks of s3tensor."""
    from s3tensor.evaluate.harness import run_command

    status = run_command(arguments)
    if status:
        sys.exit(status)
