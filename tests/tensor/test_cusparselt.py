"""Products of training by sparse tensor cores: the routing on any device, the products on a GPU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor.tensor import cusparselt as cores
from s3tensor.tensor.cusparselt import Choice

gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_SAID", set())
    monkeypatch.setattr(cores, "_CHOICES", {})


@pytest.fixture
def sparse_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product that can runs by sparse tensor cores, however small."""
    monkeypatch.setattr(Choice, "is_sparse", lambda self, graph: True)


def mlp(width: int = 64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def grads(model: nn.Module, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one pass, the input's as ``x``."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(upstream)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **found}


# the model --------------------------------------------------------------------------------------------


def test_the_report_says_which_products_run_so_and_why_others_do_not() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(64, 128),
            "both": nn.Linear(64, 64),
            "three": nn.Linear(64, 64),
            "rows": nn.Linear(64, 64),
            "odd": nn.Linear(48, 64),
            "own": Own(64, 64),
            "falling": nn.Linear(64, 64),
            "hooked": nn.Linear(64, 64),
            "coupled": nn.Linear(64, 64),
        }
    )
    patterns = {"three": "3:4", "rows": "rowpair16", "coupled": "coupled2:4"}
    for name, module in model.items():
        options: dict[str, Any] = {"transposable": True} if name == "both" else {}
        if name == "falling":
            options["schedule"] = s3.Density(1.0, steps=4)
        sparse = s3.S3Sparse(patterns.get(name, "2:4"), **options)
        parametrize.register_parametrization(module, "weight", sparse)
    own = model["hooked"].forward
    model["hooked"].forward = lambda x: own(x)  # as accelerate does
    report = s3.sparse_cores_(model)
    found = {row.name.removesuffix(".weight"): (row.products, row.reason) for row in report}
    assert len(report) == len(model)
    assert found["plain"] == found["coupled"] == ("forward", "")
    assert found["both"] == ("forward and backward", "")
    reasons = {name: reason for name, (products, reason) in found.items() if products == "dense"}
    assert reasons == {
        "three": "3:4 does not keep at most 2 of 4 neighbours",
        "rows": "rowpair16 does not keep at most 2 of 4 neighbours",
        "odd": "its shape (64, 48) does not divide by 64",
        "own": "Own is not an nn.Linear",
        "falling": "a density schedule may keep more than 2 of 4",
        "hooked": "the module has a forward of its own",
    }
    assert "both.weight     forward and backward\n" in str(report)
    assert "odd.weight      dense: its shape (64, 48) does not divide by 64" in str(report)


def test_a_pattern_of_the_transpose_and_attention_stay_dense() -> None:
    layer = nn.Linear(64, 64)
    sparse = s3.S3Sparse("2:4", transposed=True)
    parametrize.register_parametrization(layer, "weight", sparse)
    assert [row.reason for row in s3.sparse_cores_(layer)] == ["its pattern is of the transpose"]
    attention = nn.MultiheadAttention(64, 4)
    s3.sparsify_training_(attention, "2:4", filter_fn=lambda m, n: True)
    (row,) = s3.sparse_cores_(attention)
    assert "does not call it" in row.reason


def test_what_is_frozen_keeps_no_activations() -> None:
    x, weight = torch.randn(6, 64), torch.randn(128, 64)
    for of_x, of_weight in ((True, False), (False, True), (True, True)):
        kept: list[tuple[int, ...]] = []
        a, b = x.clone().requires_grad_(of_x), weight.clone().requires_grad_(of_weight)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(tuple(t.shape)) or t, lambda t: t
        ):
            y = cores.cores_product(a, b, False, True)
        assert sorted(kept) == sorted([(6, 64)] * of_weight + [(128, 64)] * of_x)
        y.sum().backward()
        assert (a.grad is not None, b.grad is not None) == (of_x, of_weight)


@pytest.mark.filterwarnings("ignore:sparse_cores_")
def test_a_forward_takes_what_a_linear_layer_takes() -> None:
    layer = nn.Linear(64, 64, dtype=torch.float64)
    parametrize.register_parametrization(layer, "weight", s3.S3Sparse("2:4"))
    s3.sparse_cores_(layer)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        assert layer(input=torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64
    assert layer.to("meta")(torch.empty(2, 64, device="meta", dtype=torch.float64)).is_meta


def test_a_coupling_and_a_convolution_stay_dense() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Linear(64, 64))
    s3.sparsify_training_(model, "conv2:4")
    s3.sparsify_training_(model, "2:4")
    assert [row.products for row in s3.sparse_cores_(model)] == ["dense", "forward"]
    with pytest.raises(s3.ModelError, match="sparsify_training_ first"):
        s3.sparse_cores_(nn.Linear(64, 64))


@pytest.mark.parametrize("mode", ["fixed", "ste", "srste", "soft"])
def test_on_a_cpu_nothing_changes_but_a_warning(mode: str) -> None:
    model = mlp()
    s3.sparsify_training_(model, "2:4", mode)
    x, upstream = torch.randn(8, 64), torch.randn(8, 64)
    expected = grads(model, x, upstream)
    s3.sparse_cores_(model)
    with pytest.warns(UserWarning, match="x is on cpu, so the product stays dense"):
        found = grads(model, x, upstream)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)  # said once


def test_finalize_and_turning_off_give_the_forward_of_the_class_back() -> None:
    model = mlp()
    s3.sparsify_training_(model, "2:4")
    s3.sparse_cores_(model)
    assert "forward" in model[0].__dict__ and "forward" not in model[1].__dict__
    assert {row.reason for row in s3.sparse_cores_(model, enable=False)} == {"turned off"}
    assert "forward" not in model[0].__dict__
    s3.sparse_cores_(model)
    s3.finalize(model)
    assert "forward" not in model[0].__dict__
    assert isinstance(model[0].weight, s3.StructuredSparseTensor)
    assert model(torch.randn(2, 64)).shape == (2, 64)


@pytest.mark.filterwarnings("ignore:sparse_cores_")
def test_a_copy_multiplies_by_its_own_weight() -> None:
    model = mlp()
    s3.sparsify_training_(model, "2:4")
    s3.sparse_cores_(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].parametrizations.weight.original.zero_()
        other[0].bias.zero_()
    x = torch.randn(3, 64)
    assert torch.equal(other[0](x), torch.zeros(3, 128))
    assert not torch.equal(model[0](x), torch.zeros(3, 128))
    state = model.state_dict()
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))


@pytest.mark.filterwarnings("ignore:sparse_cores_")
def test_parametrizations_that_are_removed_by_hand_leave_a_plain_product() -> None:
    layer = nn.Linear(64, 64)
    parametrize.register_parametrization(layer, "weight", s3.S3Sparse("2:4"))
    s3.sparse_cores_(layer)
    parametrize.remove_parametrizations(layer, "weight")
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_the_operator_keeps_the_rules_of_torch(turned: bool, both: bool) -> None:
    x = torch.randn(6, 128 if turned else 64, requires_grad=True)
    weight = torch.randn(128, 64, requires_grad=True)
    torch.library.opcheck(cores.cores_product, (x, weight, turned, both))
    y = cores.cores_product(x, weight, turned, both)
    upstream = torch.randn_like(y)
    expected = x @ (weight if turned else weight.t())
    torch.testing.assert_close(y, expected)
    mine = torch.autograd.grad(y, (x, weight), upstream)
    theirs = torch.autograd.grad(expected, (x, weight), upstream)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:sparse_cores_")
def test_it_compiles_whole_on_a_cpu() -> None:
    model = mlp()
    s3.sparsify_training_(model, "2:4", transposable=True)
    s3.sparse_cores_(model)
    x, upstream = torch.randn(8, 64), torch.randn(8, 64)
    found = grads(torch.compile(model, fullgraph=True, backend="aot_eager"), x, upstream)
    expected = grads(model, x, upstream)
    for name, value in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}" if "." in name else name], value)


def test_outside_a_graph_the_time_of_the_host_counts() -> None:
    choice = Choice(64, 64, 16, dense_us=200, sparse_us=150, call_us=400, plan=(0, 1, -1))
    assert choice.is_sparse(graph=True) and not choice.is_sparse(graph=False)
    assert not Choice(64, 64, 16, 100, 150, 10, (0, 1, -1)).is_sparse(graph=True)
    assert Choice(64, 64, 16, 500, 150, 400, (0, 1, -1)).is_sparse(graph=False)


@pytest.mark.filterwarnings("ignore:sparse_cores_")
def test_ordinary_life_goes_on() -> None:
    """functional_call, vmap over inputs, one row of x, none, a wrong width, activation checkpoints."""
    from torch.utils.checkpoint import checkpoint

    model = mlp()
    s3.sparsify_training_(model, "2:4", transposable=True)
    x = torch.randn(5, 64)
    expected = model(x)
    s3.sparse_cores_(model)
    state = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, state, (x,)), expected)
    torch.testing.assert_close(torch.vmap(model)(x), expected)
    torch.testing.assert_close(model(x[0]), expected[0])
    assert model(x[:0]).shape == (0, 64) and model(x[None, None]).shape == (1, 1, 5, 64)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.randn(5, 63))
    inputs = x.clone().requires_grad_()
    checkpoint(model, inputs, use_reentrant=False).sum().backward()
    found = inputs.grad
    inputs.grad = None
    model(inputs).sum().backward()
    assert found is not None and torch.equal(found, inputs.grad)


def test_what_can_run_by_sparse_tensor_cores_is_known_from_shapes_dtypes_and_devices() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight = torch.empty(64, 128, device="cuda", dtype=torch.bfloat16)
        x = torch.empty(16, 128, device="cuda", dtype=torch.bfloat16)
        assert cores._refusal(x, weight) == ""
        assert cores._refusal(x.half(), weight.half()) == ""
        assert "train under torch.autocast" in cores._refusal(x.float(), weight.float())
        assert "torch.float16 and the weight torch.bfloat16" in cores._refusal(x.half(), weight)
        fits = "x does not fit the weight"
        assert (
            cores._refusal(torch.empty(16, 64, device="cuda", dtype=torch.bfloat16), weight) == fits
        )
        assert cores._refusal(x, torch.empty(64, 128, dtype=torch.bfloat16)) == fits
        assert cores._refusal(torch.empty(16, 128), weight) == "x is on cpu"
    found = []
    torch.vmap(lambda row: found.append(cores._is_transformed()) or row)(torch.zeros(2, 3))
    assert found == [True] and not cores._is_transformed()


def test_a_size_is_measured_once_and_never_while_a_graph_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    asked: list[tuple[int, ...]] = []
    known = {"answer": False}

    def measure(x: Tensor, weight: Tensor) -> Choice:
        asked.append((*weight.shape, x.shape[0]))
        return Choice(*asked[-1], dense_us=9, sparse_us=5, call_us=7, plan=(3, 1, -1))

    monkeypatch.setattr(cores, "_measure", measure)
    monkeypatch.setattr(cores, "_knows", lambda device: known["answer"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made GPU")
    capturing = {"answer": True}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing["answer"])
    with FakeTensorMode():
        weight = torch.empty(64, 128, device="cuda", dtype=torch.bfloat16)
        x, more, most = (
            torch.empty(n, 128, device="cuda", dtype=torch.bfloat16) for n in (600, 1024, 1025)
        )
        with pytest.warns(UserWarning, match="recorded before a product of this size has run once"):
            assert cores._plan(x, weight) is None
        capturing["answer"] = False
        with pytest.warns(UserWarning, match="whose format is known, serves the made GPU"):
            assert cores._plan(x, weight) is None
        assert not asked
        known["answer"] = True
        assert cores._plan(x, weight) == cores._plan(more, weight) == (3, 1, -1)
        assert asked == [(64, 128, 600)]
        assert cores._plan(most, weight) == (3, 1, -1) and len(asked) == len(cores.choices()) == 2
        capturing["answer"] = True
        assert cores._plan(x, weight) == (3, 1, -1)
        odd = torch.empty(64, 96, device="cuda", dtype=torch.bfloat16)
        assert cores._plan(torch.empty(8, 96, device="cuda", dtype=torch.bfloat16), odd) is None
        assert cores._plan(torch.empty(0, 128, device="cuda"), weight) is None


# on a GPU ---------------------------------------------------------------------------------------------


def needs_cores() -> None:
    if not cores._knows(torch.device("cuda", 0)):
        pytest.skip("needs cuSPARSELt on a GPU whose format is known")


# One rounding to the dtype of each of two results whose sums of float32 are in another order.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "") -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) < TOLERANCE[dtype], f"{name}: {float(error)}"


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 16, 100, 512])
@pytest.mark.parametrize("turned", [False, True])
def test_the_product_is_the_dense_one(
    dtype: torch.dtype, tokens: int, turned: bool, sparse_wins: None
) -> None:
    needs_cores()
    torch.manual_seed(tokens)
    weight = torch.randn(192, 320, device="cuda", dtype=dtype)
    weight = torch.where(s3.transposable(weight, "2:4"), weight, 0)
    x = torch.randn(tokens, 192 if turned else 320, device="cuda", dtype=dtype)
    seen = weight if turned else weight.t()
    y = cores.cores_product(x, weight, turned, True)
    assert y.shape == (tokens, seen.shape[1]) and len(cores.choices()) == 1
    close(y, x.double() @ seen.double(), dtype)
    torch.library.opcheck(cores.cores_product, (x, weight, turned, True))


@gpu
@pytest.mark.parametrize("mode", ["fixed", "ste", "srste", "soft"])
@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_those_of_the_dense_products(
    mode: str, transposable: bool, compiled: bool, sparse_wins: None
) -> None:
    needs_cores()
    model = mlp(128).cuda()
    s3.sparsify_training_(model, "2:4", mode, transposable=transposable)
    x = torch.randn(4, 64, 128, device="cuda")
    upstream = torch.randn(4, 64, 128, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected = grads(model, x, upstream)
        report = s3.sparse_cores_(model)
        call = torch.compile(model, fullgraph=True) if compiled else model
        found = grads(call, x, upstream)
    assert {row.products for row in report} == {
        "forward and backward" if transposable else "forward"
    }
    # Forward products of two sizes; with transposable masks, those of the backward pass too.
    assert len(cores.choices()) == (4 if transposable else 2)
    for name, value in expected.items():
        close(
            found[f"_orig_mod.{name}" if compiled and "." in name else name],
            value,
            torch.bfloat16,
            name,
        )


@gpu
def test_a_captured_step_replays_the_product(sparse_wins: None) -> None:
    needs_cores()
    layer = nn.Linear(128, 64, device="cuda", dtype=torch.bfloat16)
    s3.sparsify_training_(layer, "2:4", "fixed", filter_fn=lambda m, n: True)
    s3.sparse_cores_(layer)
    x = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        early = pytest.warns(UserWarning, match="recorded before a product of this size")
        with early, torch.cuda.graph(graph):
            layer(x)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        layer.parametrizations.weight.original.mul_(2)  # the copy is made anew in each replay
        graph.replay()
        close(y, F.linear(x.double(), layer.weight.double(), layer.bias.double()), torch.bfloat16)


@gpu
def test_a_weight_that_breaks_the_pattern_gives_nan_and_no_wrong_number(sparse_wins: None) -> None:
    needs_cores()
    weight = torch.zeros(64, 64, device="cuda", dtype=torch.bfloat16)
    weight[3, :3] = 1
    y = cores.cores_product(
        torch.ones(16, 64, device="cuda", dtype=torch.bfloat16), weight, False, False
    )
    assert bool(y[:, 3].isnan().all()) and int(y.isnan().sum()) == 16


@gpu
def test_a_product_that_was_measured_slower_is_dense_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needs_cores()
    slower = Choice(64, 64, 16, dense_us=5, sparse_us=9, call_us=400, plan=(0, 1, -1))
    monkeypatch.setattr(cores, "_measure", lambda x, weight: slower)
    layer = nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)
    s3.sparsify_training_(layer, "2:4", filter_fn=lambda m, n: True)
    s3.sparse_cores_(layer)
    x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.warns(
        UserWarning, match=r"16 rows of x by a weight of 64 x 64 take 5 us dense and 400 us by"
    ):
        y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight) + layer.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    wide = pytest.warns(UserWarning, match=r"x is torch.float32 and the weight torch.bfloat16")
    with wide, pytest.raises(RuntimeError, match="dtype"):
        layer(x.float())


@gpu
def test_sizes_are_measured_once_and_batches_of_like_size_share_it() -> None:
    needs_cores()
    weight = torch.randn(4096, 14336, device="cuda", dtype=torch.bfloat16)
    weight = torch.where(s3.project(weight, "2:4"), weight, 0)
    x = torch.randn(8192, 14336, device="cuda", dtype=torch.bfloat16)
    y = cores.cores_product(x, weight, False, False)
    (choice,) = cores.choices()
    assert (choice.rows, choice.columns, choice.tokens) == (4096, 14336, 8192)
    assert 0 < choice.sparse_us < float("inf") and choice.dense_us > 0 and choice.call_us > 0
    close(y, x @ weight.t(), torch.bfloat16)
    cores.cores_product(x[:6000], weight, False, False)
    assert len(cores.choices()) == 1  # a batch of like size asks nothing anew
