"""``s3tensor eval``: perplexity of a model."""

from __future__ import annotations

import json

import click

from s3tensor.cli.group import COUNT, DEVICE, DTYPES, default_device, load, main, perplexity_on


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
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--device", type=DEVICE, help="[cuda when there is one, else cpu]")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def evaluate(
    model: str, text: str, samples: int, seq_len: int, dtype: str, device: str | None, as_json: bool
) -> None:
    """Perplexity of MODEL, pruned or not, on held-out text."""
    from s3tensor import llm

    loaded, tokenizer = load(model, dtype)
    tokens = llm.windows(llm.tokenize(llm.load_text(text, "held-out"), tokenizer), samples, seq_len)
    value = perplexity_on(loaded, tokens, seq_len, device or default_device(), "perplexity")
    figures = {
        "model": model,
        "text": text,
        "samples": samples,
        "seq_len": seq_len,
        "perplexity": value,
    }
    click.echo(json.dumps(figures) if as_json else f"perplexity {value:.3f}")
