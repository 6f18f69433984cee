"""torch.compile, export and autocast over compressed weights: the graph keeps the sparsity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

import s3tensor as s3

PATTERNS = ("2:4", "pair4:8", "coupled2:4", "rowpair16")
WIDE, DEEP, MID = 64, 48, 80  # features that are told apart by their number


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sparse_linear(
    in_features: int, out_features: int, pattern: str = "2:4", bias: bool = True
) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias)
    weight = s3.StructuredSparseTensor.from_dense(linear.weight, pattern)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def two_layers(pattern: str = "2:4") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        sparse_linear(WIDE, MID, pattern), nn.GELU(), sparse_linear(MID, DEEP, pattern)
    )


class Capture:
    """An AOTAutograd backend that keeps every graph it is given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def shapes(self) -> set[tuple[int, ...]]:
        """The shape of every tensor that a graph holds, inputs included."""
        found = set()
        for graph in self.graphs:
            for node in graph.graph.nodes:
                values = node.meta.get("val")
                for value in values if isinstance(values, (tuple, list)) else (values,):
                    if isinstance(value, Tensor):
                        found.add(tuple(int(n) for n in value.shape))
        return found

    def calls(self) -> list[str]:
        """The names of the operators called, in order."""
        return [
            str(node.target)
            for graph in self.graphs
            for node in graph.graph.nodes
            if node.op == "call_function"
        ]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_graph_of_two_layers_holds_two_ops_and_no_dense_weight(pattern: str) -> None:
    model, capture = two_layers(pattern), Capture()
    x = torch.randn(5, WIDE)
    with torch.no_grad():
        expected = model(x)
        y = torch.compile(model, fullgraph=True, backend=capture.backend)(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    ours = [call for call in capture.calls() if "s3tensor" in call]
    assert ours == ["s3tensor.linear.default"] * 2
    dense = {(MID, WIDE), (WIDE, MID), (DEEP, MID), (MID, DEEP)}
    assert not capture.shapes() & dense
    assert not [call for call in capture.calls() if "mm" in call or "unpack" in call]


def test_the_check_of_the_graph_would_see_a_dense_weight() -> None:
    capture = Capture()
    model = nn.Linear(WIDE, MID)
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=capture.backend)(torch.randn(5, WIDE))
    assert (MID, WIDE) in capture.shapes()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_inductor_gives_what_eager_gives(pattern: str) -> None:
    model = two_layers(pattern)
    x = torch.randn(5, WIDE)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True)(x)
        # The products are the same op; GELU between them may round otherwise in the fused loop.
        torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-6)


def test_a_dynamic_batch_compiles_once() -> None:
    model = two_layers()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 7, 128):
            x = torch.randn(batch, WIDE)
            torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_layers_of_one_pattern_and_shape_share_one_compile() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def apply(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight).relu()

    x = torch.randn(4, WIDE)
    for seed in range(3):
        torch.manual_seed(seed)
        weight = sparse_linear(WIDE, MID, bias=False).weight
        expected = torch.nn.functional.linear(x, weight).relu()
        torch.testing.assert_close(apply(x, weight), expected, rtol=0, atol=0)
    assert counter.frame_count == 1
    other = sparse_linear(WIDE, MID, "pair4:8", bias=False).weight
    apply(x, other)
    assert counter.frame_count == 2  # another pattern is another graph


INPUTS = {
    "one row": lambda: torch.randn(1, WIDE),
    "a vector": lambda: torch.randn(WIDE),
    "three dims": lambda: torch.randn(2, 3, WIDE),
    "three dims, not contiguous": lambda: torch.randn(2, WIDE, 3).mT,
    "expanded": lambda: torch.randn(1, WIDE).expand(4, WIDE),
    "no rows": lambda: torch.randn(0, WIDE),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_any_input_compiles_to_what_eager_gives(make: Any, bias: bool) -> None:
    linear = sparse_linear(WIDE, MID, bias=bias)
    x = make()
    with torch.no_grad():
        y = torch.compile(linear, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(y, linear(x), rtol=0, atol=0)


@pytest.mark.parametrize("write", ["F.linear", "x @ w.t()", "addmm"])
def test_every_way_to_write_the_product_compiles(write: str) -> None:
    weight = sparse_linear(WIDE, MID).weight
    bias = torch.randn(MID)

    def apply(x: Tensor) -> Tensor:
        if write == "F.linear":
            return torch.nn.functional.linear(x, weight, bias)
        if write == "addmm":
            return torch.addmm(bias, x, weight.t())
        return x @ weight.t() + bias

    capture = Capture()
    x = torch.randn(5, WIDE)
    with torch.no_grad():
        y = torch.compile(apply, fullgraph=True, backend=capture.backend)(x)
        torch.testing.assert_close(y, apply(x), rtol=0, atol=0)
    assert (MID, WIDE) not in capture.shapes()


def test_gradients_of_activations_pass_through_a_compiled_frozen_weight() -> None:
    model, capture = two_layers(), Capture()
    x = torch.randn(5, WIDE, requires_grad=True)
    model(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.compile(model, fullgraph=True, backend=capture.backend)(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-7)
    dense = {(MID, WIDE), (WIDE, MID), (DEEP, MID), (MID, DEEP)}
    assert len(capture.graphs) == 2  # forward and backward
    assert not capture.shapes() & dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_a_compiled_function(dtype: torch.dtype) -> None:
    linear = sparse_linear(WIDE, MID)
    x = torch.randn(5, WIDE)

    def apply(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return linear(x)

    with torch.no_grad():
        y = torch.compile(apply, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, apply(x), rtol=0, atol=0)


def test_export_keeps_the_op() -> None:
    model = two_layers()
    x = torch.randn(5, WIDE)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
        calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert sum("s3tensor" in call and "linear" in call for call in calls) == 2
        for rows in (2, 9):
            given = torch.randn(rows, WIDE)
            torch.testing.assert_close(program.module()(given), model(given), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["ste", "fixed"])
def test_a_parametrized_layer_trains_compiled_as_it_does_eager(mode: str) -> None:
    def train(compiled: bool) -> tuple[Tensor, int]:
        torch.manual_seed(1)
        linear = nn.Linear(WIDE, MID)
        parametrize.register_parametrization(linear, "weight", s3.S3Sparse("2:4", mode=mode))
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(linear, fullgraph=True, backend=counter) if compiled else linear
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.05)
        for seed in range(4):
            x = torch.randn(16, WIDE, generator=torch.Generator().manual_seed(seed))
            step(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return linear.weight.detach(), counter.frame_count

    eager, _ = train(compiled=False)
    compiled, compiles = train(compiled=True)
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)
    assert compiles == 1
    assert s3.satisfies(compiled, "2:4")


def test_a_finalized_model_compiles_to_the_same_ops() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDE, MID), nn.ReLU(), nn.Linear(MID, DEEP))
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", s3.S3Sparse("2:4"))
    x = torch.randn(5, WIDE)
    expected = model(x).detach()
    s3.finalize(model)
    capture = Capture()
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend=capture.backend)(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    assert [c for c in capture.calls() if "s3tensor" in c] == ["s3tensor.linear.default"] * 2
