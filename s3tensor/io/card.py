"""The section of a model's ``README.md`` that says how it was pruned and how to load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from s3tensor.files import write_atomically
from s3tensor.tensor.base import Compressed

CARD = "README.md"
_BEGIN, _END = "<!-- s3tensor: begin -->", "<!-- s3tensor: end -->"
_FRONT = "---\nlibrary_name: transformers\ntags:\n- s3tensor\n- structured-sparsity\n---\n\n"

# What a card may say, in this order, and the title of each row.
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


def write_card(
    folder: Path, known: Mapping[str, Any], state: Mapping[str, Tensor], dense: bool = False
) -> Path:
    """Write the section into the ``README.md`` of a model's folder; what else the file says stays.

    Args:
        folder: of the model.
        known: any of ``model, pattern, pruner, density, calibration, evaluation, dense_perplexity,
            pruned_perplexity, command``, such as the figures of ``s3tensor prune --report``; other keys
            and values that are None are left out. ``command`` may be a list.
        state: the state dict of the model, for the patterns where ``known`` lacks them.
        dense: the folder holds dense weights, even where those of ``state`` are compressed.

    Raises:
        CheckpointError: when the file cannot be written, with the system's reason.
    """
    sparse = [part for part in state.values() if isinstance(part, Compressed)]
    patterns = Counter(_pattern_of(part, dense) for part in sparse)
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
    lines = [_BEGIN, "## Structured sparsity", ""]
    if rows:
        lines += ["| | |", "|---|---|", *rows, ""]
    if facts.get("command") is not None:
        given = facts["command"]
        commands = [given] if isinstance(given, str) else given
        lines += ["Made with:", "", *(f"    {' '.join(x.split())}" for x in commands), ""]
    if sparse and not dense:
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
    start, end = _section(text)
    if 0 <= start < end:
        text = text[:start] + section + text[end + len(_END) :].removeprefix("\n")
    else:
        text = text + ("" if text.endswith("\n\n") or not text else "\n") + section
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    return path


def read_card(folder: Path) -> dict[str, Any] | None:
    """The section of a folder's ``README.md``, as strings by the keys of :func:`write_card`.

    ``command`` is a list. None without such a section.
    """
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    start, end = _section(text)
    if not 0 <= start < end:
        return None
    keys = {title: key for key, title in _ROWS.items()}
    known: dict[str, Any] = {}
    commands: list[str] = []
    made = False  # among the commands
    for line in text[start:end].splitlines():
        row = re.fullmatch(r"\| ([^|]+) \| (.*) \|", line)
        if row and row[1] in keys:
            known[keys[row[1]]] = row[2].replace("\\|", "|")
        elif line and not line.startswith("    "):
            made = line == "Made with:"
        elif made and line:
            commands.append(line.strip())
    if commands:
        known["command"] = commands
    return known


def _section(text: str) -> tuple[int, int]:
    """Where the section starts, and where its last line starts; -1 for what is missing."""
    return text.find(_BEGIN), text.find(_END)


def _pattern_of(weight: Compressed, dense: bool) -> str:
    values = weight.description().get("values")
    if not values:
        return str(weight.pattern)
    words = f"values rounded to {values}" if dense else f"{values} values"
    return f"{weight.pattern} with {words}"


def _cell(value: Any) -> str:
    """A value as a cell of a table: one line, without bars."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {item}" for key, item in value.items())
    return " ".join(str(value).split()).replace("|", "\\|")
