"""A pruned model in a folder, and a copy of it to change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import s3tensor as s3


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import pruned  # needs transformers

    place = tmp_path_factory.mktemp("saved") / "model"
    s3.save_pretrained(pruned("llama"), place)
    return place


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))
