"""S3Sparse, finalize and sparsify_: training under a pattern and leaving it compressed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Net
from torch import Tensor, nn
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor.mask.projection import tile
from s3tensor.model.linear import CompressedLinear
from s3tensor.model.sparsify import sparsify_
from s3tensor.train.finalize import finalize
from s3tensor.train.s3_sparse import S3Sparse

PATTERNS = ("2:4", "pair4:8", "coupled2:4", "rowpair16")
MODES = ("fixed", "ste", "srste", "soft")


def sparse_layer(
    pattern: str = "2:4", mode: str = "ste", seed: int = 0, **options: Any
) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(32, 16)
    parametrize.register_parametrization(layer, "weight", S3Sparse(pattern, mode, **options))
    return layer


def sparse(layer: nn.Module) -> S3Sparse:
    return layer.parametrizations.weight[0]  # type: ignore[union-attr,index,return-value]


def original(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original  # type: ignore[union-attr,return-value]


def train(layer: nn.Module, steps: int, lr: float = 0.1, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr)
    for _ in range(steps):
        x = torch.randn(8, 32, generator=generator)
        (layer(x) - x[:, :16]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# the parametrization ----------------------------------------------------------------------------------


@given(
    st.sampled_from(PATTERNS),
    st.sampled_from(MODES),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_after_any_number_of_steps_the_weight_satisfies_the_pattern(
    pattern: str, mode: str, steps: int, seed: int
) -> None:
    layer = sparse_layer(pattern, mode, seed)
    train(layer, steps, seed=seed)
    assert s3.satisfies(layer.weight, pattern)
    assert bool((original(layer) != 0).all())  # the dense original stays dense


@given(st.sampled_from(PATTERNS), st.integers(0, 99))
def test_the_straight_through_gradient_is_that_of_the_dense_weight(pattern: str, seed: int) -> None:
    layer = sparse_layer(pattern, "ste", seed)
    x = torch.randn(5, 32)
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(original(layer).grad, grad.t() @ x)
    masked = original(layer).detach() * s3.project(original(layer), pattern)
    assert torch.equal(layer.weight, masked)


@given(st.sampled_from(PATTERNS), st.integers(0, 99))
def test_the_fixed_gradient_is_masked(pattern: str, seed: int) -> None:
    layer = sparse_layer(pattern, "fixed", seed)
    mask = s3.project(original(layer), pattern)
    x = torch.randn(5, 32)
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(original(layer).grad, (grad.t() @ x) * mask)


@given(st.sampled_from(PATTERNS), st.integers(0, 99), st.floats(0, 1))
def test_the_srste_gradient_adds_decay_of_pruned_weights(
    pattern: str, seed: int, decay: float
) -> None:
    layer = sparse_layer(pattern, "srste", seed, decay=decay)
    dense = original(layer).detach().clone()
    pruned = ~s3.project(dense, pattern)
    x = torch.randn(5, 32)
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(original(layer).grad, grad.t() @ x + decay * dense * pruned)
    assert torch.equal(layer.weight, torch.where(pruned, 0, dense))


def tiles_of(weight: Tensor, pattern: str) -> Tensor:
    bound = s3.Pattern.parse(pattern).bind(weight.shape)
    return tile(weight, bound)  # (scopes, blocks, block_size)


@given(st.sampled_from(PATTERNS), st.integers(0, 99))
def test_the_soft_weight_is_the_scaled_soft_threshold_and_its_gradient_that_of_the_dense(
    pattern: str, seed: int
) -> None:
    layer = sparse_layer(pattern, "soft", seed)
    dense = original(layer).detach().double()
    tiles = tiles_of(dense, pattern)
    norms = tiles.norm(dim=-1)
    keep = s3.Pattern.parse(pattern).bind(dense.shape).keep
    largest_dropped = norms.sort(-1, descending=True).values[:, keep : keep + 1]
    expected = tiles * (1 - largest_dropped / norms).clamp(min=0).unsqueeze(-1)
    beta = (tiles * expected).sum() / expected.square().sum()
    torch.testing.assert_close(
        tiles_of(layer.weight.detach(), pattern), (beta * expected).float(), rtol=1e-4, atol=1e-6
    )
    x = torch.randn(5, 32)
    out = layer(x)
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(original(layer).grad, grad.t() @ x)


def test_the_soft_weight_is_continuous_where_blocks_change_places() -> None:
    layer = sparse_layer("2:4", "soft")
    for mode, jumps in (("soft", False), ("ste", True)):
        layer = sparse_layer("2:4", mode)
        seen = []
        for last in (2.0 - 1e-6, 2.0 + 1e-6):  # the second and the third largest meet at 2
            with torch.no_grad():
                original(layer)[0, :4] = torch.tensor([3.0, 2.0, last, 1.0])
            seen.append(layer.weight[0, :4].detach())
        assert (float((seen[0] - seen[1]).abs().max()) > 1e-3) == jumps


def test_beta_stays_as_it_was_at_registration() -> None:
    layer = sparse_layer("2:4", "soft")
    before = sparse(layer).beta.clone()
    train(layer, 3)
    layer.weight = torch.randn(16, 32).exp()
    assert torch.equal(sparse(layer).beta, before)
    zero = nn.Linear(32, 16)
    nn.init.zeros_(zero.weight)
    parametrize.register_parametrization(zero, "weight", S3Sparse("2:4", "soft"))
    assert float(sparse(zero).beta) == 1.0 and not bool(zero.weight.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_mode_keeps_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    for mode in MODES:
        layer = nn.Linear(32, 16, dtype=dtype)
        parametrize.register_parametrization(layer, "weight", S3Sparse("pair4:8", mode))
        assert layer.weight.dtype == dtype and s3.satisfies(layer.weight, "pair4:8")
        last = layer.weight.detach().clone()
        assert torch.equal(finalize(layer).weight.to_dense(), last)


def test_the_soft_threshold_is_an_operator_that_torch_can_trace() -> None:
    weight = torch.randn(16, 32)
    mask = s3.project(weight, "rowpair16")
    torch.library.opcheck(torch.ops.s3tensor.shrink.default, (weight, mask, "rowpair16"))


def test_fixed_never_moves_a_zero_where_ste_does() -> None:
    moved = {}
    for mode in ("fixed", "ste"):
        layer = sparse_layer("2:4", mode)
        before = layer.weight != 0
        with torch.no_grad():  # what was pruned is now the largest
            original(layer).copy_(torch.where(before, original(layer), 10.0))
        moved[mode] = not torch.equal(layer.weight != 0, before)
    assert moved == {"fixed": False, "ste": True}


def test_a_pruned_zero_carries_no_sign() -> None:
    layer = sparse_layer()
    weight = layer.weight.detach()
    assert not bool(torch.signbit(weight[weight == 0]).any())


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_round_trip_gives_the_same_weight(mode: str) -> None:
    trained, other = sparse_layer(mode=mode, seed=1), sparse_layer(mode=mode, seed=2)
    train(trained, 2)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.weight, trained.weight)


def test_a_fixed_mask_travels_in_the_state_dict() -> None:
    trained, other = sparse_layer(mode="fixed", seed=1), sparse_layer(mode="fixed", seed=2)
    buffer = io.BytesIO()
    torch.save(trained.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    mask = state["parametrizations.weight.0.mask"]
    assert torch.equal(mask, trained.weight != 0) and not torch.equal(mask, other.weight != 0)
    other.load_state_dict(state)
    assert torch.equal(other.weight != 0, mask)
    with pytest.raises(RuntimeError, match=r"Missing key.*mask"):  # of a layer without a fixed mask
        other.load_state_dict(sparse_layer(mode="ste").state_dict())


def test_a_copy_trains_apart() -> None:
    model = sparse_layer()
    ema = copy.deepcopy(model)
    before = ema.weight.detach().clone()
    train(model, 3)
    assert torch.equal(ema.weight, before) and not torch.equal(model.weight, before)
    with torch.no_grad():
        for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 0.5)
    assert s3.satisfies(ema.weight, "2:4")


def test_assigning_a_weight_sets_the_dense_original() -> None:
    layer = sparse_layer()
    dense = torch.randn(16, 32)
    layer.weight = dense
    assert torch.equal(original(layer), dense)
    assert torch.equal(layer.weight, dense * s3.project(dense, "2:4"))


def test_gradient_accumulation_and_clipping_see_the_original() -> None:
    layer = sparse_layer()
    x = torch.randn(4, 32)
    for _ in range(2):
        layer(x).sum().backward()
    norm = nn.utils.clip_grad_norm_(layer.parameters(), 1e-3)
    assert norm > 1e-3
    assert float(torch.linalg.vector_norm(original(layer).grad)) <= 1e-3


@pytest.mark.parametrize(
    ("layer", "mode", "error", "message"),
    [
        (nn.Linear(30, 16), "ste", s3.PatternError, r"dim 1 has 30 elements"),
        (nn.Linear(32, 16), "sparse", ValueError, r"mode 'sparse' must be one of"),
    ],
)
def test_what_cannot_be_registered_is_refused(
    layer: nn.Module, mode: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parametrize.register_parametrization(layer, "weight", S3Sparse("2:4", mode=mode))
    assert not parametrize.is_parametrized(layer)


def test_an_integer_weight_and_a_compressed_weight_are_refused() -> None:
    layer = nn.Linear(32, 16)
    layer.weight = nn.Parameter(torch.ones(16, 32, dtype=torch.int32), requires_grad=False)
    with pytest.raises(
        s3.PatternError, match=r"floating-point weight of 16, 32 or 64 bits, got torch\.int32"
    ):
        parametrize.register_parametrization(layer, "weight", S3Sparse("2:4"))
    done = finalize(sparse_layer())
    with pytest.raises(s3.PatternError, match="compressed already"):
        parametrize.register_parametrization(done, "weight", S3Sparse("2:4"))


def test_nan_is_refused_at_registration_and_at_a_forward() -> None:
    layer = nn.Linear(32, 16)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(s3.NonFiniteError):
        parametrize.register_parametrization(layer, "weight", S3Sparse("2:4"))
    layer = sparse_layer()
    with torch.no_grad():
        original(layer)[0, 0] = torch.inf
    with pytest.raises(s3.NonFiniteError):
        layer(torch.randn(1, 32))


def test_one_fixed_mask_serves_one_weight() -> None:
    shared = S3Sparse("2:4", mode="fixed")
    parametrize.register_parametrization(nn.Linear(32, 16), "weight", shared)
    with pytest.raises(s3.PatternError, match="make one S3Sparse for each weight"):
        parametrize.register_parametrization(nn.Linear(64, 16), "weight", shared)


# masks that are held ----------------------------------------------------------------------------------


def invert_magnitudes(layer: nn.Module) -> None:
    """What was pruned is now the largest, so that the next mask is another one."""
    with torch.no_grad():
        original(layer).copy_(original(layer).sign() / original(layer).abs().clamp(min=1e-3))


def test_a_mask_with_refresh_moves_every_so_many_steps_and_never_between() -> None:
    layer = sparse_layer(refresh=3)
    for count in range(1, 10):
        before = sparse(layer).mask.clone()
        invert_magnitudes(layer)
        layer(torch.randn(2, 32)).sum().backward()  # forwards do not count
        assert torch.equal(sparse(layer).mask, before)
        s3.step(layer)
        moved = not torch.equal(sparse(layer).mask, before)
        assert moved == (count % 3 == 0)
        if moved:
            assert torch.equal(sparse(layer).mask, s3.project(original(layer), "2:4"))
            expected = float((sparse(layer).mask != before).float().mean())
            assert sparse(layer).flip_rate == pytest.approx(expected) and expected > 0
        assert torch.equal(layer.weight, torch.where(sparse(layer).mask, original(layer), 0))
    assert sparse(layer).steps == 9


def test_flip_rate_without_a_held_mask_is_that_between_steps() -> None:
    layer = sparse_layer()
    assert sparse(layer).flip_rate is None
    s3.step(layer)
    assert sparse(layer).flip_rate is None  # nothing to compare with yet
    first = s3.project(original(layer), "2:4")
    invert_magnitudes(layer)
    s3.step(layer)
    second = s3.project(original(layer), "2:4")
    assert sparse(layer).flip_rate == pytest.approx(float((first != second).float().mean()))
    s3.step(layer)
    assert sparse(layer).flip_rate == 0.0
    assert sparse(layer).mask is None and sparse(layer).density == 0.5


@pytest.mark.parametrize("mode", ["ste", "srste", "soft"])
@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize("by_model", [True, False])
def test_a_frozen_mask_stays(mode: str, refresh: int, by_model: bool) -> None:
    layer = sparse_layer(mode=mode, refresh=refresh)
    before = layer.weight.detach() != 0
    if by_model:
        s3.freeze(layer)
        invert_magnitudes(layer)
    else:
        sparse(layer).freeze()
        layer(torch.randn(1, 32))  # takes the mask where none was held
        invert_magnitudes(layer)
    s3.step(layer)
    s3.step(layer)
    kept = layer.weight.detach() != 0
    assert torch.equal(kept, before) if mode != "soft" else bool((kept <= before).all())
    assert "frozen" in repr(layer)
    last = layer.weight.detach().clone()
    assert torch.equal(finalize(layer).weight.to_dense(), last)


def least(weight: Tensor, module: S3Sparse) -> Tensor:
    assert isinstance(module, S3Sparse)
    return -weight.abs()


def test_a_score_function_chooses_the_mask_at_registration_and_at_steps() -> None:
    layer = sparse_layer(score=least)
    for _ in range(2):
        expected = s3.project(original(layer), "2:4", -original(layer).detach().abs())
        assert torch.equal(layer.weight != 0, expected)
        invert_magnitudes(layer)
        s3.step(layer)
    assert "score=least" in repr(layer)
    with pytest.raises(s3.PatternError, match=r"returned \(32,\) for a weight of shape \(16, 32\)"):
        sparse_layer(score=lambda weight, module: weight.sum(0))


def test_a_kept_block_that_is_smaller_than_a_dropped_one_is_shrunk_to_zero() -> None:
    layer = sparse_layer(mode="soft", score=least)
    assert not bool(layer.weight.any()) and not bool(torch.isnan(layer.weight).any())


def test_a_given_mask_is_kept_and_is_checked() -> None:
    dense = torch.randn(16, 32)
    mask = s3.project(torch.randn(16, 32), "rowpair16")
    mask[:, :16] = False  # fewer than the budget
    layer = sparse_layer("rowpair16", "fixed", mask=mask)
    layer.weight = dense
    assert torch.equal(layer.weight, torch.where(mask, dense, 0)) and sparse(layer).density == 0.25
    assert torch.equal(finalize(layer).weight.to_dense(), torch.where(mask, dense, 0))
    split = s3.project(dense, "rowpair16")
    split[:, 3] = False
    for wrong, message in (
        (torch.ones_like(mask), "keeps 2 blocks in a scope of rowpair16 on 16x32, which keeps 1"),
        (split, "splits a block of rowpair16"),
        (mask[:8], "make one S3Sparse for each weight"),
        (mask.float(), "give a bool tensor"),
    ):
        with pytest.raises(s3.PatternError, match=message):
            sparse_layer("rowpair16", "fixed", mask=wrong)


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("fixed", {"refresh": 2}, "takes no refresh"),
        ("fixed", {"schedule": s3.Density()}, "no schedule"),
        ("ste", {"mask": torch.ones(16, 32, dtype=torch.bool)}, "in mode 'fixed' only"),
        ("ste", {"decay": 0.1}, "is of mode 'srste' only"),
        ("srste", {"decay": -0.1}, "must be a number >= 0"),
        ("ste", {"refresh": 0}, "refresh=0 must be an int >= 1"),
        ("ste", {"refresh": 2.0}, "must be an int >= 1"),
        ("ste", {"score": "wanda"}, "must be 'magnitude' or a function"),
    ],
)
def test_options_out_of_range_or_of_another_mode_are_refused(
    mode: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        S3Sparse("2:4", mode, **options)


# density schedules ------------------------------------------------------------------------------------


@given(
    st.sampled_from(("cubic", "step", "constant")),
    st.sampled_from(("2:4", "1:8", "rowpair16", "unstructured@0.3", "block:4x4@0.25")),
    st.integers(1, 40),
    st.floats(0.5, 1.0),
)
def test_a_schedule_falls_to_the_budget_and_never_below(
    shape: str, pattern: str, steps: int, start: float
) -> None:
    bound = s3.Pattern.parse(pattern).bind((16, 32))
    schedule = s3.Density(start, steps=steps, shape=shape)
    schedule.check(bound)
    keeps = [schedule.keep(step, bound) for step in range(steps + 5)]
    assert keeps == sorted(keeps, reverse=True)
    assert min(keeps) == bound.keep and set(keeps[steps:]) == {bound.keep}
    n = bound.blocks_per_scope
    first = bound.keep if shape == "constant" else int(start * n + 0.5)
    assert keeps[0] == first
    if shape == "step":
        assert set(keeps[:steps]) == {first}


@pytest.mark.parametrize("mode", ["ste", "srste", "soft"])
def test_the_weight_follows_the_schedule_and_finalize_waits_for_its_end(mode: str) -> None:
    schedule = s3.Density(1.0, steps=6)
    layer = nn.Sequential(sparse_layer("1:8", mode, schedule=schedule))
    bound = s3.Pattern.parse("1:8").bind((16, 32))
    for count in range(7):
        keep = schedule.keep(count, bound)
        kept = tiles_of(sparse(layer[0]).mask, "1:8").sum(1)
        assert set(kept.flatten().tolist()) == {keep} and sparse(layer[0]).density == keep / 8
        assert s3.satisfies(layer[0].weight, f"{keep}:8")
        if keep > bound.keep:  # the cubic one is there before its last step
            with pytest.raises(s3.ModelError, match=r"0\.weight: .* after \d of 6 steps"):
                finalize(layer)
            with pytest.raises(s3.PatternError, match="freeze once it has ended"):
                s3.freeze(layer)
            assert parametrize.is_parametrized(layer[0])
        s3.step(layer)
    last = layer[0].weight.detach().clone()
    assert torch.equal(finalize(layer)[0].weight.to_dense(), last)


def test_a_schedule_reaches_the_budget_though_no_refresh_is_due() -> None:
    layer = sparse_layer(refresh=100, schedule=s3.Density(steps=4))
    for _ in range(4):
        s3.step(layer)
    assert s3.satisfies(layer.weight, "2:4")


def test_beta_follows_the_density() -> None:
    layer = sparse_layer("2:4", "soft", schedule=s3.Density(steps=2, shape="step"))
    assert float(sparse(layer).beta) == pytest.approx(1.0)
    torch.testing.assert_close(layer.weight, original(layer))
    for _ in range(2):
        s3.step(layer)
    fresh = nn.Linear(32, 16)
    fresh.weight = original(layer)
    parametrize.register_parametrization(fresh, "weight", S3Sparse("2:4", "soft"))
    assert torch.equal(layer.weight, fresh.weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"end": 0.25}, s3.PatternError, r"ends at density 0\.25, below the 0\.5 of 2:4 on 16x32"),
        ({"end": 0.75}, s3.PatternError, r"ends at density 0\.75, above the 0\.5"),
        ({"start": 0.3}, s3.PatternError, r"starts at density 0\.3, below the 0\.5"),
        ({"start": 1.5}, ValueError, r"start=1\.5 must be in"),
        ({"start": 0.5, "end": 0.7}, ValueError, "only falls"),
        ({"steps": 0}, ValueError, "steps=0 must be an int >= 1"),
        ({"shape": "linear"}, ValueError, "must be one of cubic, step, constant"),
    ],
)
def test_a_schedule_that_cannot_end_at_the_budget_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sparse_layer(schedule=s3.Density(**options))


# the state dict ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ste", "srste", "soft"])
@pytest.mark.parametrize("options", [{}, {"refresh": 3}, {"schedule": s3.Density(steps=4)}])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(
    mode: str, options: dict[str, Any], frozen: bool
) -> None:
    def run(layer: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> list:
        losses = []
        for count in range(first, last):
            if frozen and count == 5:
                s3.freeze(layer)
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(count))
            loss = (layer(x) - x[:, :16]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            s3.step(layer)
            losses.append(loss.item())
        return losses

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        layer = sparse_layer("1:8", mode, seed, **options)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.05)

    whole = run(*start(1), 0, 12)
    layer, optimizer = start(1)
    losses = run(layer, optimizer, 0, 7)
    buffer = io.BytesIO()
    torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    layer, optimizer = start(2)  # another process: other weights
    layer.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert sparse(layer).steps == 7 and sparse(layer).frozen == frozen
    assert losses + run(layer, optimizer, 7, 12) == whole


def test_a_state_dict_of_another_pattern_or_shape_is_refused_by_name() -> None:
    def model(pattern: str, width: int = 32, mode: str = "fixed") -> nn.Module:
        made = nn.Sequential(nn.ReLU(), nn.Linear(width, 16))
        parametrize.register_parametrization(made[1], "weight", S3Sparse(pattern, mode))
        return made

    for mode in MODES:
        saved = model("2:4", mode=mode).state_dict()
        message = r"1\.weight: the state dict is of S3Sparse\(.*keep=2\), this module of S3Sparse\("
        with pytest.raises(RuntimeError, match=message):
            model("pair4:8", mode=mode).load_state_dict(saved)
        with pytest.raises(RuntimeError, match=r"1\.weight: .* shape \(16, 32\), this"):
            model("2:4", 64, mode=mode).load_state_dict(saved)
        model("2:4", mode=mode).load_state_dict(saved)
    saved["1.parametrizations.weight.0._extra_state"] = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"1\.weight: the extra state of S3Sparse is damaged"):
        model("2:4", mode=mode).load_state_dict(saved)


def test_a_fixed_fine_tuning_takes_the_mask_of_a_run_that_held_one() -> None:
    run = sparse_layer(mode="ste", refresh=5, seed=1)
    invert_magnitudes(run)
    tuned = sparse_layer(mode="fixed", seed=2)
    tuned.load_state_dict(run.state_dict())
    assert torch.equal(tuned.weight, run.weight)
    again = sparse_layer(mode="ste", seed=3)
    again.load_state_dict(tuned.state_dict())
    assert sparse(again).mask is None  # it takes its own
    assert torch.equal(again.weight, original(run) * s3.project(original(run), "2:4"))


def test_a_state_dict_can_be_stored_in_safetensors() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    layer, other = (
        sparse_layer(mode="soft", refresh=2),
        sparse_layer(mode="soft", refresh=2, seed=1),
    )
    s3.step(layer)
    other.load_state_dict(safetensors.load(safetensors.save(layer.state_dict())))
    assert torch.equal(other.weight, layer.weight) and sparse(other).steps == 1


# finalize ---------------------------------------------------------------------------------------------


@given(st.sampled_from(PATTERNS), st.sampled_from(MODES), st.integers(0, 99))
def test_finalize_leaves_the_last_forwards_weight_bit_for_bit(
    pattern: str, mode: str, seed: int
) -> None:
    layer = sparse_layer(pattern, mode, seed)
    train(layer, 2, seed=seed)
    last, x = layer.weight.detach().clone(), torch.randn(3, 32)
    y = layer(x)
    finalize(layer)
    assert not parametrize.is_parametrized(layer)
    assert type(layer) is CompressedLinear
    assert isinstance(layer.weight, nn.Parameter)
    assert isinstance(layer.weight, s3.StructuredSparseTensor)
    assert not layer.weight.requires_grad
    assert torch.equal(layer.weight.to_dense(), last)
    torch.testing.assert_close(layer(x), y, rtol=0, atol=0)


def test_finalize_twice_is_finalize_once_and_without_work_is_refused() -> None:
    layer = finalize(sparse_layer())
    weight = layer.weight
    assert finalize(layer).weight is weight
    with pytest.raises(s3.ModelError, match="no S3Sparse parametrization"):
        finalize(nn.Linear(4, 4))


def test_weights_that_shared_an_original_share_the_compressed_one() -> None:
    first, second = nn.Linear(32, 16), nn.Linear(32, 16)
    second.weight = first.weight
    for layer in (first, second):
        parametrize.register_parametrization(layer, "weight", S3Sparse("2:4"))
    assert original(first) is original(second)
    finalize(nn.ModuleList([first, second]))
    assert first.weight is second.weight


@pytest.mark.parametrize("mode", MODES)
def test_finalize_without_compression_leaves_a_dense_weight_that_trains(mode: str) -> None:
    layer = sparse_layer(mode=mode)
    last = layer.weight.detach().clone()
    finalize(layer, compress=False)
    assert type(layer.weight) is nn.Parameter and layer.weight.requires_grad
    assert torch.equal(layer.weight, last)


def test_finalize_says_that_a_mask_was_never_refreshed() -> None:
    with pytest.warns(
        UserWarning, match=r"weight: refresh=10, but s3tensor.step\(model\) was never"
    ):
        finalize(sparse_layer(refresh=10))


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrization_after_s3sparse_is_refused_and_one_before_is_applied() -> None:
    layer = sparse_layer()
    parametrize.register_parametrization(layer, "weight", Double())
    with pytest.raises(s3.PatternError, match="register S3Sparse last"):
        finalize(layer)
    assert parametrize.is_parametrized(layer)
    for mode in MODES:
        layer = nn.Linear(32, 16)
        parametrize.register_parametrization(layer, "weight", Double())
        parametrize.register_parametrization(layer, "weight", S3Sparse("2:4", mode))
        train(layer, 1)
        last = layer.weight.detach().clone()
        assert torch.equal(finalize(layer).weight.to_dense(), last)


def test_finalizing_a_copy_leaves_the_model_trainable() -> None:
    model = nn.Sequential(sparse_layer(), nn.ReLU())
    ema = copy.deepcopy(model)
    finalize(ema)
    train(model, 1)
    assert parametrize.is_parametrized(model[0])
    assert isinstance(ema[0].weight, s3.StructuredSparseTensor)


# sparsify_ --------------------------------------------------------------------------------------------


def test_each_layer_is_compressed_projected_or_skipped_with_a_reason() -> None:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.up.weight.mul_(s3.project(model.up.weight, "rowpair16"))
    kept = model.up.weight.detach().clone()
    before = model.down.weight.detach().clone()
    report = sparsify_(model, "rowpair16")
    rows = {row.name: row for row in report}
    assert {name: row.action for name, row in rows.items()} == {
        "up": "compressed", "down": "projected", "odd": "skipped", "lm_head": "skipped",
    }  # fmt: skip
    assert torch.equal(model.up.weight.to_dense(), kept)
    assert torch.equal(model.down.weight.to_dense(), before * s3.project(before, "rowpair16"))
    assert "dim 0 has 7" in rows["odd"].reason
    assert rows["lm_head"].reason == "output head"
    assert report.bytes_after < report.bytes_before == 4 * (64 * 32 * 2 + 7 * 32 + 8 * 32)
    assert rows["up"].bytes_after == model.up.weight.nbytes_compressed
    assert "total" in str(report) and len(report) == 4
    again = {row.name: row for row in sparsify_(model, "rowpair16")}
    assert again["up"].reason == "compressed already"


def test_a_filter_chooses_and_shared_weights_need_every_holder() -> None:
    model = Net()
    report = sparsify_(model, "2:4", filter_fn=lambda module, name: name == "down")
    assert [row.action for row in report] == ["skipped", "projected", "skipped", "skipped"]
    assert next(iter(report)).reason == "left out by the filter"
    report = sparsify_(model, "2:4", filter_fn=lambda module, name: name == "lm_head")
    assert "shared with embed" in {row.name: row for row in report}["lm_head"].reason


def test_two_linears_that_share_a_weight_go_on_sharing() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    assert all(row.action == "skipped" for row in sparsify_(model, "2:4"))
    sparsify_(model, "2:4", filter_fn=lambda module, name: True)
    assert isinstance(model[0].weight, s3.StructuredSparseTensor)
    assert model[0].weight is model[1].weight


def test_conv1d_of_transformers_is_compressed_along_its_inputs() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layer = conv1d(16, 32)
    dense, x = layer.weight.detach().clone(), torch.randn(3, 32)
    sparsify_(nn.ModuleDict({"c_fc": layer}), "2:4")
    assert layer.weight.shape == dense.shape
    expected = dense.t() * s3.project(dense.t(), "2:4")
    assert torch.equal(layer.weight.t().to_dense(), expected)
    torch.testing.assert_close(layer(x), x @ expected.t() + layer.bias)


def test_a_parametrized_layer_is_left_to_finalize() -> None:
    report = sparsify_(nn.ModuleDict({"layer": sparse_layer()}), "2:4")
    assert "finalize" in next(iter(report)).reason


def test_refusals_name_the_model_or_the_layer_and_change_nothing() -> None:
    with pytest.raises(s3.ModelError, match="has no linear layers"):
        sparsify_(nn.ReLU(), "2:4")
    with pytest.raises(s3.PatternError, match="unknown pattern"):
        sparsify_(Net(), "2-4")
    model = Net()
    with torch.no_grad():
        model.down.weight[0, 0] = torch.nan
    with pytest.raises(s3.NonFiniteError, match=r"down: .* nothing was compressed"):
        sparsify_(model, "2:4")
    assert not isinstance(model.up.weight, s3.StructuredSparseTensor)
