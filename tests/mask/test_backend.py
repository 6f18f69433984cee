"""The gate to the kernels: what it loads, and what it says where it cannot."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator

import pytest
import torch

from s3tensor.mask import backend


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    for cached in (backend.load, backend._warn_once):
        cached.cache_clear()
    yield
    for cached in (backend.load, backend._warn_once):
        cached.cache_clear()


def test_rocm_has_no_kernels_but_the_tile_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.is_rocm() and backend.load("matmul", "slow") is None
    assert backend.tiles().can_tile(16, 64)


def test_a_module_that_does_not_import_is_none_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise ImportError("no gluon")

    monkeypatch.setattr(importlib, "import_module", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.load("select") is None
    with pytest.warns(UserWarning, match=r"matmul .*need Triton 3.6 .*\(no gluon\): it is slow"):
        assert backend.load("matmul", "it is slow") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.load("matmul", "it is slow") is None
