"""S3Sparse, finalize and sparsify_: training under a pattern and leaving it compressed."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor.parametrize import S3Sparse, finalize
from s3tensor.sparsify import sparsify_

PATTERNS = ("2:4", "pair4:8", "coupled2:4", "rowpair16")


def sparse_layer(pattern: str = "2:4", mode: str = "ste", seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    layer = nn.Linear(32, 16)
    parametrize.register_parametrization(layer, "weight", S3Sparse(pattern, mode=mode))
    return layer


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
    st.sampled_from(("ste", "fixed")),
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


@pytest.mark.parametrize("mode", ["ste", "fixed"])
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
    with pytest.raises(s3.PatternError, match=r"floating-point weight, got torch\.int32"):
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


# finalize ---------------------------------------------------------------------------------------------


@given(st.sampled_from(PATTERNS), st.sampled_from(("ste", "fixed")), st.integers(0, 99))
def test_finalize_leaves_the_last_forwards_weight_bit_for_bit(
    pattern: str, mode: str, seed: int
) -> None:
    layer = sparse_layer(pattern, mode, seed)
    train(layer, 2, seed=seed)
    last, x = layer.weight.detach().clone(), torch.randn(3, 32)
    y = layer(x)
    finalize(layer)
    assert not parametrize.is_parametrized(layer)
    assert type(layer) is nn.Linear
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


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrization_after_s3sparse_is_refused_and_one_before_is_applied() -> None:
    layer = sparse_layer()
    parametrize.register_parametrization(layer, "weight", Double())
    with pytest.raises(s3.PatternError, match="register S3Sparse last"):
        finalize(layer)
    assert parametrize.is_parametrized(layer)
    layer = nn.Linear(32, 16)
    parametrize.register_parametrization(layer, "weight", Double())
    parametrize.register_parametrization(layer, "weight", S3Sparse("2:4"))
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


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.odd = nn.Linear(32, 7, bias=False)
        self.lm_head = nn.Linear(32, 8, bias=False)
        self.lm_head.weight = self.embed.weight


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
