"""``CompressedLinear``: compiled it gives what its weight says now, whatever was done to the weight."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import s3tensor as s3
from s3tensor.model.linear import CompressedLinear

SIZE = 32


def layer(seed: int = 0, pattern: str = "2:4", bias: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Linear(SIZE, SIZE, bias=bias)
    s3.sparsify_(model, pattern)
    return model


def expected(model: Any, x: Tensor) -> Tensor:
    weight = model.weight
    dense = weight.to_dense() if isinstance(weight, s3.StructuredSparseTensor) else weight
    return F.linear(x, dense, model.bias)


def graphs() -> tuple[list[list[str]], Callable[..., Any]]:
    """The operators of each graph that is compiled, and the backend that notes them."""
    seen: list[list[str]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        assert not any(isinstance(value, s3.StructuredSparseTensor) for value in inputs)
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    return seen, backend


def test_what_compresses_makes_a_linear_compressed_and_still_a_linear() -> None:
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE))
    s3.sparsify_(model, "2:4")
    assert [type(part) for part in model] == [CompressedLinear, nn.ReLU, CompressedLinear]
    assert all(isinstance(part, nn.Linear) for part in model if hasattr(part, "weight"))
    assert isinstance(model[0].weight, s3.StructuredSparseTensor)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not list(model.buffers())


def test_a_subclass_of_linear_and_a_patched_forward_stay_what_they_are() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    own = nn.Sequential(Own(SIZE, SIZE))
    s3.sparsify_(own, "2:4")
    assert type(own[0]) is Own
    patched = nn.Sequential(nn.Linear(SIZE, SIZE))
    patched[0].forward = lambda x: x * 2
    s3.sparsify_(patched, "2:4")
    x = torch.randn(3, SIZE)
    assert torch.equal(patched(x), 2 * x)


@pytest.mark.parametrize("values", ["float", "int8"])
def test_a_compiled_model_takes_plain_tensors_and_one_operator_a_layer(values: str) -> None:
    model = nn.Sequential(layer(0), layer(1, "1:4"), layer(2, "rowpair16", bias=False))
    if values == "int8":
        s3.quantize_(model)
    seen, backend = graphs()
    torch._dynamo.reset()
    x = torch.randn(5, SIZE)
    assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    assert seen == [["s3tensor.frozen_linear"] * 3]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "copy_": lambda m: m.weight.data.copy_(layer(7).weight) and m,
    "load_state_dict": lambda m: m.load_state_dict(layer(3).state_dict()) and m,
    "load_state_dict, assign": lambda m: (
        m.load_state_dict(layer(4).state_dict(), assign=True) and m
    ),
    "to float64": lambda m: m.double(),
    "to float32": lambda m: m.float(),
    "deepcopy": copy.deepcopy,
    "set_memory_ fast": lambda m: s3.set_memory_(m, "fast", (1, 8)) and m,
    "set_memory_ lean": lambda m: s3.set_memory_(m, "lean") and m,
    "another pattern": lambda m: (
        m.__setattr__("weight", layer(5, "1:4").weight.to(m.weight.dtype)) or m
    ),
    "a dict's entry": lambda m: (
        m._parameters.update(
            weight=nn.Parameter(layer(6).weight.to(m.weight.dtype), requires_grad=False)
        )
        or m
    ),
    "data": lambda m: setattr(m.weight, "data", layer(8).weight.to(m.weight.dtype)) or m,
    "dense": lambda m: (
        m.__setattr__(
            "weight",
            nn.Parameter(torch.randn(SIZE, SIZE, dtype=m.weight.dtype), requires_grad=False),
        )
        or m
    ),
    "swapped": lambda m: (
        torch.utils.swap_tensors(
            m.weight, nn.Parameter(layer(9).weight.to(m.weight.dtype), requires_grad=False)
        )
        or m
    ),
    "pickled": lambda m: torch.load(_saved(m), weights_only=False),
}


def _saved(module: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=4))
def test_a_compiled_layer_follows_every_change_of_its_weight(changes: list[str]) -> None:
    torch._dynamo.reset()
    model: Any = layer()
    x = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    for change in changes:
        try:
            changed = CHANGES[change](model)
        except (s3.S3Error, RuntimeError):
            changed = model  # refused; the weight is what it was
        if changed is not model:
            model = changed
            compiled = torch.compile(model, backend="eager")
        given = x.to(model.weight.dtype)
        assert torch.equal(compiled(given), model(given)), change
        torch.testing.assert_close(compiled(given), expected(model, given))


def test_functional_call_counts_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    model, other = layer(0), layer(1)
    x = torch.randn(3, SIZE)

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,))

    for one in (model, other):
        found = torch.compile(call, backend="eager")(dict(one.named_parameters()), x)
        torch.testing.assert_close(found, expected(one, x))


def test_gradients_of_x_and_the_bias_are_those_of_a_dense_layer() -> None:
    torch._dynamo.reset()
    model: Any = layer().double()
    model.bias.requires_grad_()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, SIZE, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(compiled(x).sin().sum(), (x, model.bias))
    dense = F.linear(x, model.weight.to_dense(), model.bias)
    for mine, other in zip(
        found, torch.autograd.grad(dense.sin().sum(), (x, model.bias)), strict=True
    ):
        torch.testing.assert_close(mine, other)


TRANSFORMS: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).sin().sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(lambda a: f(a).sin(), (x,), (x + 1,))[1],
    "vmap": lambda f: torch.func.vmap(lambda x: f(x).sin()),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sin().sum())),
    "jacrev": lambda f: torch.func.jacrev(lambda x: f(x).sin().sum(0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_torch_func_are_right_when_compiled(name: str) -> None:
    torch._dynamo.reset()
    model: Any = layer().double().requires_grad_(False)
    dense = nn.Linear(SIZE, SIZE).double().requires_grad_(False)
    dense.load_state_dict({"weight": model.weight.to_dense(), "bias": model.bias})
    x = torch.randn(4, SIZE, dtype=torch.float64)
    found = torch.compile(lambda x: TRANSFORMS[name](model)(x), backend="eager")(x)
    torch.testing.assert_close(found, TRANSFORMS[name](dense)(x))


def test_autocast_counts_in_a_compiled_layer() -> None:
    torch._dynamo.reset()
    model = layer()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, SIZE)
    compiled(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == model(x).dtype == torch.bfloat16
        assert torch.equal(compiled(x), model(x))
