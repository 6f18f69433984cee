"""Inference mode changes no result and refuses nothing that works outside of it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s3tensor.errors import UnsupportedOpError
from s3tensor.tensor import Int8SparseTensor, StructuredSparseTensor


def weights() -> dict[str, Tensor]:
    dense = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight = StructuredSparseTensor.from_dense(dense, "2:4")
    return {"values": weight, "int8": Int8SparseTensor.from_sparse(weight)}


def module(weight: Tensor) -> nn.Module:
    layer = nn.Linear(64, 32, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def saved(weight: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    loaded: Tensor = torch.load(file)
    return loaded


def loaded(weight: Tensor) -> Tensor:
    target = module(weight.clone())
    target.load_state_dict(module(weight).state_dict())
    return target.get_parameter("weight")


USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "linear": lambda x, w: F.linear(x, w),
    "x @ w.t()": lambda x, w: x @ w.t(),
    "x @ w.mT": lambda x, w: x[None] @ w.mT,
    "x @ w.T": lambda x, w: x[0] @ w.T,
    "w @ x": lambda x, w: w @ x.t(),
    "mv": lambda x, w: torch.mv(w, x[0]),
    "addmm": lambda x, w: torch.addmm(x[0, :32], x, w.t()),
    "half": lambda x, w: w.half(),
    "to dtype": lambda x, w: w.to(torch.bfloat16),
    "to cpu": lambda x, w: w.to("cpu", copy=True),
    "cpu": lambda x, w: w.cpu(),
    "detach": lambda x, w: w.detach(),
    "clone": lambda x, w: w.clone(),
    "contiguous": lambda x, w: w.contiguous(),
    "deepcopy": lambda x, w: copy.deepcopy(w),
    "save": lambda x, w: saved(w),
    "state_dict": lambda x, w: loaded(w),
    "module.half": lambda x, w: module(w).half()(x.half()),
    "module.to": lambda x, w: module(w).to("cpu", torch.bfloat16).get_parameter("weight"),
}


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("kind", ["values", "int8"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_use_gives_what_it_gives_outside(
    use: Callable[[Tensor, Tensor], Any], kind: str, made_inside: bool
) -> None:
    weight, x = weights()[kind], torch.randn(3, 64)
    expected = use(x, weight.clone())
    with torch.inference_mode():
        found = use(x, weight.clone() if made_inside else weight)
        assert type(found) is type(expected) and found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["values", "int8"])
def test_nothing_densifies(kind: str) -> None:
    weight = weights()[kind]
    uses: list[Callable[[], Tensor]] = [
        lambda: weight * 2, lambda: weight.sum(), lambda: weight.reshape(-1),
        lambda: torch.relu(weight),
        lambda: torch.einsum("bi,oi->bo", torch.ones(3, 64), weight),
    ]  # fmt: skip
    with torch.inference_mode():
        for use in uses:
            with pytest.raises(UnsupportedOpError):
                use()


def test_a_view_of_a_normal_weight_is_normal_and_trains_afterwards() -> None:
    weight = weights()["values"]
    with torch.inference_mode():
        views = weight.t(), weight.detach(), weight.mT
    for view in views:
        assert not view.is_inference()
    leaf = weight.detach().requires_grad_()
    F.linear(torch.ones(3, 64), leaf).sum().backward()
    assert isinstance(leaf.grad, StructuredSparseTensor)
