"""Training under couplings: one decision over the weights of several modules, taken once a step."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from compile_counter import compiled
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import s3tensor as s3
from s3tensor.model.compact import units
from s3tensor.train.coupling import CoupledSparse, Coupling
from s3tensor.train.model import metrics

MODES = ("fixed", "ste", "srste")


class MLP(nn.Module):
    """A gated MLP of 16 inputs and 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(16, 24)
        self.up_proj = nn.Linear(16, 24)
        self.down_proj = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def mlp(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP()


def channels(model: MLP) -> s3.ScopeSpec:
    """All channels of the MLP in one scope: rows of two weights and columns of the third."""
    blocks = s3.BlockCoupling(
        [
            s3.BlockSpec(model.gate_proj.weight, (1, -1)),
            s3.BlockSpec(model.up_proj.weight, (1, -1)),
            s3.BlockSpec(model.down_proj.weight, (-1, 1)),
        ],
        orders=[(0, 1), (0, 1), (1, 0)],
    )
    return s3.ScopeSpec(blocks, (-1, 1), name="channels")


def coupled(mode: str = "ste", keep: int | float = 12, seed: int = 0, **options: Any) -> MLP:
    model = mlp(seed)
    s3.sparsify_training_(model, channels(model), mode, keep=keep, **options)
    return model


def member(layer: nn.Module) -> CoupledSparse:
    return layer.parametrizations.weight[0]  # type: ignore[union-attr,index,return-value]


def original(layer: nn.Module) -> Tensor:
    return layer.parametrizations.weight.original  # type: ignore[union-attr,return-value]


def run(model: nn.Module, steps: int, first: int = 0, optimizer: Any = None) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for count in range(first, first + steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(count))
        loss = (model(x) - x.roll(1, -1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        s3.step(model)
        losses.append(loss.item())
    return losses


def kept_channels(model: MLP) -> list[Tensor]:
    return [
        (model.gate_proj.weight != 0).any(1),
        (model.up_proj.weight != 0).any(1),
        (model.down_proj.weight != 0).any(0),
    ]


@given(st.sampled_from(MODES), st.integers(1, 24), st.integers(0, 3), st.integers(0, 99))
def test_after_any_number_of_steps_all_weights_keep_the_same_channels_those_of_the_largest_norm(
    mode: str, keep: int, steps: int, seed: int
) -> None:
    model = coupled(mode, keep, seed)
    at_first = kept_channels(model)[0]
    run(model, steps)
    gate, up, down = kept_channels(model)
    assert int(gate.sum()) == keep and torch.equal(gate, up) and torch.equal(gate, down)
    if mode == "fixed":
        assert torch.equal(gate, at_first)
    else:
        layers = model.gate_proj, model.up_proj, model.down_proj
        g, u, d = (original(layer).detach().double().square() for layer in layers)
        norms = g.sum(1) + u.sum(1) + d.sum(0)
        assert torch.equal(gate.nonzero()[:, 0], norms.topk(keep).indices.sort().values)


@pytest.mark.parametrize("mode", MODES)
def test_the_gradients_are_those_of_the_modes(mode: str) -> None:
    model = coupled(mode, **({"decay": 0.3} if mode == "srste" else {}))
    plain = mlp()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(plain, name).weight.copy_(getattr(model, name).weight)
    x = torch.randn(8, 16)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(model, name)
        grad, mask = getattr(plain, name).weight.grad, member(layer).mask
        if mode == "fixed":
            grad = grad * mask
        elif mode == "srste":
            grad = grad + 0.3 * original(layer) * ~mask
        torch.testing.assert_close(original(layer).grad, grad)


def test_the_decision_is_taken_once_a_step_and_never_in_a_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = coupled()
    asked: list[int] = []
    decide = Coupling.decide
    monkeypatch.setattr(
        Coupling, "decide", lambda self, weights: (asked.append(1), decide(self, weights))[1]
    )
    run(model, 3)
    assert len(asked) == 3
    model = coupled(refresh=2)
    asked.clear()
    run(model, 5)
    assert len(asked) == 2


@pytest.mark.parametrize("mode", MODES)
def test_finalize_compresses_each_weight_and_keeps_the_last_forward_bit_for_bit(mode: str) -> None:
    model = coupled(mode)
    run(model, 3)
    layers = model.gate_proj, model.up_proj, model.down_proj
    last = [layer.weight.detach().clone() for layer in layers]
    s3.finalize(model)
    for layer, weight in zip(layers, last, strict=True):
        assert isinstance(layer.weight, s3.StructuredSparseTensor)
        assert torch.equal(layer.weight.to_dense(), weight)
        assert layer.weight.density == 0.5


def test_a_trained_coupling_is_cut_out_by_compact() -> None:
    model = mlp()
    scopes = [unit.scope() for unit in units(model, "channels")]  # with the biases
    report = s3.sparsify_training_(model, scopes, "srste", keep=0.5)
    assert [row.name for row in report] == [
        "gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias", "down_proj.weight",
    ]  # fmt: skip
    assert all(row.action == "parametrized" and row.density == 0.5 for row in report)
    run(model, 4)
    x = torch.randn(5, 16)
    before = model(x).detach()
    s3.finalize(model, compress=False)
    assert model.gate_proj.bias.requires_grad
    s3.compact(model)
    assert model.down_proj.in_features == model.gate_proj.out_features == 12
    torch.testing.assert_close(model(x), before)


def test_biases_and_shares_of_a_scope_stay_dense() -> None:
    model = mlp()
    s3.sparsify_training_(model, [u.scope() for u in units(model, "channels")], keep=0.5)
    with pytest.warns(UserWarning, match="was never called"):
        s3.finalize(model)
    assert type(model.up_proj.bias) is nn.Parameter
    assert isinstance(model.up_proj.weight, s3.StructuredSparseTensor)
    model = mlp()  # rows of two weights compete: 6 may lie all in one of them
    scopes = s3.ScopeCoupling(
        [
            s3.ScopeSpec(s3.BlockSpec(layer.weight, (1, -1)), (-1, 1))
            for layer in (model.gate_proj, model.up_proj)
        ]
    )
    s3.sparsify_training_(model, scopes, "fixed", keep=6)
    rows = [int((w != 0).any(1).sum()) for w in (model.gate_proj.weight, model.up_proj.weight)]
    assert sum(rows) == 6
    s3.finalize(model)
    assert type(model.gate_proj.weight) is nn.Parameter
    assert [int((x.weight != 0).any(1).sum()) for x in (model.gate_proj, model.up_proj)] == rows


def test_two_views_of_one_parameter_share_its_mask() -> None:
    torch.manual_seed(0)
    both = nn.Linear(16, 48)  # gate and up in one
    parts = [s3.View(both.weight, (24, 16), (16, 1), start) for start in (0, 24 * 16)]
    blocks = s3.BlockCoupling([s3.BlockSpec(part, (1, -1)) for part in parts])
    s3.sparsify_training_(both, s3.ScopeSpec(blocks, (4, 1)), keep=2)
    kept = (both.weight != 0).any(1)
    assert torch.equal(kept[:24], kept[24:])
    assert bool((kept[:24].view(6, 4).sum(1) == 2).all())
    s3.step(both)
    s3.finalize(both)
    assert torch.equal((both.weight != 0).any(1), kept)


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_resumes_with_equal_losses(mode: str) -> None:
    options = {} if mode == "fixed" else {"refresh": 2, "schedule": s3.Density(steps=6)}

    def start(seed: int) -> tuple[MLP, torch.optim.Optimizer]:
        model = coupled(mode, seed=seed, **options)
        return model, torch.optim.AdamW(model.parameters(), lr=0.05)

    model, optimizer = start(0)
    whole = run(model, 9, optimizer=optimizer)
    model, optimizer = start(0)
    losses = run(model, 4, optimizer=optimizer)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    model, optimizer = start(1)
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert member(model.up_proj).owner.steps == 4
    assert losses + run(model, 5, 4, optimizer) == whole


def test_a_state_dict_of_another_coupling_is_refused_by_name() -> None:
    state = coupled(keep=12).state_dict()
    for other in (coupled(keep=6), mlp()):
        if type(other.up_proj) is nn.Linear:  # scopes of 6 channels in place of all
            scope = s3.ScopeSpec(channels(other).block, (6, 1))
            s3.sparsify_training_(other, scope, keep=3)
        with pytest.raises(RuntimeError, match=r"up_proj\.weight: the state dict is not of"):
            other.load_state_dict(state)
    plain = mlp()
    s3.sparsify_training_(plain, "2:4", refresh=2)
    with pytest.raises(RuntimeError, match=r"up_proj\.weight: the state dict is not of"):
        coupled().load_state_dict(plain.state_dict(), strict=False)


def test_a_copy_trains_apart() -> None:
    model = coupled()
    twin = copy.deepcopy(model)
    masks = member(model.up_proj).mask.clone()
    run(twin, 5)
    assert torch.equal(member(model.up_proj).mask, masks)
    assert member(model.up_proj).owner.steps == 0 and member(twin.up_proj).owner.steps == 5
    assert member(twin.up_proj).owner is member(twin.down_proj).owner
    held = sum(p.numel() for p in model.parameters())
    assert held == sum(p.numel() for p in mlp().parameters())  # the owner holds no weights


def test_the_schedule_falls_to_the_budget_and_finalize_waits_for_it() -> None:
    model = coupled(keep=6, schedule=s3.Density(steps=4))
    counts = []
    for count in range(5):
        counts.append(int(kept_channels(model)[0].sum()))
        if count < 3:  # 6 + 18 / 64 rounds to 6
            with pytest.raises(s3.ModelError, match="density schedule is at"):
                s3.finalize(model)
            with pytest.raises(s3.PatternError, match="freeze once the schedule has ended"):
                s3.freeze(model)
        run(model, 1, count)
    assert counts == sorted(counts, reverse=True) and counts[0] == 24 and counts[-1] == 6
    s3.finalize(model)


def test_frozen_masks_stay_and_metrics_tell_density_and_flips() -> None:
    model = coupled()
    run(model, 2)
    found = metrics(model)
    assert found["down_proj.weight"]["density"] == 0.5
    assert 0 <= found["gate_proj.weight"]["flip_rate"] <= 1
    s3.freeze(model)
    before = kept_channels(model)
    run(model, 4)
    for left, right in zip(before, kept_channels(model), strict=True):
        assert torch.equal(left, right)


def test_compiled_training_is_the_eager_one_in_one_graph() -> None:
    eager, model = coupled(), coupled()
    torch._dynamo.reset()
    whole, counter = compiled(model)
    x = torch.randn(8, 16)
    for _ in range(3):
        for each, call in ((eager, eager), (model, whole)):
            call(x).square().sum().backward()
            torch.optim.SGD(each.parameters(), lr=0.01).step()
            each.zero_grad()
            s3.step(each)
    for left, right in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(right, left)
    assert counter.frame_count == 1


def test_refusals_name_the_coupling_and_change_nothing() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="needs keep="):
        s3.sparsify_training_(model, channels(model))
    with pytest.raises(TypeError, match="takes no score"):
        s3.sparsify_training_(model, channels(model), keep=2, score="magnitude")
    with pytest.raises(TypeError, match="no filter_fn"):
        s3.sparsify_training_(model, channels(model), filter_fn=lambda m, n: True, keep=2)
    with pytest.raises(ValueError, match="mode 'soft' of a coupling"):
        s3.sparsify_training_(model, channels(model), "soft", keep=2)
    with pytest.raises(s3.PatternError, match="keep=25 of the 24 blocks in each scope of channels"):
        s3.sparsify_training_(model, channels(model), keep=25)
    schedule = s3.Density(end=0.25)
    with pytest.raises(s3.PatternError, match="the schedule ends at density"):
        s3.sparsify_training_(model, channels(model), keep=12, schedule=schedule)
    with pytest.raises(s3.ModelError, match=r"channels: its tensor of shape .* is not a parameter"):
        s3.sparsify_training_(model, channels(mlp()), keep=2)
    with pytest.raises(s3.ModelError, match="a weight has one owner"):
        s3.sparsify_training_(model, [channels(model), channels(model)], keep=2)
    with torch.no_grad():
        model.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(s3.NonFiniteError, match="channels"):
        s3.sparsify_training_(model, channels(model), keep=2)
    assert not any(hasattr(m, "parametrizations") for m in model.modules())
    model = coupled()
    with pytest.raises(s3.ModelError, match=r"one of 3 weights of channels"):
        s3.step(model.gate_proj)
    scope = s3.ScopeSpec(s3.BlockSpec(original(model.up_proj), (1, -1)), (-1, 1))
    with pytest.raises(s3.ModelError, match=r"up_proj\.weight\.original is parametrized already"):
        s3.sparsify_training_(model, scope, keep=2)
