"""Options for torch.compile: linears of one input become neighbours and results stay."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import s3tensor as s3
from s3tensor import ops
from s3tensor.inductor import GroupLinears, inductor_options

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
