"""Transposable masks: a weight and its transpose under one N:4 mask, exactly the best."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor.mask.transposable import tile_masks, transposable_mask

MODES = ("fixed", "ste", "srste", "soft")


def layer_of(mode: str, pattern: str = "2:4", seed: int = 0, **options: object) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(16, 8)
    sparse = s3.S3Sparse(pattern, mode, transposable=True, **options)
    parametrize.register_parametrization(layer, "weight", sparse)
    return layer


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_masks_of_a_tile_are_all_with_that_many_in_each_row_and_column(keep: int) -> None:
    found = {tuple(mask.flatten().tolist()) for mask in tile_masks(keep)}
    every = itertools.product((False, True), repeat=16)
    expected = {
        bits
        for bits in every
        if all(sum(bits[4 * i : 4 * i + 4]) == keep for i in range(4))
        and all(sum(bits[i::4]) == keep for i in range(4))
    }
    assert found == expected and len(tile_masks(keep)) == len(expected)


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 3]), st.integers(0, 999))
def test_no_other_mask_of_rows_and_columns_keeps_more(
    rows: int, columns: int, keep: int, seed: int
) -> None:
    weight = torch.randn(4 * rows, 4 * columns, generator=torch.Generator().manual_seed(seed))
    mask = s3.transposable(weight, f"{keep}:4")
    assert mask.dtype == torch.bool and mask.shape == weight.shape
    for side in (mask, mask.t()):
        assert bool((side.reshape(-1, 4).sum(1) == keep).all())
        assert s3.satisfies((weight * mask if side is mask else (weight * mask).t()), f"{keep}:4")
    squares = weight.double().square()
    for i, j in itertools.product(range(rows), range(columns)):
        at = slice(4 * i, 4 * i + 4), slice(4 * j, 4 * j + 4)
        best = max(float((squares[at] * other).sum()) for other in tile_masks(keep))
        assert float((squares[at] * mask[at]).sum()) == pytest.approx(best, rel=1e-12)


@given(st.integers(0, 999), st.integers(-140, 120))
def test_a_scale_changes_no_mask_and_a_transpose_transposes_it(seed: int, exponent: int) -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)).double()
    mask = s3.transposable(weight)
    assert torch.equal(s3.transposable(weight * 2.0**exponent), mask)
    assert torch.equal(s3.transposable(weight.t()), mask.t())  # no two sums are equal
    other = torch.rand(8, 12, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(s3.transposable(weight, scores=weight.square()), mask)
    chosen = s3.transposable(weight, scores=other)
    assert float((other * chosen).sum()) >= float((other * mask).sum()) - 1e-6


def test_it_keeps_less_than_rows_alone_and_more_than_half_of_it() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    free = float((weight * s3.project(weight, "2:4")).square().sum())
    both = float((weight * s3.transposable(weight)).square().sum())
    assert 0.9 * free < both < free


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["1:4", "2:4"])
def test_weights_in_training_satisfy_the_pattern_both_ways(mode: str, pattern: str) -> None:
    layer = layer_of(mode, pattern)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(4):
        layer(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        s3.step(layer)
        weight = layer.weight.detach()
        assert s3.satisfies(weight, pattern) and s3.satisfies(weight.t(), pattern)
    s3.finalize(layer)
    assert torch.equal(layer.weight.to_dense(), weight)


def test_a_schedule_a_score_and_a_held_mask_are_transposable_too() -> None:
    layer = layer_of("ste", schedule=s3.Density(steps=4), score=lambda w, module: w.abs())
    for expected in (1.0, 0.75, 0.5, 0.5, 0.5):
        mask = layer.parametrizations.weight[0].mask
        assert float(mask.float().mean()) == expected
        assert bool((mask.reshape(-1, 4).sum(1) == 4 * expected).all())
        assert bool((mask.t().reshape(-1, 4).sum(1) == 4 * expected).all())
        s3.step(layer)


def test_it_compiles_in_one_graph_and_its_operator_can_be_traced() -> None:
    eager, layer = layer_of("ste"), layer_of("ste")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    eager(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for left, right in zip(eager.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad)
    torch.library.opcheck(transposable_mask, (torch.randn(8, 8), 2))


def test_state_dicts_tell_it_from_the_plain_pattern() -> None:
    layer = layer_of("ste", refresh=2)
    again = layer_of("ste", seed=1, refresh=2)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)
    plain = nn.Linear(16, 8)
    parametrize.register_parametrization(plain, "weight", s3.S3Sparse("2:4", refresh=2))
    with pytest.raises(RuntimeError, match="transposable"):
        plain.load_state_dict(layer.state_dict())


def test_what_cannot_be_transposable_is_refused() -> None:
    for pattern in ("2:8", "pair4:8", "rowpair16", "unstructured@0.5"):
        with pytest.raises(s3.PatternError, match="cannot be transposable"):
            s3.transposable(torch.randn(16, 64), pattern)
    with pytest.raises(s3.PatternError, match="matrix of 4x4 tiles, got shape"):
        s3.transposable(torch.randn(6, 8))
    with pytest.raises(s3.NonFiniteError):
        s3.transposable(torch.full((4, 4), float("nan")))
    with pytest.raises(s3.PatternError, match="scores of shape"):
        s3.transposable(torch.randn(4, 4), scores=torch.randn(4, 8))
    layer = nn.Linear(16, 6)
    with pytest.raises(s3.PatternError, match="matrix of 4x4 tiles"):
        parametrize.register_parametrization(layer, "weight", s3.S3Sparse("2:4", transposable=True))
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    rows = s3.project(layer.weight, "2:4")  # of rows alone
    assert not s3.satisfies(rows.float().t(), "2:4")
    with pytest.raises(s3.PatternError, match="the mask keeps"):
        parametrize.register_parametrization(
            layer, "weight", s3.S3Sparse("2:4", "fixed", mask=rows, transposable=True)
        )


def test_a_mask_that_is_not_transposable_is_not_loaded() -> None:
    layer = layer_of("fixed")
    state = layer.state_dict()
    one_way = s3.project(torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), "2:4")
    assert not s3.satisfies(one_way.t().float(), "2:4")
    state["parametrizations.weight.0.mask"] = one_way
    with pytest.raises(RuntimeError, match="weight: the mask keeps"):
        layer_of("fixed").load_state_dict(state)
