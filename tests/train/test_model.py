"""Whole models trained under a pattern, and the ordinary life of a training run."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_counter import compiled
from hypothesis import given
from hypothesis import strategies as st
from nets import Net
from torch import Tensor, nn
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor.train.model import metrics, trainer_callback

MODES = ("fixed", "ste", "srste", "soft")


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def sparse_mlp(mode: str, pattern: str = "2:4", seed: int = 0, **options: Any) -> nn.Sequential:
    model = mlp(seed)
    report = s3.sparsify_training_(model, pattern, mode, **options)
    assert [row.action for row in report] == ["parametrized"] * 2
    return model


def batch(seed: int, rows: int = 16) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))


def loss_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (function(x) - x.roll(1, -1)).square().mean()


def sparse(layer: nn.Module) -> s3.S3Sparse:
    return layer.parametrizations.weight[0]  # type: ignore[union-attr,index,return-value]


# sparsify_training_ -----------------------------------------------------------------------------------


def test_each_layer_is_parametrized_or_skipped_with_a_reason() -> None:
    model = Net()
    model.packed = nn.Linear(32, 16)
    s3.sparsify_(model.packed, "rowpair16")
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    report = s3.sparsify_training_(model, "rowpair16", "srste", decay=0.01)
    rows = {row.name: row for row in report}
    assert {name: row.action for name, row in rows.items()} == {
        "up": "parametrized", "down": "parametrized", "odd": "skipped", "lm_head": "skipped",
        "packed": "skipped",
    }  # fmt: skip
    assert "dim 0 has 7" in rows["odd"].reason
    assert rows["lm_head"].reason == "output head"
    assert rows["packed"].reason == "compressed already"
    assert rows["up"].density == 0.5 and rows["odd"].density == 1.0
    assert rows["up"].weights == 64 * 32 and len(report) == 5
    assert "rowpair16, srste" in str(report) and "output head" in str(report)
    for name in ("up", "down"):
        layer = getattr(model, name)
        assert layer.parametrizations.weight.original is before[f"{name}.weight"]
        assert sparse(layer).decay == 0.01 and s3.satisfies(layer.weight, "rowpair16")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in model.parameters() if p.requires_grad)
    again = {row.name: row for row in s3.sparsify_training_(model, "rowpair16")}
    assert again["up"].reason == "parametrized already"


def test_a_filter_chooses_and_a_shared_weight_has_one_mask() -> None:
    report = s3.sparsify_training_(Net(), "2:4", filter_fn=lambda module, name: name == "down")
    assert [row.action for row in report] == ["skipped", "parametrized", "skipped", "skipped"]
    assert next(iter(report)).reason == "left out by the filter"
    report = s3.sparsify_training_(Net(), "2:4", filter_fn=lambda module, name: name == "lm_head")
    assert "shared with embed" in {row.name: row for row in report}["lm_head"].reason
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    assert all(row.action == "skipped" for row in s3.sparsify_training_(model, "2:4"))
    s3.sparsify_training_(model, "2:4", "soft", lambda module, name: True, refresh=2)
    assert sparse(model[0]) is sparse(model[1])
    s3.step(model)
    assert sparse(model[0]).steps == 1  # not once for each module
    last = model[0].weight.detach().clone()
    s3.finalize(model)
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight.to_dense(), last)


@pytest.mark.parametrize("mode", MODES)
def test_conv1d_of_transformers_trains_along_its_inputs(mode: str) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layer = conv1d(16, 32)
    linear = nn.Linear(32, 16)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.t())
        linear.bias.copy_(layer.bias)
    for module in (layer, linear):
        s3.sparsify_training_(module, "pair4:8", mode)
    for seed in range(3):
        for module in (layer, linear):
            module.zero_grad()
            module(batch(seed)).square().sum().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.01 * parameter.grad
            s3.step(module)
    torch.testing.assert_close(layer.weight.t(), linear.weight)
    last, x = layer.weight.detach().clone(), batch(9)
    y = layer(x)
    s3.finalize(layer)
    assert str(layer.weight.pattern) == "pair4:8"  # and not a pattern of the transpose
    assert torch.equal(layer.weight.t().to_dense().t(), last)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["conv2:4", "filter@0.5", "kernel@0.25", "channel@0.5"])
def test_convolutions_train_under_patterns_of_four_dims(pattern: str, mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    )
    report = s3.sparsify_training_(model, pattern, mode)
    assert [row.name for row in report] == ["0", "2"]
    x = torch.randn(4, 8, 6, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        s3.step(model)
        assert s3.satisfies(model[0].weight, pattern) and s3.satisfies(model[2].weight, pattern)
    y = model(x)
    packed = s3.finalize(copy.deepcopy(model))
    assert torch.equal(packed[0].weight.to_dense(), model[0].weight)
    s3.finalize(model)  # leaves convolutions dense: a compressed one has no product
    assert torch.equal(model(x), y)


def test_refusals_name_the_model_or_the_layer_and_change_nothing() -> None:
    with pytest.raises(s3.ModelError, match="ReLU has no Linear layers for 2:4"):
        s3.sparsify_training_(nn.ReLU(), "2:4")
    with pytest.raises(s3.ModelError, match="Sequential has no Conv2d layers for conv2:4"):
        s3.sparsify_training_(mlp(), "conv2:4")
    with pytest.raises(TypeError, match="takes no transposed"):
        s3.sparsify_training_(mlp(), "2:4", transposed=True)
    model = mlp()
    for options, error in (
        ({"refresh": 0}, ValueError),
        ({"mode": "sparse"}, ValueError),
        ({"schedule": s3.Density(end=0.25)}, s3.PatternError),
        ({"pattern": "2-4"}, s3.PatternError),
    ):
        with pytest.raises(error):
            s3.sparsify_training_(model, **{"pattern": "2:4", **options})
        assert not parametrize.is_parametrized(model[0])
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(s3.NonFiniteError, match=r"2: .* nothing was changed"):
        s3.sparsify_training_(model, "2:4")
    assert not parametrize.is_parametrized(model[0])
    for function in (s3.step, s3.freeze, metrics):
        with pytest.raises(s3.ModelError, match="has no S3Sparse"):
            function(model)


def test_a_weight_that_diverged_is_named_by_step() -> None:
    model = sparse_mlp("ste", refresh=2)
    with torch.no_grad():
        model[2].parametrizations.weight.original[0, 0] = torch.inf
    s3.step(model)
    with pytest.raises(s3.NonFiniteError, match=r"2\.weight: .* NaN or Inf"):
        s3.step(model)


def test_metrics_are_by_weight() -> None:
    model = sparse_mlp("ste", refresh=1)
    assert metrics(model) == {"0.weight": {"density": 0.5}, "2.weight": {"density": 0.5}}
    s3.step(model)
    s3.step(model)
    assert metrics(model)["2.weight"] == {"density": 0.5, "flip_rate": 0.0}


# laws of a run ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*was never called")  # where there are no steps
@given(
    st.sampled_from(MODES),
    st.sampled_from(("2:4", "rowpair16", "coupled2:4", "unstructured@0.3")),
    st.sampled_from((torch.optim.SGD, torch.optim.AdamW)),
    st.integers(0, 4),
    st.integers(1, 3),
)
def test_after_any_number_of_steps_the_weights_satisfy_the_pattern_and_finalize_keeps_them(
    mode: str, pattern: str, kind: type[torch.optim.Optimizer], steps: int, refresh: int
) -> None:
    model = sparse_mlp(mode, pattern, **({"refresh": refresh} if mode != "fixed" else {}))
    zeros = [model[i].weight == 0 for i in (0, 2)]
    optimizer = kind(model.parameters(), lr=0.1)
    for count in range(steps):
        loss_of(model, batch(count)).backward()
        optimizer.step()
        optimizer.zero_grad()
        s3.step(model)
        for i, start in zip((0, 2), zeros, strict=True):
            assert s3.satisfies(model[i].weight, pattern)
            if mode == "fixed":
                assert not bool(model[i].weight[start].any())
    x = batch(99)
    with torch.no_grad():
        y = model(x)
        last = [model[i].weight.clone() for i in (0, 2)]
        s3.finalize(model)
    for i, weight in zip((0, 2), last, strict=True):
        assert torch.equal(model[i].weight.to_dense(), weight)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("mode", MODES)
def test_training_lowers_the_loss(mode: str) -> None:
    model = sparse_mlp(mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for count in range(60):
        loss = loss_of(model, batch(count))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# ordinary life ----------------------------------------------------------------------------------------


def run(
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    steps: int = 6,
    optimizer: torch.optim.Optimizer | None = None,
    first: int = 0,
) -> list[float]:
    """Losses of a plain loop, and the model trained."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for count in range(first, first + steps):
        loss = loss_of(function, batch(count))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        s3.step(model)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("held", [False, True])
def test_compiled_training_is_the_eager_one_in_one_graph(mode: str, held: bool) -> None:
    options = {"refresh": 2, "schedule": s3.Density(steps=4)} if held and mode != "fixed" else {}
    eager = sparse_mlp(mode, **options)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    call, counter = compiled(model)
    torch.testing.assert_close(run(model, call), run(eager, eager))
    for left, right in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(right, left)
    assert counter.frame_count == 1  # masks and beta change in place: nothing is compiled again


def test_a_frozen_mask_compiles_whichever_way_it_was_frozen() -> None:
    for by_model in (True, False):
        model = sparse_mlp("ste")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        before = compiled(batch(0))
        if by_model:
            s3.freeze(model)
        else:
            sparse(model[0]).freeze()
            sparse(model[2]).freeze()
        assert torch.equal(compiled(batch(0)), before)
        assert sparse(model[0]).mask is not None
        assert torch.equal(compiled(batch(0)), before)


@pytest.mark.parametrize("mode", MODES)
def test_autocast_rounds_the_weight_in_use_and_trains_the_float32_original(mode: str) -> None:
    model = sparse_mlp(mode)
    x = batch(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model[0](x)
        assert model[0].weight.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    rounded = model[0].weight.bfloat16(), model[0].bias.bfloat16()
    torch.testing.assert_close(y, nn.functional.linear(x.bfloat16(), *rounded))
    y.float().square().sum().backward()
    assert model[0].parametrizations.weight.original.grad.dtype == torch.float32
    packed = s3.finalize(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(packed[0](x), y)


@pytest.mark.parametrize("mode", ["fixed", "ste", "soft"])
def test_accumulated_gradients_are_those_of_the_whole_batch(mode: str) -> None:
    model, parts = sparse_mlp(mode), sparse_mlp(mode)
    x = batch(0, 16)
    loss_of(model, x).backward()
    for piece in x.chunk(4):
        (loss_of(parts, piece) / 4).backward()
    for left, right in zip(model.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad)


def test_srste_adds_its_decay_with_each_accumulated_pass() -> None:
    model, parts = sparse_mlp("srste", decay=0.4), sparse_mlp("srste", decay=0.1)
    x = batch(0, 16)
    loss_of(model, x).backward()
    for piece in x.chunk(4):
        (loss_of(parts, piece) / 4).backward()
    for left, right in zip(model.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad)


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_scaler_changes_nothing_if_the_decay_is_scaled(mode: str) -> None:
    scale = 2.0**10
    plain = sparse_mlp(mode, **({"decay": 0.1} if mode == "srste" else {}))
    scaled = sparse_mlp(mode, **({"decay": 0.1 * scale} if mode == "srste" else {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run(plain, plain, 3, torch.optim.SGD(plain.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    for count in range(3):
        scaler.scale(loss_of(scaled, batch(count))).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        s3.step(scaled)
    for left, right in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(right, left)


def test_a_score_of_movement_sees_the_gradient_at_each_step() -> None:
    seen = []

    def movement(weight: Tensor, module: s3.S3Sparse) -> Tensor:
        seen.append(weight.grad is not None)
        return weight.abs() if weight.grad is None else -weight * weight.grad

    model = sparse_mlp("ste", score=movement)
    loss_of(model, batch(0)).backward()
    s3.step(model)
    assert seen == [False, False, True, True]  # two layers: at registration, then at the step
    original = model[0].parametrizations.weight.original
    expected = s3.project(original, "2:4", -original.detach() * original.grad)
    assert torch.equal(sparse(model[0]).mask, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", ["2:4", "rowpair16", "unstructured@0.3"])
def test_a_gpu_has_the_gradients_of_the_cpu_compiled_too(mode: str, pattern: str) -> None:
    model = sparse_mlp(mode, pattern)
    on_gpu = copy.deepcopy(model).cuda()
    compiled = torch.compile(on_gpu, fullgraph=True)
    loss_of(model, batch(0)).backward()
    loss_of(compiled, batch(0).cuda()).backward()
    for left, right in zip(model.parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(right.grad.cpu(), left.grad, rtol=1e-3, atol=1e-5)
    optimizer = torch.optim.AdamW(on_gpu.parameters(), lr=0.01, fused=True)
    for count in range(3):
        loss_of(compiled, batch(count).cuda()).backward()
        optimizer.step()
        optimizer.zero_grad()
        s3.step(on_gpu)
        assert s3.satisfies(on_gpu[0].weight, pattern)
    last = on_gpu[0].weight.detach().clone()
    s3.finalize(on_gpu)
    assert torch.equal(on_gpu[0].weight.to_dense(), last)


@pytest.mark.parametrize("mode", MODES)
def test_clipping_sees_the_gradient_that_the_optimizer_takes(mode: str) -> None:
    model = sparse_mlp(mode)
    loss_of(model, batch(0)).backward()
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(norm, before.norm())
    torch.testing.assert_close(after, before * (1e-3 / (norm + 1e-6)))


@pytest.mark.parametrize("mode", MODES)
def test_fused_and_foreach_optimizers_train_as_the_plain_one(mode: str) -> None:
    trained = []
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        model = sparse_mlp(mode)
        run(model, model, 5, torch.optim.AdamW(model.parameters(), lr=0.01, **options))
        trained.append([p.detach() for p in model.parameters()])
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_an_average_of_weights_satisfies_the_pattern_and_trains_apart(mode: str) -> None:
    model = sparse_mlp(mode)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    expected = [p.detach().clone() for p in model.parameters()]
    run(model, model, 1)
    average.update_parameters(model)  # the first one copies
    run(model, model, 3, first=1)
    average.update_parameters(model)
    for i in (0, 2):
        assert s3.satisfies(average.module[i].weight, "2:4")
    assert not torch.equal(next(average.parameters()), expected[0])
    assert not torch.equal(next(average.parameters()), next(model.parameters()))
    s3.finalize(average.module)
    run(model, model, 1)  # the copy's end is not the model's
    assert parametrize.is_parametrized(model[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_resumes_with_equal_losses(mode: str) -> None:
    options = {} if mode == "fixed" else {"refresh": 3, "schedule": s3.Density(steps=8)}

    def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sparse_mlp(mode, "1:8", seed, **options)
        return model, torch.optim.AdamW(model.parameters(), lr=0.02)

    model, optimizer = start(0)
    whole = run(model, model, 12, optimizer)
    model, optimizer = start(0)
    losses = run(model, model, 7, optimizer)
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    buffer.seek(0)
    model, optimizer = start(1)
    for target, state in zip(
        (model, optimizer), torch.load(buffer, weights_only=True), strict=True
    ):
        target.load_state_dict(state)
    assert losses + run(model, model, 5, optimizer, first=7) == whole


@pytest.mark.parametrize("mode", MODES)
def test_functional_call_and_per_sample_gradients(mode: str) -> None:
    model = sparse_mlp(mode, **({"decay": 0.0} if mode == "srste" else {}))
    x = batch(0, 4)
    parameters = dict(model.named_parameters())
    loss_of(model, x).backward()

    def loss(given: dict[str, Tensor], rows: Tensor) -> Tensor:
        return loss_of(lambda z: torch.func.functional_call(model, given, (z,)), rows)

    whole = torch.func.grad(loss)(parameters, x)
    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for name, parameter in parameters.items():
        torch.testing.assert_close(whole[name], parameter.grad)
        torch.testing.assert_close(samples[name].mean(0), parameter.grad)
    if mode != "fixed":
        stack = {name: torch.stack([p, p]) for name, p in parameters.items()}
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.func.vmap(loss, in_dims=(0, None))(stack, x)


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_activations_give_the_same_gradients(mode: str) -> None:
    model, again = sparse_mlp(mode), sparse_mlp(mode)
    x = batch(0)
    loss_of(model, x).backward()
    loss_of(
        lambda z: torch.utils.checkpoint.checkpoint(again, z, use_reentrant=False), x
    ).backward()
    for left, right in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(right.grad, left.grad)


DDP = """
    import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
    from torch import nn
    import s3tensor as s3

    MODES = {
        "fixed": {}, "ste": {}, "srste": {"refresh": 2, "decay": 0.01},
        "soft": {"schedule": s3.Density(steps=3)},
    }

    def train(model, wrapped, rows):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))[rows]
            (wrapped(x) - x.roll(1, -1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            s3.step(model)

    def build(mode, options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        s3.sparsify_training_(model, "2:4", mode, **options)
        return model

    def worker(rank, file):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
        for mode, options in MODES.items():
            model, alone = build(mode, options), build(mode, options)
            wrapped = nn.parallel.DistributedDataParallel(model)
            train(model, wrapped, slice(4 * rank, 4 * rank + 4))
            train(alone, alone, slice(0, 8))
            for left, right in zip(model.parameters(), alone.parameters()):
                torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
            for layer in (model[0], model[2]):
                weight = layer.weight.detach()
                other = [torch.empty_like(weight) for _ in range(2)]
                dist.all_gather(other, weight)
                assert torch.equal(other[0], other[1]) and s3.satisfies(weight, "2:4")
        dist.destroy_process_group()

    if __name__ == "__main__":
        mp.spawn(worker, (sys.argv[1],), nprocs=2)
        print("equal")
"""


def test_two_ranks_train_as_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(textwrap.dedent(DDP), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"


def test_the_trainer_of_transformers_steps_after_each_optimizer_step(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.body, x)}

    model = Model()
    s3.sparsify_training_(model, "2:4", refresh=2, schedule=s3.Density(steps=3))
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, report_to=[],
        gradient_accumulation_steps=2, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"x": row} for row in batch(0, 64)]
    transformers.Trainer(model, args, train_dataset=data, callbacks=[trainer_callback()]).train()
    assert sparse(model.body[0]).steps == 5  # of the optimizer, not of its 10 passes
    last = model.body[0].weight.detach().clone()
    s3.finalize(model)
    assert torch.equal(model.body[0].weight.to_dense(), last)


def test_the_example_prints_every_method_under_every_pattern(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "training.py"
    arguments = ["--task", "digits", "--steps", "4", "--seeds", "1", "--pattern", "1:4"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if "±" in line]
    assert rows == ["dense", "one-shot", *MODES]
