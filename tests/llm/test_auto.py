"""Alpha and damp that calibration tokens choose: the least of a parabola, parts of the text, whole runs."""

from __future__ import annotations

import gc
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny
from torch import Tensor

import s3tensor as s3
from s3tensor import llm
from s3tensor.llm.auto import DAMPS, Coefficients, choose, split_batches
from s3tensor.llm.moments import Moments, merged
from s3tensor.llm.resume import RunFolder

IDS = torch.randint(VOCABULARY, (10, 16), generator=torch.Generator().manual_seed(1))
BOTH = frozenset({"alpha", "damp"})


class Tokens:
    """Inputs of one linear in both streams, and what its outputs are to make up for."""

    def __init__(self, count: int, seed: int, drifts: bool) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.dense = torch.randn(count, 6, generator=draw)
        self.pruned = self.dense + 0.7 * torch.randn(count, 6, generator=draw)
        self.extra = 0.5 * torch.randn(count, 3, generator=draw) if drifts else None

    def moments(self) -> Moments:
        hessian = s3.Hessian(6)
        hessian.update(self.pruned, self.dense)
        drift = None if self.extra is None else self.extra.T @ self.pruned / len(self.pruned)
        return Moments(hessian, drift)

    def missed(self, weight: Tensor, dense_weight: Tensor) -> float:
        wanted = self.dense.double() @ dense_weight.double().T
        if self.extra is not None:
            wanted += self.extra
        return float((self.pruned.double() @ weight.double().T - wanted).square().mean())


def fitted(weight: Tensor, of: Tokens, alpha: float, beta: float, damp: float) -> Tensor:
    """The fit without a mask, in float64."""
    x, x0 = of.pruned.double(), of.dense.double()
    hessian, cross = x.T @ x / len(x), x0.T @ x / len(x)
    ridge = damp * hessian.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    wanted = weight.double() @ ((1 - alpha) * hessian + alpha * cross + ridge)
    if of.extra is not None:
        wanted += beta * of.extra.double().T @ x / len(x)
    return wanted @ torch.linalg.inv(hessian + ridge)


@given(seed=st.integers(0, 2**20), drifts=st.booleans(), beta=st.sampled_from([0.25, 1.0]))
def test_the_chosen_alpha_and_damp_miss_least_on_the_tokens_that_were_kept_apart(
    seed: int, drifts: bool, beta: float
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(3, 6)
    fit, check = Tokens(20, seed + 1, drifts), Tokens(9, seed + 2, drifts)
    coefficients = Coefficients(0.5, beta, 0.01, BOTH)
    found = choose([weight], fit.moments(), check.moments(), coefficients)
    assert found.beta == beta and 0 <= found.alpha <= 1 and found.damp in DAMPS

    def missed(alpha: float, damp: float) -> float:
        return check.missed(fitted(weight, fit, alpha, beta, damp), weight)

    least = missed(found.alpha, found.damp)
    for damp in DAMPS:
        for alpha in torch.linspace(0, 1, 21).tolist():
            assert least <= missed(alpha, damp) * (1 + 1e-4)


@given(seed=st.integers(0, 2**20))
def test_linears_of_one_input_choose_as_one_weight(seed: int) -> None:
    torch.manual_seed(seed)
    weights = [torch.randn(rows, 6) for rows in (1, 2)]
    fit, check = Tokens(20, seed, False).moments(), Tokens(9, seed + 1, False).moments()
    coefficients = Coefficients(0.5, 0.5, 0.01, BOTH)
    one = choose([torch.cat(weights)], fit, check, coefficients)
    several = choose(weights, fit, check, coefficients)
    assert several.damp == one.damp and math.isclose(several.alpha, one.alpha, abs_tol=1e-5)


def test_where_the_streams_are_the_same_nothing_is_chosen() -> None:
    torch.manual_seed(0)
    parts = []
    for count in (20, 9):
        hessian, x = s3.Hessian(6), torch.randn(count, 6)
        hessian.update(x, x.clone())
        parts.append(Moments(hessian))
    coefficients = Coefficients(0.3, 0.3, 0.02, BOTH)
    found = choose([torch.randn(3, 6)], *parts, coefficients)
    assert (found.alpha, found.damp) == (0.3, 0.02)


def test_a_damp_that_leaves_the_hessian_singular_is_passed_over() -> None:
    torch.manual_seed(0)
    x = torch.zeros(2, 6)
    x[0] = 1e4  # of rank one, and of a size that float32 rounds the smaller damps away
    fit, check = s3.Hessian(6), s3.Hessian(6)
    fit.update(x, x * 1.1)
    check.update(torch.randn(9, 6), torch.randn(9, 6))
    coefficients = Coefficients(0.5, 0.5, 0.0, BOTH)  # a damp of 0, which is singular
    found = choose([torch.randn(3, 6)], Moments(fit), Moments(check), coefficients)
    assert found.damp in DAMPS
    with pytest.raises(s3.HessianError, match="not positive definite"):
        choose([torch.randn(3, 6)], Moments(fit), Moments(check), Coefficients(0.5, 0.5, 0.0))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1))
def test_parts_hold_every_sequence_once_and_in_order(sizes: list[int]) -> None:
    count = sum(sizes)
    rows = torch.arange(count)[:, None]
    batches, (fit, check) = split_batches(rows.split(sizes))
    assert sorted([*fit, *check]) == list(range(len(batches)))
    assert torch.equal(torch.cat(batches), rows)
    kept = torch.cat([batches[i] for i in check])[:, 0].tolist()
    assert kept == [row for row in range(count) if (count - 1 - row) % 8 == 0]
    assert fit


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), dense=st.booleans())
def test_merged_moments_are_those_of_all_tokens(sizes: list[int], dense: bool) -> None:
    torch.manual_seed(0)
    x, x0, weights = torch.randn(sum(sizes), 6), torch.randn(sum(sizes), 6), torch.rand(sum(sizes))
    extra = torch.randn(sum(sizes), 3)
    whole, parts, start = s3.Hessian(6), [], 0
    whole.update(x, x0 if dense else None, weights)
    for size in sizes:
        some, start = slice(start, start + size), start + size
        part = s3.Hessian(6)
        part.update(x[some], x0[some] if dense else None, weights[some])
        drift = (extra[some] * weights[some, None]).T @ x[some] / part.weight
        parts.append(Moments(part, drift))
    found = merged(parts)
    assert found.hessian.samples == whole.samples
    torch.testing.assert_close(found.hessian.value(), whole.value())
    assert (found.hessian.cross() is None) != dense
    if dense:
        torch.testing.assert_close(found.hessian.cross(), whole.cross())
    assert found.drift is not None
    expected = (extra * weights[:, None]).T @ x / whole.weight
    torch.testing.assert_close(found.drift, expected, rtol=1e-4, atol=1e-5)


def test_hessians_that_do_not_fit_are_not_merged() -> None:
    one, other = s3.Hessian(6), s3.Hessian(6)
    one.merge(other)  # nothing was seen
    assert not one.samples
    one.update(torch.randn(2, 6))
    other.update(torch.randn(2, 6), torch.randn(2, 6))
    with pytest.raises(s3.HessianError, match="cross term"):
        one.merge(other)
    with pytest.raises(s3.HessianError, match="7 features cannot be added to one of 6"):
        one.merge(s3.Hessian(7))
    assert one.samples == 2


# whole models -----------------------------------------------------------------------------------------


def pruned(batches: list[Tensor], **options: Any) -> tuple[dict[str, Tensor], llm.PruneReport]:
    model = tiny("llama")
    given: dict[str, Any] = {"compress": False, "progress": False, **options}
    report = llm.prune_model(model, batches, "2:4", **given)
    return dict(model.state_dict()), report


def test_a_run_tells_what_it_chose_for_each_linear() -> None:
    _, report = pruned(list(IDS.split(1)), alpha="auto", damp="auto")
    rows = {row.name: row for row in report.linears}
    first = rows["model.layers.0.self_attn.q_proj"]
    assert (first.alpha, first.damp) == (0.5, 0.01)  # nothing was pruned before it
    later = [row for row in report.linears if row.block > 0]
    assert len({row.alpha for row in later}) > 1
    assert all(row.alpha is not None and 0 <= row.alpha <= 1 for row in report.linears)
    assert all(row.damp in DAMPS for row in report.linears)
    assert all(row.beta == 0.5 for row in report.linears if row.name.endswith("down_proj"))
    assert "alpha" in report.frames()[0]


def test_numbers_stay_what_they_are_given() -> None:
    _, report = pruned([IDS], alpha=0.25, damp=0.02)
    assert {(row.alpha, row.damp) for row in report.linears} == {(0.25, 0.02)}
    assert {row.beta for row in report.linears} == {0.0, 0.25}
    _, report = pruned([IDS], pruner="magnitude")
    assert {(row.alpha, row.beta, row.damp) for row in report.linears} == {(0.0, 0.0, 0.01)}


@pytest.mark.parametrize("sizes", [(10,), (3, 7), (1,) * 10])
def test_what_is_chosen_does_not_depend_on_batches(sizes: tuple[int, ...]) -> None:
    state, report = pruned(list(IDS.split(list(sizes))), alpha="auto")
    expected, reference = pruned(list(IDS.split(5)), alpha="auto")
    for row, other in zip(report.linears, reference.linears, strict=True):
        assert row.alpha is not None and other.alpha is not None
        assert math.isclose(row.alpha, other.alpha, abs_tol=2e-2)
        assert math.isclose(row.error, other.error, rel_tol=2e-2)
    first = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(state[first], expected[first], rtol=1e-3, atol=1e-4)


def alike(one: tuple[dict[str, Tensor], llm.PruneReport], other: Any) -> bool:
    """The same weights, bit by bit, from the same shares."""
    shares = [[(row.alpha, row.beta, row.damp) for row in run[1].linears] for run in (one, other)]
    return shares[0] == shares[1] and all(torch.equal(one[0][k], other[0][k]) for k in one[0])


@pytest.mark.parametrize("options", [{}, {"alpha": "auto"}, {"pruner": "obs"}])
def test_damp_is_chosen_unless_it_is_given(options: dict[str, Any]) -> None:
    found = pruned([IDS], **options)
    assert alike(found, pruned([IDS], damp="auto", **options))
    assert {row.damp for row in found[1].linears} - {0.01}


LONG = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"pruner": "magnitude"}, [IDS]),
        ({"pruner": "wanda"}, [IDS]),
        ({"pruner": "sparsegpt"}, [IDS]),
        ({"pruner": "obs", "alpha": 0.0}, [IDS]),
        ({"alpha": 0.0}, [IDS]),
        ({}, [LONG]),
    ],
)
def test_where_damp_cannot_be_chosen_it_is_a_number_without_a_word(
    options: dict[str, Any], batches: list[Tensor]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pruned(batches, **options)
    assert {row.damp for row in found[1].linears} == {0.01}
    assert alike(found, pruned(batches, damp=0.01, **options))
    with pytest.raises(s3.PrunerError, match=r"damp='auto' compares|there are 1"):
        pruned(batches, damp="auto", **options)


def test_mixed_budgets_do_not_depend_on_the_damp_that_is_chosen() -> None:
    chosen, given = (
        {
            row.name: row.pattern
            for row in pruned(list(IDS.split(1)), budgets="mixed", **options)[1].linears
        }
        for options in ({}, {"damp": 0.01})
    )
    assert chosen == given and len(set(chosen.values())) > 1


def test_choosing_is_named_as_a_remedy_for_few_tokens_where_it_is_one() -> None:
    few = IDS[:2, :8]
    for batches, options, named in [
        ([few], {"damp": 0.01}, True),
        ([few], {}, False),  # it is done already
        ([few[:1]], {}, False),
        ([few], {"pruner": "sparsegpt"}, False),
        ([few], {"alpha": 0.0, "damp": 0.01}, False),
    ]:
        with pytest.warns(UserWarning, match="calibration tokens for") as caught:
            pruned(batches, **options)
        told = [str(w.message) for w in caught if "calibration tokens for" in str(w.message)]
        assert [("let damp='auto' choose" in text) for text in told] == [named]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("damp", [None, 0.01])
def test_sums_of_moments_are_let_go_before_a_pruner_works(
    damp: float | None, held_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    real = s3.prune.PRUNERS["admm"]

    def admm(weight: Any, hessian: Any, pattern: Any, *, target: Any, alpha: float) -> Any:
        held.append(sum(type(thing) is s3.Hessian for thing in gc.get_objects()))
        return real(weight, hessian, pattern, target=target, alpha=alpha)

    gc.collect()
    before = sum(type(thing) is s3.Hessian for thing in gc.get_objects())
    monkeypatch.setitem(s3.prune.PRUNERS, "admm", admm)
    pruned([IDS], damp=damp, held_out=[IDS] if held_out else None)
    assert held == [before] * len(held) and held


@pytest.mark.parametrize("given", [{"alpha": "auto", "damp": "auto"}, {"alpha": "auto"}])
def test_a_run_that_chooses_goes_on_to_the_same_weights(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, whole = pruned([IDS], **given)
    save, saved = RunFolder.save, 0

    def killed(self: RunFolder, *args: Any) -> None:
        nonlocal saved
        if saved:
            raise KeyboardInterrupt
        saved += 1
        save(self, *args)

    monkeypatch.setattr(RunFolder, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        pruned([IDS], **given, work_dir=tmp_path)
    monkeypatch.undo()
    with pytest.raises(s3.CheckpointError, match=r"with alpha = 'auto', this one has 0\.5"):
        pruned([IDS], damp="auto", work_dir=tmp_path)
    with pytest.raises(s3.CheckpointError, match=r"with damp = 'auto', this one has 0\.01"):
        pruned([IDS], alpha="auto", damp=0.01, work_dir=tmp_path)
    found, report = pruned([IDS], **given, work_dir=tmp_path)
    assert report.resumed == 1
    assert alike((found, report), (expected, whole))


@pytest.mark.parametrize("damp", [None, 0.01])
def test_another_damp_is_named_before_the_tokens(damp: float | None, tmp_path: Path) -> None:
    """The tokens are the same, however the batches were cut to choose."""
    pruned([IDS], damp=damp, blocks=1, work_dir=tmp_path)
    with pytest.raises(s3.CheckpointError, match="unfinished run with damp = "):
        pruned([IDS], damp=0.02, blocks=1, work_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": "best"}, "alpha='best' must be a number or 'auto'"),
        ({"damp": "best"}, "damp='best' must be a number or 'auto'"),
        ({"alpha": "auto", "pruner": "wanda"}, "'wanda' takes no dense target"),
        ({"damp": "auto", "pruner": "sparsegpt"}, "dense target, such as 'admm'"),
        ({"damp": "auto", "alpha": 0.0}, "dense target, such as 'admm'"),
        ({"alpha": "auto", "batches": [IDS[:1]]}, "there are 1; give at least 2, or a number"),
    ],
)
def test_what_cannot_be_chosen_is_refused_by_name(options: dict[str, Any], match: str) -> None:
    batches = options.pop("batches", [IDS])
    with pytest.raises(s3.PrunerError, match=match):
        pruned(batches, **options)
