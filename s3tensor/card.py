"""A section of a model's ``README.md``: how the model was pruned, and how to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from s3tensor.checkpoint import write_atomically
from s3tensor.compressed import Compressed

CARD = "README.md"
_BEGIN, _END = "<!-- s3tensor: begin -->", "<!-- s3tensor: end -->"
_FRONT = "---\nlibrary_name: transformers\ntags:\n- s3tensor\n- structured-sparsity\n---\n\n"

# What a card may say, in this order, and under which name.
_ROWS = {
    "model": "Pruned from",
    "pattern": "Pattern",
    "pruner": "Pruner",
    "density": "Kept fraction of the pruned weights",
    "calibration": "Calibration",
    "evaluation": "Evaluation text",
    "dense_perplexity": "Perplexity before",
    "pruned_perplexity": "Perplexity after",
}


def write_card(folder: Path, known: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """Write the section into the ``README.md`` of a model's folder; what else the file says stays.

    Args:
        folder: that holds the model.
        known: any of ``model, pattern, pruner, density, calibration, evaluation, dense_perplexity,
            pruned_perplexity, command``, such as the figures of ``s3tensor prune --report``; other keys are
            left out, and so are values that are None.
        state: of the model; it tells the patterns where ``known`` does not.

    Raises:
        CheckpointError: when the file cannot be written, with the system's reason.
    """
    sparse = [part for part in state.values() if isinstance(part, Compressed)]
    patterns = Counter(_pattern_of(part) for part in sparse)
    facts = {**known}
    if facts.get("pattern") is None and patterns:
        facts["pattern"] = ", ".join(
            f"{name} ({count} weights)" for name, count in patterns.items()
        )
    rows = [
        f"| {title} | {_cell(facts[key])} |"
        for key, title in _ROWS.items()
        if facts.get(key) is not None
    ]
    lines = [_BEGIN, "## Structured sparsity", "", "| | |", "|---|---|", *rows, ""]
    if facts.get("command") is not None:
        lines += ["Made with:", "", f"    {' '.join(str(facts['command']).split())}", ""]
    if sparse:
        lines += [
            "The weights are compressed; `pip install s3tensor`, then:",
            "",
            "    import s3tensor",
            "    from transformers import AutoModelForCausalLM",
            "",
            '    model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", dtype="auto")',
            "",
        ]
    section = "\n".join([*lines, _END]) + "\n"
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else _FRONT
    start, end = text.find(_BEGIN), text.find(_END)
    if 0 <= start < end:
        text = text[:start] + section + text[end + len(_END) :].removeprefix("\n")
    else:
        text = text + ("" if text.endswith("\n\n") or not text else "\n") + section
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    return path


def _pattern_of(weight: Compressed) -> str:
    values = weight.description().get("values")
    return f"{weight.pattern} with {values} values" if values else str(weight.pattern)


def _cell(value: Any) -> str:
    """A value as a cell of a table: one line, without bars."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    return " ".join(str(value).split()).replace("|", "\\|")
