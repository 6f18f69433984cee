"""Names and forms of the reference implementation, beside our own: what is written for one runs on both."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter

import s3tensor as s3
from s3tensor import (
    BlockCoupling,
    BlockSpec,
    PatternError,
    ScopeCoupling,
    ScopeSpec,
    StructuredOBS,
    View,
)


def pairs_view(offset: int = 0) -> View:
    """Columns t and t + 4 of eight are neighbours."""
    weight = Parameter(torch.arange(32.0 + offset)[offset:].reshape(4, 8))
    return View(weight, (4, 4, 2), (8, 1, 4))


# specs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orders", [None, [], (), [(), ()], [None, ()], [(0, 1), []]])
def test_an_empty_order_is_the_identity(orders) -> None:
    first, second = (BlockSpec(torch.ones(4, 8), (1, 1)) for _ in range(2))
    blocks = BlockCoupling([first, second], orders=orders)
    scopes = ScopeCoupling([ScopeSpec(b, (1, 4)) for b in (first, second)], orders=orders)
    assert blocks.orders == scopes.orders == ((0, 1), (0, 1))
    assert (blocks.grid_shape, scopes.grid_shape) == ((4, 8), (4, 2))


def test_values_of_the_parameters_shape_are_read_through_the_view() -> None:
    view = pairs_view()
    block, values = BlockSpec(view, (1, 1, 2)), torch.randn(4, 8)
    assert torch.equal(block.norms(values), block.norms(view.of(values)))
    assert torch.equal(block.norms(view.param.data), block.norms())
    scope = ScopeSpec(block, (1, 4))
    assert torch.equal(scope.block_norms({block: values}), scope.block_norms(view.of(values)))
    # A transposed view of a square has its parameter's shape: there the view's is meant.
    square = BlockSpec(View(Parameter(torch.ones(3, 3)), (3, 3), (1, 3)), (1, 3))
    rows = torch.arange(9.0).reshape(3, 3)
    assert square.norms(rows, p=1)[:, 0].tolist() == [3, 12, 21]
    with pytest.raises(PatternError, match=r"the view, \(4, 4, 2\), or of the parameter, \(4, 8\)"):
        block.norms(torch.ones(8, 4))


def test_specs_of_one_structure_are_equal_and_one_key() -> None:
    weight, other = Parameter(torch.ones(4, 8)), Parameter(torch.ones(4, 8))

    def block(param: Parameter = weight, size: int = 1, name: str | None = None) -> BlockSpec:
        return BlockSpec(View(param, (4, 8), (8, 1)), (1, size), name)

    assert block() == block(name="w") == BlockSpec(weight, (1, 1))
    assert hash(block()) == hash(block(name="w"))
    assert len({block(), block(other), block(size=2), block().view, ScopeSpec(block(), (1,))}) == 5
    assert ScopeSpec(block(), (1, 4)) == ScopeSpec(block(), (1, 4)) != ScopeSpec(block(), (1, 2))
    assert View(block().view, (32,), (1,)) == View(block().view, (32,), (1,)) != block().view
    joined = [BlockCoupling([block(), block(other)], orders) for orders in (None, [], [(1, 0)] * 2)]
    assert joined[0] == joined[1] != joined[2]
    values = torch.randn(4, 8)
    assert torch.equal(block().norms({block(): values}), values.abs())
    assert list(ScopeSpec(block(), (1, 4)).get_masks(2)) == [block()]


def test_views_of_blocks_are_those_of_the_specs() -> None:
    view = pairs_view()
    block = BlockSpec(view, (2, 1, 2))
    for options in ({}, {"reorder": False}, {"merge": True}):
        found = View.block_view_of(view.data, (2, 1, 2), **options)
        assert torch.equal(found, block.block_view(**options))
    per_block = torch.randn(2, 4, 1)
    for fake in (False, True):
        found = View.broadcast_block_to_element(per_block, (2, 1, 2), fake)
        assert torch.equal(found, block.broadcast_block_to_element(per_block, fake))
    View.block_view_of(view.data, (2, -1, 2))[0, 0, 0] = 7.0
    assert bool((view.data[:2] == 7).all()) and bool((view.data[2:] != 7).all())
    with pytest.raises(PatternError, match="does not tile"):
        View.block_view_of(view.data, (3, 1, 1))
    with pytest.raises(PatternError, match="one size for each dim"):
        View.broadcast_block_to_element(per_block, (2, 1))


def test_a_view_masks_and_scales_its_blocks() -> None:
    mine, spec = pairs_view(), BlockSpec(pairs_view(), (2, 1, 2))
    mask, factors = torch.rand(2, 4, 1) < 0.5, torch.randn(2, 4, 1)
    for view, blocks in ((mine, (2, 1, 2)), (spec, ())):
        view.apply_multiplier(factors, *[blocks] * bool(blocks))
        view.apply_mask(mask, *[blocks] * bool(blocks))
    assert torch.equal(mine.data, spec.data) and mine.param.requires_grad
    for wrong in (mask[:1], mask.float()):
        with pytest.raises(PatternError):
            mine.apply_mask(wrong, (2, 1, 2))
    assert torch.equal(mine.data, spec.data)


@pytest.mark.parametrize("kind", ["contiguous", "offset", "transposed", "gaps"])
def test_an_index_of_the_view_leads_to_its_place_in_the_parameter(kind: str) -> None:
    weight = torch.arange(32.0).reshape(4, 8)
    if kind == "offset":
        weight = torch.arange(40.0)[8:].reshape(4, 8)
    elif kind == "transposed":
        weight = torch.arange(32.0).reshape(8, 4).t()
    elif kind == "gaps":
        weight = torch.arange(128.0).reshape(8, 16)[::2, ::2]
    view = View.from_rule(Parameter(weight), "m (p t) -> m t p", {"t": 4})
    idx = torch.cartesian_prod(torch.arange(4), torch.arange(4), torch.arange(2)).reshape(8, 4, 3)
    rows, columns = view.to_param_rc(idx)
    assert rows.shape == columns.shape == view.linear_offset(idx).shape == (8, 4)
    expected = view.data.reshape(8, 4)
    assert torch.equal(view.param[rows, columns], expected)
    first = view.param.storage_offset()
    whole = torch.empty(0).set_(view.param.untyped_storage())
    assert torch.equal(whole[first + view.linear_offset(idx)], expected)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([0, 1, 2], "outside the view's shape"),
        ([-1, 0, 0], "outside the view's shape"),
        ([0, 0], "the last dim must be 3"),
        ([0.0, 0.0, 0.0], "give integers"),
    ],
)
def test_an_index_outside_the_view_is_refused(index: list[float], message: str) -> None:
    for lookup in (pairs_view().linear_offset, pairs_view().to_param_rc):
        with pytest.raises(PatternError, match=message):
            lookup(torch.tensor(index))


def test_only_a_matrix_has_rows_and_columns() -> None:
    view = View.from_existing(torch.ones(2, 2, 2))
    with pytest.raises(PatternError, match="use linear_offset"):
        view.to_param_rc(torch.tensor([0, 0, 0]))
    assert int(view.linear_offset(torch.tensor([1, 0, 1]))) == 5


# pruners ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named", "ours"),
    [
        ((), {"block_size": 2048}, {}),
        ((2048,), {}, {}),
        ((2048,), {"compensate": "full"}, {"compensate": "full"}),
        ((8, "interleaved", 2), {}, {"compensate": "interleaved", "n_splits": 2}),
        (("interleaved", 2), {}, {"compensate": "interleaved", "n_splits": 2}),
    ],
)
def test_prune_takes_both_orders_of_its_arguments(options, named, ours) -> None:
    torch.manual_seed(0)
    start, inputs = torch.randn(8, 16), torch.randn(64, 16)
    found = []
    for given, keywords in ((options, named), ((), ours)):
        weight = Parameter(start.clone())
        scope = ScopeSpec(BlockSpec(weight, (1, 1)), (1, 4))
        StructuredOBS(scope, inputs.T @ inputs / 64).prune(2, *given, **keywords)
        found.append(weight.data)
    assert torch.equal(*found)


def test_prune_refuses_what_neither_order_has() -> None:
    obs = StructuredOBS(ScopeSpec(BlockSpec(torch.randn(4, 8), (1, 1)), (1, 4)), torch.eye(8))
    for options, named in (
        ((8, "full", 1, 2), {}),
        (("full",), {"compensate": "full"}),
        ((), {"x": 1}),
    ):
        with pytest.raises(TypeError, match=r"StructuredOBS\.prune\(\)"):
            obs.prune(2, *options, **named)


@pytest.mark.parametrize("batch_size", [1, 7, 4096])
def test_a_hessian_is_the_same_in_any_batches_and_on_its_device(batch_size: int) -> None:
    x = torch.randn(3, 10, 8)
    found = s3.compute_hessian(x, device="cpu", batch_size=batch_size)
    torch.testing.assert_close(found, s3.compute_hessian(x))
    assert s3.compute_hessian(x.double(), "cpu", 5).dtype == torch.float32
    with pytest.raises(s3.HessianError, match="batch_size=0"):
        s3.compute_hessian(x, batch_size=0)


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_with_tokens_the_output_error_is_absolute(scale: float) -> None:
    x = torch.randn(50, 8, dtype=torch.float64)
    weight = torch.randn(4, 8, dtype=torch.float64) * scale
    pruned = weight * (torch.rand(4, 8) < 0.5)
    expected = float((x @ (pruned - weight).T).norm())
    found = s3.output_error(pruned, weight, x.T @ x / 50, 50)
    assert math.isclose(found, expected, rel_tol=1e-9)
    assert s3.output_error(weight, weight, x.T @ x / 50, N=50) == 0
    with pytest.raises(s3.HessianError, match="N=0"):
        s3.output_error(pruned, weight, x.T @ x / 50, 0)


# inputs -------------------------------------------------------------------------------------------


def test_a_catcher_records_modules_that_are_attached_by_name() -> None:
    catcher = s3.ModuleInputCatcher(device=torch.device("cpu"))
    first, last = nn.Linear(4, 4), nn.Linear(4, 2)
    net = nn.Sequential(first, last, nn.ReLU())
    catcher.attach(first, "first")
    catcher.attach(last, "last", raise_error=True)
    with pytest.raises(RuntimeError, match="the forward pass ended"):
        net(torch.ones(3, 4))
    assert catcher.run(net, torch.ones(2, 4)) is None
    assert [call["args"][0].shape[0] for call in catcher.inputs["first"]] == [3, 2]
    args, kwargs = call = catcher.pop("last")
    assert (args, kwargs) == (call["args"], call["kwargs"]) == (call.args, call.kwargs) == call[:]
    with pytest.raises(s3.ModelError, match="attached already"):
        catcher.attach(last, "first")
    catcher.detach("first")
    catcher.detach("last")
    assert not catcher.inputs and not first._forward_pre_hooks and not last._forward_pre_hooks
    assert net(torch.ones(2, 4)).shape == (2, 2)
    with pytest.raises(s3.ModelError, match="'last' is not attached"):
        catcher.detach("last")


def test_a_catcher_that_is_left_holds_no_hook_and_keeps_its_calls() -> None:
    linear = nn.Linear(4, 2)
    with s3.ModuleInputCatcher("cpu") as catcher:
        catcher.attach(linear, "it")
        linear(torch.ones(1, 4))
    linear(torch.ones(1, 4))
    assert len(catcher.inputs["it"]) == 1 and not linear._forward_pre_hooks
    with pytest.raises(s3.ModelError, match="made for modules"):
        s3.ModuleInputCatcher(linear).attach(linear, "it")


# pictures -----------------------------------------------------------------------------------------


def test_a_picture_unpacks_into_its_figure_and_axes() -> None:
    pytest.importorskip("matplotlib")
    weights = [Parameter(torch.ones(40, 80)) for _ in range(2)]
    blocks = [BlockSpec(weight, (1, 1)) for weight in weights]
    figure, ax = s3.draw_layout(
        ScopeSpec(blocks[0], (1, 4)), max_rows=8, max_cols=16, cell_size=0.4
    )
    assert ax is figure.axes[0] and ax.images[0].get_array().shape[:2] == (8, 16)
    assert figure.get_figwidth() == pytest.approx(16 * 0.4 + 0.7)
    coupled, axes = s3.draw_layout(BlockCoupling(blocks))
    assert axes == coupled.axes and len(axes) == 2
    again = pickle.loads(pickle.dumps(figure))
    assert again.axes[0].get_title(loc="left") == ax.get_title(loc="left")
    for wrong in ({"max_rows": 0}, {"max_cols": 0}, {"cell_size": 0.0}):
        with pytest.raises(PatternError, match="must be above 0"):
            s3.draw_layout("2:4", **wrong)
