"""Compressed weights under torch.compile and torch.export: what the graph holds, and how often it is made.

Where the compiler's own output is the point the backend is Inductor; elsewhere it is ``aot_eager``, which
traces the same graph and runs it as it is.
"""

from __future__ import annotations

import copy
import io
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compile_counter import compiled
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor import StructuredSparseTensor

PATTERNS = ("2:4", "pair4:8", "coupled2:4", "rowpair16", "block:4x4@0.5", "unstructured@0.3")
LINEAR = "s3tensor.linear_inference.default"

inductor = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None,
    reason="Inductor needs a C++ compiler on the CPU",
)
exports = pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 7),
    reason="torch.export takes no parameter that is a tensor subclass before torch 2.7",
)


@pytest.fixture(autouse=True)
def _no_graph_of_another_test() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(pattern: str = "2:4", shape: tuple[int, int] = (32, 64)) -> StructuredSparseTensor:
    return StructuredSparseTensor.from_dense(torch.randn(shape), pattern)


def two_layers(pattern: str = "2:4", bias: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 48, bias=bias), nn.ReLU(), nn.Linear(48, 32, bias=bias))
    s3.sparsify_(model, pattern)
    return model


class Captured:
    """A backend that keeps the graphs that AOTAutograd hands to its compiler, forward and backward."""

    def __init__(self, backend: str) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.inductor = backend == "inductor"

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if self.inductor:
            with torch._inductor.config.patch(force_disable_caches=True):
                return compile_fx(graph, inputs, inner_compile=self._inner)
        return aot_autograd(fw_compiler=self._as_is)(graph, inputs)

    def _inner(self, graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
        self.graphs.append(copy.deepcopy(graph))
        return compile_fx_inner(graph, inputs, **options)

    def _as_is(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)

    def calls(self) -> list[str]:
        """Every operator in the graphs, in order."""
        nodes = (node for graph in self.graphs for node in graph.graph.nodes)
        return [str(node.target) for node in nodes if node.op == "call_function"]

    def shapes(self) -> set[tuple[int, ...]]:
        """Shapes of every value in the graphs: inputs, intermediate values and outputs."""
        found = set()
        for graph in self.graphs:
            for node in graph.graph.nodes:
                if node.op == "output":
                    continue  # its arguments are nodes, met before
                value = node.meta["val"]
                for tensor in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(tensor, Tensor):
                        found.add(tuple(tensor.shape))
        return found


# what the graph holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("backend", "pattern"),
    [pytest.param("inductor", "2:4", marks=inductor), *(("aot_eager", p) for p in PATTERNS)],
)
def test_a_graph_holds_the_custom_op_and_no_dense_weight(
    backend: str, pattern: str, bias: bool
) -> None:
    model = two_layers(pattern, bias)
    dense = {tuple(p.shape) for p in model.parameters() if isinstance(p, StructuredSparseTensor)}
    assert dense == {(48, 64), (32, 48)}
    captured = Captured(backend)
    call = torch.compile(model, fullgraph=True, backend=captured)
    x = torch.randn(5, 64)

    with torch.no_grad():  # inference
        assert torch.equal(call(x), model(x))
    assert captured.calls() == [LINEAR, "aten.relu.default", LINEAR]

    captured.graphs.clear()
    x.requires_grad_()  # forward and backward of a frozen weight
    call(x).square().sum().backward()
    assert len(captured.graphs) == 2
    assert captured.calls().count(LINEAR) == 4
    calls = " ".join(captured.calls())
    assert not any(f"aten.{name}." in calls for name in ("mm", "addmm", "bmm", "linear", "matmul"))
    shapes = captured.shapes()
    assert (5, 64) in shapes  # the walk sees inputs
    assert not shapes & (dense | {shape[::-1] for shape in dense})
    packed = max(p.packed.numel() for p in model.parameters() if hasattr(p, "packed"))
    assert max(torch.Size(shape).numel() for shape in shapes) == packed


def test_the_walk_finds_a_dense_weight_where_there_is_one() -> None:
    captured = Captured("aot_eager")
    call = torch.compile(lambda x, w: x @ w.to_dense().t(), fullgraph=True, backend=captured)
    x, weight = torch.randn(5, 64), make()
    torch.testing.assert_close(call(x, weight), x @ weight.to_dense().t())
    assert (32, 64) in captured.shapes() and LINEAR not in captured.calls()


# how often it is made ---------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
def test_a_dynamic_batch_compiles_once(grad: bool) -> None:
    model = two_layers()
    call, counter = compiled(model, dynamic=True)
    for batch in (2, 3, 7, 32, 48, 512):  # sizes of the weight and of its parts among them
        x = torch.randn(batch, 64, requires_grad=grad)
        y = call(x)
        assert torch.equal(y, model(x))
        if grad:
            y.sum().backward()
            assert x.grad is not None and x.grad.shape == x.shape
    assert counter.frame_count == 1


@inductor
def test_inductor_compiles_once_for_a_batch_that_is_marked_dynamic() -> None:
    model = two_layers()
    call, counter = compiled(model, "inductor")
    x = torch.randn(4, 5, 64)
    for dim in (0, 1):
        torch._dynamo.mark_dynamic(x, dim)  # raises if anything makes the size a constant
    with torch.no_grad():
        for each in (x, torch.randn(2, 3, 64), torch.randn(9, 4, 64)):
            assert torch.equal(call(each), model(each))
    assert counter.frame_count == 1


def test_equal_patterns_share_a_compilation() -> None:
    call, counter = compiled(lambda x, w: F.linear(x, w))
    x = torch.randn(3, 64)
    by_parts = s3.Pattern(block=(1, 1), scope=(1, 4), keep=2)
    for weight in (
        make(),
        make(),
        StructuredSparseTensor.from_dense(torch.randn(32, 64), by_parts),
    ):
        assert torch.equal(call(x, weight), F.linear(x, weight))
    assert counter.frame_count == 1
    for seen, weight in enumerate((make("1:4"), make("1:4", (48, 64)), make().t().t().double()), 2):
        assert torch.equal(call(x.to(weight.dtype), weight), F.linear(x.to(weight.dtype), weight))
        assert counter.frame_count == seen


def test_layers_of_one_shape_share_a_compilation() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    s3.sparsify_(model, "2:4")
    expected = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model:
        layer.compile(fullgraph=True, backend=counter)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    assert counter.frame_count == 1


def test_new_values_need_no_new_compilation() -> None:
    model = two_layers()
    call, counter = compiled(model)
    x = torch.randn(3, 64)
    call(x)
    model.load_state_dict(two_layers().state_dict())
    assert torch.equal(call(x), model(x))
    model[0].weight.copy_(StructuredSparseTensor.from_dense(torch.randn(48, 64), "2:4"))
    assert torch.equal(call(x), model(x))
    assert counter.frame_count == 1


# values and gradients ---------------------------------------------------------------------------------

CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: F.linear(x, w),
    "linear with bias": F.linear,
    "matmul": lambda x, w, b: x @ w.t() + b,
    "weight on the left": lambda x, w, b: (w @ x.mT).mT if x.ndim > 1 else w @ x,
    "addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, 64), w.t()),
    "two uses": lambda x, w, b: F.linear(F.linear(x, w, b), w.t()),
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "1-D": lambda: torch.randn(64),
    "one row": lambda: torch.randn(1, 64),
    "2-D": lambda: torch.randn(3, 64),
    "expanded": lambda: torch.randn(1, 64).expand(4, 64),
    "3-D": lambda: torch.randn(2, 3, 64),
    "4-D, non-contiguous": lambda: torch.randn(2, 4, 3, 64).transpose(0, 2),
    "every other column": lambda: torch.randn(2, 3, 128)[..., ::2],
    "no rows": lambda: torch.randn(2, 0, 64),
}


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("name", CALLS)
def test_compiled_products_and_gradients_are_the_eager_ones(name: str, shape: str) -> None:
    call, _ = compiled(CALLS[name])
    x, bias = INPUTS[shape](), torch.randn(32)
    weight = make()
    grads = []
    for function in (CALLS[name], call):
        leaves = [t.detach().clone().requires_grad_() for t in (weight, bias)]
        at = x.detach().requires_grad_()
        y = function(at, *leaves)
        y.square().sum().backward()
        grads.append([y.detach(), at.grad, *(leaf.grad for leaf in leaves)])
    for eager, other in zip(*grads, strict=True):
        if isinstance(eager, StructuredSparseTensor):
            assert other.same_layout(eager)
            eager, other = eager.to_dense(), other.to_dense()
        torch.testing.assert_close(other, eager)


@inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_gives_the_eager_values_and_gradients(dtype: torch.dtype) -> None:
    model = two_layers().to(dtype)
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_()
    twin = copy.deepcopy(model)
    call = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 3, 64).to(dtype).transpose(0, 1)
    outputs = []
    for function in (twin, call):
        at = x.detach().requires_grad_()
        y = function(at)
        y.square().sum().backward()
        outputs.append((y, at.grad))
    assert torch.equal(
        *(pair[0] for pair in outputs)
    )  # each layer runs the same op on the same values
    torch.testing.assert_close(outputs[1][1], outputs[0][1])
    for eager, other in zip(twin.parameters(), model.parameters(), strict=True):
        if isinstance(eager, StructuredSparseTensor):
            assert other.grad.same_layout(eager)
            torch.testing.assert_close(other.grad.to_dense(), eager.grad.to_dense())
        else:
            torch.testing.assert_close(other.grad, eager.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_reaches_a_compiled_product(dtype: torch.dtype, inside: bool) -> None:
    def cast(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return F.linear(x, weight)

    x, weight = torch.randn(3, 64), make()
    call, _ = compiled(cast if inside else F.linear)
    with torch.autocast("cpu", dtype=dtype, enabled=not inside):
        y = call(x, weight)
    assert y.dtype == dtype and torch.equal(y, cast(x, weight))


def test_views_and_copies_leave_a_compiled_function_compressed() -> None:
    call, _ = compiled(lambda w: (w.t(), w.detach().clone(), w.to(torch.bfloat16)))
    weight = make()
    view, twin, half = call(weight)
    assert torch.equal(view, weight.t()) and view.transposed
    assert torch.equal(twin, weight) and torch.equal(half, weight.bfloat16())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_weight_can_be_compressed_inside_a_compiled_function(pattern: str) -> None:
    def compress(x: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        weight = StructuredSparseTensor.from_dense(dense, pattern)
        return F.linear(x, weight), weight

    call, _ = compiled(compress)
    x, dense = torch.randn(3, 64), torch.randn(32, 64)
    for eager, other in zip(compress(x, dense), call(x, dense), strict=True):
        assert torch.equal(eager, other)


def test_torch_func_transforms_compile() -> None:
    weight, x = make().double(), torch.randn(3, 64, dtype=torch.float64)

    def loss(v: Tensor) -> Tensor:
        return F.linear(v, weight).square().sum()

    for function in (torch.func.grad(loss), torch.vmap(lambda v: F.linear(v, weight))):
        call, _ = compiled(function)
        torch.testing.assert_close(call(x), function(x))


def test_sizes_that_do_not_fit_are_refused_while_tracing() -> None:
    call, _ = compiled(lambda x, w: F.linear(x, w))
    with pytest.raises(RuntimeError, match="in_features 64"):
        call(torch.randn(3, 32), make())


def test_an_op_without_a_rule_is_refused_while_tracing() -> None:
    call, _ = compiled(lambda w: w * 2)
    with pytest.raises(Exception, match="no rule for StructuredSparseTensor"):
        call(make())


# training under a pattern -----------------------------------------------------------------------------


def under_pattern(mode: str, pattern: str = "2:4") -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32))
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", s3.S3Sparse(pattern, mode=mode))
    return model


@pytest.mark.parametrize("mode", ["ste", "fixed"])
@pytest.mark.parametrize("pattern", ["2:4", "coupled2:4"])
def test_training_steps_are_the_eager_ones_and_compile_once(mode: str, pattern: str) -> None:
    eager = under_pattern(mode, pattern)
    model = copy.deepcopy(eager)
    call, counter = compiled(model)
    pairs = [
        (function, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
        for function, module in ((eager, eager), (call, model))
    ]
    for _ in range(4):
        x = torch.randn(5, 64)
        for function, optimizer in pairs:
            optimizer.zero_grad()
            function(x).square().mean().backward()
            optimizer.step()
    for left, right in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(right, left)
    for layer in (model[0], model[2]):
        assert s3.satisfies(layer.weight.detach(), pattern)
    assert counter.frame_count == 1


@inductor
@pytest.mark.parametrize("mode", ["ste", "fixed"])
def test_inductor_trains_under_a_pattern(mode: str) -> None:
    eager = under_pattern(
        mode, "coupled2:4"
    )  # masks of N:M are no operator of their own in a graph
    model = copy.deepcopy(eager)
    captured = Captured("inductor")
    call = torch.compile(model, fullgraph=True, backend=captured)
    x = torch.randn(5, 64)
    outputs = [function(x) for function in (eager, call)]
    for y in outputs:
        y.square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    for left, right in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad)
    assert captured.calls().count("s3tensor.project.default") == (2 if mode == "ste" else 0)


def test_finalize_after_compiled_training_leaves_the_weight_in_use() -> None:
    model = under_pattern("ste")
    captured = Captured("aot_eager")
    call = torch.compile(model, fullgraph=True, backend=captured)
    x = torch.randn(5, 64)
    with torch.no_grad():
        before = call(x)
        captured.graphs.clear()
        s3.finalize(model)
        assert isinstance(model[0].weight, StructuredSparseTensor)
        assert torch.equal(call(x), before)
    assert [name for name in captured.calls() if "s3tensor" in name] == [LINEAR, LINEAR]


# export -----------------------------------------------------------------------------------------------


@exports
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_keeps_its_weights_compressed(strict: bool) -> None:
    model = two_layers()
    program = torch.export.export(
        model,
        (torch.randn(5, 64),),
        dynamic_shapes={"input": {0: torch.export.Dim("batch")}},
        strict=strict,
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = torch.randn(9, 64)
    for made in (program, torch.export.load(buffer)):
        assert torch.equal(made.module()(x), model(x))
    lowered = program.run_decompositions()  # last: torch 2.7 takes the parameters out of program
    calls = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    exported = "s3tensor.linear.default"
    assert calls == [exported, "aten.relu.default", exported]
