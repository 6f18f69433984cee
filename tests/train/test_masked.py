"""Masks and thresholds that a compiler fuses are those of project and shrink; nothing waits for a GPU."""

from __future__ import annotations

import copy
import itertools
import os
import re
import shutil
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor.mask.projection import run_length
from s3tensor.train.masked import ranked, shrink, shrink_run

MODES = ("fixed", "ste", "srste", "soft")


def layer_of(mode: str, pattern: str = "2:4", **options: Any) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=False)
    parametrize.register_parametrization(layer, "weight", s3.S3Sparse(pattern, mode, **options))
    return layer


@given(
    st.sampled_from(["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "3:16"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(1, 9),
    st.integers(0, 999),
)
def test_a_fused_mask_is_that_of_project_ties_included(
    pattern: str, dtype: torch.dtype, largest: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-largest, largest + 1, (4, 32), generator=generator).to(dtype)
    bound = s3.Pattern.parse(pattern).bind(weight.shape)
    run = run_length(bound)
    assert run == bound.blocks_per_scope
    mask = ranked(weight, run, bound.keep)
    assert torch.equal(mask, s3.project(weight, pattern))
    short = shrink_run(weight, mask, run)
    torch.testing.assert_close(short, shrink(weight, mask, pattern), rtol=1e-2, atol=0)
    assert not bool(torch.signbit(short[short == 0]).any())
    if run == 4:
        assert torch.equal(shrink_run(weight, mask, run, bound.keep), short)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("run", [4, 8])
def test_a_fused_mask_keeps_nan_and_infinity_and_no_more_than_it_may(
    dtype: torch.dtype, keep: int, run: int
) -> None:
    values = [1.0, -2.0, 0.0, float("nan"), -float("inf"), float("inf"), -float("nan")]
    weight = torch.tensor(list(itertools.product(values, repeat=4)), dtype=dtype)
    weight = weight[: len(weight) // 8 * 8].reshape(-1, run)
    mask = ranked(weight, run, keep)
    assert bool((mask.sum(-1) == keep).all())
    magnitude = torch.where(weight.isnan(), 1e9, weight.abs().double().clamp(max=1e8))
    least = torch.where(mask, magnitude, torch.inf).amin(-1)
    assert bool((least >= torch.where(mask, 0, magnitude).amax(-1)).all())


@pytest.mark.parametrize("pattern", ["pair4:8", "coupled2:4", "rowpair16", "4:32"])
def test_other_patterns_have_no_run(pattern: str) -> None:
    assert run_length(s3.Pattern.parse(pattern).bind((32, 64))) == 0


@given(st.integers(0, 999))
def test_the_soft_threshold_of_a_run_is_that_of_its_definition(seed: int) -> None:
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = s3.project(weight, "2:4")
    third = weight.abs().reshape(-1, 4).sort(-1).values[:, 1:2]
    expected = weight.reshape(-1, 4).sign() * (weight.abs().reshape(-1, 4) - third).clamp(min=0)
    torch.testing.assert_close(shrink_run(weight, mask, 4), expected.reshape(8, 16))
    torch.testing.assert_close(shrink(weight, mask, "2:4"), expected.reshape(8, 16))


def graphs(layer: nn.Module, x: Tensor) -> list[str]:
    """What the forward and the backward graph of a compiled layer call."""
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    compiled(x).square().sum().backward()
    return seen


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step_of_2_of_4_is_operators_that_fuse(mode: str) -> None:
    calls = graphs(layer_of(mode), torch.randn(3, 32))
    assert any("aten.where" in call for call in calls)
    assert not [call for call in calls if "s3tensor" in call]


def test_a_compiled_step_of_other_patterns_takes_the_mask_in_one_operator() -> None:
    calls = graphs(layer_of("ste", "rowpair16"), torch.randn(3, 32))
    assert [call for call in calls if "s3tensor" in call] == ["s3tensor.project.default"]


def test_nan_is_refused_by_step_and_reaches_the_loss_of_a_compiled_forward() -> None:
    layer = layer_of("ste")
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0] = float("nan")
    assert bool(compiled(torch.ones(1, 32)).isnan().any())
    with pytest.raises(s3.NonFiniteError, match="weight"):
        s3.step(layer)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None,
    reason="Inductor needs a C++ compiler on the CPU",
)
@pytest.mark.parametrize("mode", ["ste", "soft"])
def test_nothing_of_the_mask_is_written_by_a_compiled_forward(mode: str) -> None:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    weight = layer_of(mode).parametrizations.weight
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        call = torch.compile(lambda: weight().to(torch.bfloat16), fullgraph=True)
        used, (code,) = run_and_get_code(call)
    assert torch.equal(used, weight().to(torch.bfloat16))
    assert len(re.findall(r"empty_strided\w*\(", code.partition("def call")[2])) == 1


# on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("held", [False, True])
def test_a_forward_and_a_backward_never_wait_for_the_gpu(mode: str, held: bool) -> None:
    layer = layer_of(mode, **({"refresh": 4} if held and mode != "fixed" else {})).cuda()
    x = torch.randn(64, 32, device="cuda")
    layer(x).square().sum().backward()  # kernels are compiled
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_inductor_fuses_what_the_eager_step_computes(mode: str) -> None:
    eager = layer_of(mode).cuda()
    layer = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(64, 32, device="cuda")
    for call in (eager, compiled):
        with torch.autocast("cuda", torch.bfloat16):
            y = call(x)
        y.float().square().sum().backward()
    left, right = (each.parametrizations.weight.original.grad for each in (eager, layer))
    torch.testing.assert_close(right, left, rtol=2e-2, atol=2e-2 * float(left.abs().max()))


@pytest.mark.gpu
def test_masks_and_losses_of_a_gpu_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    assert torch.equal(s3.transposable(weight.cuda()).cpu(), s3.transposable(weight))
    student, teacher = torch.randn(2, 9, 300), torch.randn(2, 9, 300)
    loss = s3.distillation_loss(student.cuda(), teacher.cuda(), temperature=2.0)
    torch.testing.assert_close(loss.cpu(), s3.distillation_loss(student, teacher, temperature=2.0))
    models = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        rows, columns = ((1, -1), (-1, 1))
        blocks = s3.BlockCoupling(
            [s3.BlockSpec(model[0].weight, rows), s3.BlockSpec(model[2].weight, columns)],
            orders=[(0, 1), (1, 0)],
        )
        s3.sparsify_training_(model, s3.ScopeSpec(blocks, (-1, 1)), keep=0.5)
        model.to(device)
        model(torch.ones(4, 32, device=device)).square().sum().backward()
        torch.optim.SGD(model.parameters(), 0.01).step()
        s3.step(model)
        s3.finalize(model)
        models.append(model.cpu())
    for i in (0, 2):
        left, right = (model[i].weight for model in models)
        assert torch.equal(left.mask(), right.mask())
