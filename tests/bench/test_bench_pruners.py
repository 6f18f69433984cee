"""``bench/pruners.py`` on a toy model: what a row holds, methods of one's own, rivals that are not there."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch
from tiny_models import tiny

import s3tensor as s3
from s3tensor import prune

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = dict(prune.PRUNERS)
    monkeypatch.setattr(sys, "path", [str(BENCH), str(BENCH.parent / "examples"), *sys.path])
    yield importlib.import_module("pruners")
    sys.modules.pop("pruners")
    prune.PRUNERS.clear()
    prune.PRUNERS.update(before)


def batches(count: int = 4) -> list[torch.Tensor]:
    return tiny_models.batches(count, 48, rows=1)


def row(bench: ModuleType, name: str, pattern: str = "2:4") -> dict:
    model = tiny("llama")
    given = bench.hessians(model, batches(), 1)
    held_out = torch.cat(batches(2))[:, :32]
    return bench.measure(name, model, pattern, batches(), held_out, None, given)


def test_a_row_holds_errors_perplexity_seconds_and_memory(bench: ModuleType) -> None:
    rows = [row(bench, name) for name in ("magnitude", "sparsegpt", "admm", "admm, mixed budgets")]
    for each in rows:
        assert 0 < each["layer_error"] < 1 and len(each["layer_errors"]) == 7
        assert each["perplexity"] > 1 and 0 <= each["solver_seconds"] <= each["seconds"]
        assert each["peak_memory_bytes"] > 0 and 0 < each["median_error"] < 1
    magnitude, sparsegpt, admm, mixed = (each["layer_error"] for each in rows)
    assert admm == mixed < sparsegpt < magnitude
    shown = bench.table(rows)
    assert all(name in shown for name in ("admm, mixed budgets", "perplexity", "peak GB"))


def test_rows_have_the_damp_that_they_name_or_that_of_the_default(bench: ModuleType) -> None:
    default, given = row(bench, "admm"), row(bench, "admm, damp 0.01")
    for found, options in ((default, {}), (given, {"damp": 0.01})):
        model = tiny("llama")
        s3.llm.prune_model(model, batches(), "2:4", compress=False, progress=False, **options)
        assert found["perplexity"] == s3.perplexity(model, torch.cat(batches(2))[:, :32])
    assert default["perplexity"] != given["perplexity"]


def test_the_hessians_are_those_of_the_dense_models_inputs(bench: ModuleType) -> None:
    model = tiny("llama")
    given = bench.hessians(model, batches(), 0)
    block = model.model.layers[0]
    x = block.input_layernorm(torch.cat([model.model.embed_tokens(b) for b in batches()]))
    expected = s3.compute_hessian(x.detach())
    for name in ("q_proj", "k_proj", "v_proj"):
        torch.testing.assert_close(given[f"model.layers.0.self_attn.{name}"], expected)


def test_a_method_of_ones_own_takes_its_place(bench: ModuleType) -> None:
    @bench.method("mine")
    def mine(weight, factors, pattern):  # type: ignore[no-untyped-def]
        mask = s3.project(weight, pattern, weight.abs() * factors.diagonal.sqrt())
        return prune.Pruned(weight * mask, mask)

    found, wanda = row(bench, "mine"), row(bench, "wanda")
    assert found["perplexity"] == wanda["perplexity"]
    assert found["layer_errors"] == wanda["layer_errors"]


def test_what_a_method_cannot_do_is_said_in_its_row(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no room" in row(bench, "admm, mixed budgets", "rowpair16")["skipped"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("llm-compressor sparsegpt", "llm-compressor wanda"):
        found = row(bench, name)
        assert found == {"method": name, "skipped": "llmcompressor is not installed"}
    assert "perplexity" in bench.table([row(bench, "magnitude"), found])


@pytest.mark.parametrize(
    ("pattern", "expected"), [("2:4", (2, 4, 0.0)), ("1:4", (3, 4, 0.0)), ("unstructured@0.7", (0, 0, 0.3))]
)  # fmt: skip
def test_rivals_are_told_what_to_prune(bench: ModuleType, pattern: str, expected: tuple) -> None:
    assert bench.pruned_of(s3.Pattern.parse(pattern)) == pytest.approx(expected)
    for other in ("rowpair16", "pair4:8", "coupled2:4"):
        with pytest.raises(s3.PatternError, match="N:M"):
            bench.pruned_of(s3.Pattern.parse(other))


def test_a_rivals_hessian_is_the_one_that_was_given(bench: ModuleType) -> None:
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 0
    hessian = s3.compute_hessian(x)
    torch.testing.assert_close(bench.undamped(s3.Factors(hessian, 0.01)), hessian)
