"""A pruning run in a folder, which can be interrupted and continues."""

from __future__ import annotations

from pathlib import Path

from tiny_models import batches, tiny

from s3tensor import llm
from s3tensor.io.state import save_state

__all__ = ["batches", "resumable", "tiny"]


def resumable(folder: Path, kind: str = "llama", **options: object) -> llm.PruneReport:
    """A run that writes its blocks to ``folder``, and its final weights to ``folder/final``."""
    model = tiny(kind, 3)
    report = llm.prune_model(model, batches(2), "2:4", work_dir=folder, progress=False, **options)
    save_state(folder / "final", dict(model.state_dict()))
    return report
