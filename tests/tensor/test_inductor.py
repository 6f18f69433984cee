"""Options for torch.compile: linears of one input become neighbours and results stay."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import s3tensor as s3
from s3tensor.tensor import ops
from s3tensor.tensor.inductor import GroupLinears, inductor_options

LINEAR = ops.linear._opoverload


class Attention(nn.Module):
    """Three linears of one input with something between them, and one of another input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.tanh(self.q(x)).sum(-1, keepdim=True)
        k = torch.sigmoid(self.k(x)) * q
        return self.o(torch.relu(self.v(x)) + k)


def graph_of(targets: list[tuple[Any, tuple[int, ...]]], inputs: int) -> fx.Graph:
    """A graph of calls, each of operands by number: inputs first, then earlier calls."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"p{i}") for i in range(inputs)]
    for target, args in targets:
        nodes.append(graph.call_function(target, tuple(nodes[i] for i in args)))
    graph.output(nodes[-1])
    return graph


def order(graph: fx.Graph) -> list[str]:
    return [node.name for node in graph.nodes if node.op == "call_function"]


def test_linears_of_one_input_become_neighbours_in_their_order() -> None:
    calls = [
        (LINEAR, (0, 1)), (torch.tanh, (3,)), (LINEAR, (0, 2)), (torch.relu, (5,)), (torch.add, (4, 6)),
    ]  # fmt: skip
    graph = graph_of(calls, 3)
    before = order(graph)
    GroupLinears()(graph)
    graph.lint()
    assert order(graph) == [before[0], before[2], before[1], *before[3:]]


def test_linears_with_int8_values_become_neighbours_too() -> None:
    int8 = torch.ops.s3tensor.linear_int8.default
    calls = [(int8, (0, 1)), (torch.tanh, (3,)), (int8, (0, 2)), (torch.add, (4, 5))]
    graph = graph_of(calls, 3)
    before = order(graph)
    GroupLinears()(graph)
    graph.lint()
    assert order(graph) == [before[0], before[2], before[1], before[3]]


def test_a_linear_that_waits_for_another_stays_behind_it() -> None:
    # the second reads x, but with a weight that is made from the first one's output, in two steps
    calls = [
        (LINEAR, (0, 1)), (torch.tanh, (2,)), (torch.relu, (3,)), (LINEAR, (0, 4)),
    ]  # fmt: skip
    graph = graph_of(calls, 2)
    before = order(graph)
    GroupLinears()(graph)
    graph.lint()
    assert order(graph) == before
    # a weight that is a view of an input comes along
    calls = [(LINEAR, (0, 1)), (torch.tanh, (3,)), (torch.t, (2,)), (LINEAR, (0, 5))]
    graph = graph_of(calls, 3)
    before = order(graph)
    GroupLinears()(graph)
    graph.lint()
    assert order(graph) == [before[2], before[0], before[3], before[1]]


def test_other_operators_are_left_alone_unless_named() -> None:
    calls = [(torch.mm, (0, 1)), (torch.tanh, (3,)), (torch.mm, (0, 2))]
    graph = graph_of(calls, 3)
    before = order(graph)
    GroupLinears()(graph)
    assert order(graph) == before
    GroupLinears((torch.mm,))(graph)
    assert order(graph) == [before[0], before[2], before[1]]


def test_compiled_code_has_them_next_to_each_other_and_equal_results() -> None:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = Attention().eval()
    s3.sparsify_(model, "2:4")
    x = torch.randn(3, 32)
    options = inductor_options(triton__cudagraphs=False, fx_graph_cache=False)
    call = torch.compile(model, fullgraph=True, options=options)
    with torch.no_grad():
        y, code = run_and_get_code(call, x)
        torch.testing.assert_close(y, model(x))
    found = re.findall(r"= torch\.ops\.s3tensor\.linear|^ +cpp_fused\S*\(", code[0], re.MULTILINE)
    kinds = "".join("L" if "torch.ops" in word else "f" for word in found)
    assert kinds.startswith("LLLf") and kinds.count("L") == 4


def test_options_are_those_that_this_torch_knows_and_the_users_count_first() -> None:
    options = inductor_options(triton__cudagraphs=False, max_autotune=True)
    assert options["triton.cudagraphs"] is False and options["max_autotune"] is True
    assert set(options) <= set(torch._inductor.list_options())
    same, other = GroupLinears(), GroupLinears((torch.mm,))
    assert same.uuid() == GroupLinears().uuid() != other.uuid()
    with pytest.raises(RuntimeError, match="no_such_option"):
        torch.compile(nn.Linear(2, 2), options=inductor_options(no_such_option=1))


# one launch ---------------------------------------------------------------------------------------------


def tiled_parts(rows: int, columns: int, pattern: str = "2:4") -> tuple[Tensor, Tensor]:
    """Packed values and indices, in tile order, of a random weight."""
    from s3tensor.kernels import tiles

    weight = s3.StructuredSparseTensor.from_dense(torch.randn(rows, columns), pattern)
    values = tiles.tile_values(weight.packed, pattern, rows, columns).reshape(weight.packed.shape)
    return values, tiles.tile_codes(weight.indices, pattern, rows, columns)


def counts(module: fx.GraphModule) -> dict[str, int]:
    """How often each operator of this library is in a graph."""
    names = [str(node.target) for node in module.graph.nodes if "s3tensor" in str(node.target)]
    return {name.split(".")[1]: names.count(name) for name in names}


def linears(
    kinds: list[tuple[int, dict[int, Any]]],  # rows of each weight, and arguments that differ
    between: bool = False,
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph of linears of one x, each followed by tanh, and its inputs."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    inputs = [torch.randn(3, 64)]
    outs = []
    for number, (rows, other) in enumerate(kinds):
        packed, indices = (graph.placeholder(f"{name}{number}") for name in ("packed", "indices"))
        inputs.extend(tiled_parts(rows, 64, other.get(4, "2:4")))
        args = [x, packed, indices, None, "2:4", [rows, 64], False, True]
        for place, value in other.items():
            args[place] = value
        outs.append((args, rows))
    done = []
    for args, _ in outs:
        if between:  # a weight that is made on the way
            args[1] = graph.call_function(torch.neg, (args[1],))
        done.append(graph.call_function(torch.tanh, (graph.call_function(LINEAR, tuple(args)),)))
    graph.output(tuple(done))
    return fx.GraphModule(torch.nn.Module(), graph), inputs


def merged(module: fx.GraphModule, inputs: list[Tensor]) -> dict[str, int]:
    """What is left of the graph's operators; its results must be what they were."""
    before = module(*inputs)
    GroupLinears()(module.graph)
    module.graph.lint()
    module.recompile()
    for left, right in zip(module(*inputs), before, strict=True):
        assert torch.equal(left, right)
    return counts(module)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize(
    ("count", "left"),
    [
        (1, {"linear": 1}),
        (2, {"linear_group": 1}),
        (3, {"linear_group": 1}),
        (4, {"linear_group": 1, "linear": 1}),
        (5, {"linear_group": 2}),
    ],
)
def test_up_to_three_linears_of_one_x_become_one_operator(
    count: int, left: dict[str, int], between: bool
) -> None:
    module, inputs = linears([(16 * (n + 1), {}) for n in range(count)], between)
    assert merged(module, inputs) == left


@pytest.mark.parametrize("other", [{7: False}, {4: "pair4:8"}, {3: "bias"}])
def test_a_linear_that_no_launch_takes_with_others_stays_alone(other: dict[int, Any]) -> None:
    module, inputs = linears([(16, {}), (32, {k: v for k, v in other.items() if k != 3}), (16, {})])
    if 3 in other:
        second = [node for node in module.graph.nodes if node.target is LINEAR][1]
        with module.graph.inserting_before(second):
            bias = module.graph.call_function(torch.ones, (32,))
        second.update_arg(3, bias)
        module.recompile()
    if other.get(7) is False:  # in canonical order
        weight = s3.StructuredSparseTensor.from_dense(torch.randn(32, 64), "2:4")
        inputs[3:5] = [weight.packed, weight.indices]
    assert merged(module, inputs) == {"linear_group": 1, "linear": 1}


def test_linears_stay_operators_of_their_own_where_that_is_asked() -> None:
    module, _ = linears([(16, {}), (32, {})])
    GroupLinears(merge=False)(module.graph)
    assert counts(module) == {"linear": 2}
    assert GroupLinears().uuid() != GroupLinears(merge=False).uuid()


def test_the_operator_of_a_group_is_sound() -> None:
    parts = [tiled_parts(rows, 64) for rows in (16, 48)]
    arguments = (
        torch.randn(2, 3, 64), [p for p, _ in parts], [i for _, i in parts], "2:4", [16, 48], True,
    )  # fmt: skip
    torch.library.opcheck(ops.linear_group._opoverload, arguments)
    with pytest.raises(RuntimeError, match=r"the weight torch\.float32; convert one"):
        ops.linear_group(arguments[0].double(), *arguments[1:])
