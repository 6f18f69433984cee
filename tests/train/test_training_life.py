"""What training meets in ordinary life: other people's checkpoints, EMA copies, odd modules, failures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor.model.units import units
from s3tensor.train import model as training


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def under(pattern: str = "2:4", mode: str = "ste", **options: Any) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    parametrize.register_parametrization(layer, "weight", s3.S3Sparse(pattern, mode, **options))
    return layer


# state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"mode": "fixed"}, {"refresh": 10}, {"mode": "soft", "refresh": 2}]
)
def test_a_checkpoint_of_the_middle_of_a_schedule_is_refused_where_no_schedule_would_end_it(
    options: dict[str, Any],
) -> None:
    halfway = under(schedule=s3.Density(1.0, steps=100))
    layer = under(**options)
    before = layer.parametrizations.weight[0].mask.clone()
    state = halfway.state_dict()
    if options.get("mode") == "soft":
        state["parametrizations.weight.0.beta"] = torch.tensor(1.0)
    with pytest.raises(RuntimeError, match=r"weight: the mask keeps 4 blocks .* which keeps 2"):
        layer.load_state_dict(state)
    assert torch.equal(layer.parametrizations.weight[0].mask, before)
    same = under(schedule=s3.Density(1.0, steps=100))
    same.load_state_dict(halfway.state_dict())  # the schedule goes on


@pytest.mark.parametrize("strict", [True, False])
def test_a_mask_that_breaks_the_pattern_is_refused_with_the_name_of_the_weight(
    strict: bool,
) -> None:
    model = mlp()
    s3.sparsify_training_(model, "2:4", "fixed")
    state = model.state_dict()
    name = "2.parametrizations.weight.0.mask"
    state[name] = torch.ones_like(state[name])
    with pytest.raises(RuntimeError, match=r"2\.weight: the mask keeps 4 blocks"):
        model.load_state_dict(state, strict=strict)
    del state["2.parametrizations.weight.0._extra_state"]
    with pytest.raises(RuntimeError, match=r"2\.weight: the mask keeps 4 blocks"):
        model.load_state_dict(state, strict=False)


def test_a_mask_of_a_coupled_weight_is_checked_too() -> None:
    model = mlp()
    blocks = s3.BlockCoupling(
        [s3.BlockSpec(model[0].weight, (1, 1)), s3.BlockSpec(model[2].weight, (1, 1))]
    )
    s3.sparsify_training_(model, s3.ScopeSpec(blocks, (1, 4)), keep=2)
    state = model.state_dict()
    name = "0.parametrizations.weight.0.mask"
    state[name] = torch.ones_like(state[name])
    with pytest.raises(RuntimeError, match=r"0\.weight: the mask is not one of"):
        model.load_state_dict(state)


# copies -----------------------------------------------------------------------------------------------


def test_the_average_of_a_scheduled_run_can_be_finalized() -> None:
    model = mlp()
    s3.sparsify_training_(model, "2:4", schedule=s3.Density(1.0, steps=3))
    average = torch.optim.swa_utils.AveragedModel(model)
    early = copy.deepcopy(average.module)
    for _ in range(4):
        s3.step(model)
        average.update_parameters(model)
    s3.finalize(average.module)
    assert s3.satisfies(average.module[0].weight.to_dense(), "2:4")
    with pytest.raises(s3.ModelError, match="density schedule is at 1 after 0 of 3 steps"):
        s3.finalize(early)


def test_a_copy_takes_masks_and_counts_by_a_part_of_the_state_dict() -> None:
    """The recipe of docs/training.md for an average that is made before ``freeze``."""
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32))
    s3.sparsify_training_(model, "2:4")
    average = torch.optim.swa_utils.AveragedModel(model)
    s3.freeze(model)
    masks = {k: v for k, v in model.state_dict().items() if ".mask" in k or "_extra_state" in k}
    average.module.load_state_dict(masks, strict=False)
    average.update_parameters(model)
    sparse = average.module[0].parametrizations.weight[0]
    assert sparse.frozen and torch.equal(sparse.mask, model[0].parametrizations.weight[0].mask)


# modules ----------------------------------------------------------------------------------------------


def test_finalize_leaves_dense_what_has_no_compressed_product() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 8))
    s3.sparsify_training_(net, "conv2:4")
    s3.sparsify_training_(net, "2:4")
    x = torch.randn(2, 8, 8, 8)
    before = net(x)
    s3.finalize(net)
    assert type(net[0].weight) is nn.Parameter and s3.satisfies(net[0].weight, "conv2:4")
    assert isinstance(net[2].weight, s3.StructuredSparseTensor)
    torch.testing.assert_close(net(x), before)


@pytest.mark.parametrize("name", ["embedding", "attention", "lstm"])
def test_a_finalized_module_of_torch_still_runs(name: str) -> None:
    module, parameter, inputs = {
        "embedding": (nn.Embedding(16, 32), "weight", (torch.tensor([1, 3]),)),
        "attention": (nn.MultiheadAttention(32, 2), "in_proj_weight", 3 * (torch.randn(4, 1, 32),)),
        "lstm": (nn.LSTM(32, 16), "weight_ih_l0", (torch.randn(4, 1, 32),)),
    }[name]
    parametrize.register_parametrization(module, parameter, s3.S3Sparse("2:4"))
    module(*inputs)
    s3.finalize(module)
    module(*inputs)
    assert s3.satisfies(getattr(module, parameter), "2:4")


def test_weight_norm_in_front_of_a_pattern_trains_and_finalizes() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(32, 16))
    parametrize.register_parametrization(layer, "weight", s3.S3Sparse("2:4", refresh=2))
    for _ in range(2):
        layer(torch.randn(3, 32)).sum().backward()
        s3.step(layer)
    last = layer.weight.detach().clone()
    s3.finalize(layer)
    assert torch.equal(layer.weight.to_dense(), last)


def test_one_held_s3sparse_on_two_weights_is_refused() -> None:
    model, shared = mlp(), s3.S3Sparse("2:4", refresh=2)
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", shared)
    for use in (s3.step, s3.freeze, training.metrics, s3.finalize):
        with pytest.raises(s3.ModelError, match=r"0\.weight and 2\.weight have one S3Sparse"):
            use(model)


def test_two_patterns_on_one_weight_are_refused() -> None:
    layer = under()
    parametrize.register_parametrization(layer, "weight", s3.S3Sparse("2:4"))
    with pytest.raises(s3.PatternError, match="is under 2 S3Sparse"):
        s3.step(layer)


@pytest.mark.parametrize("mode", ["fixed", "ste", "srste", "soft"])
def test_a_model_on_the_meta_device_is_prepared_and_then_loaded(mode: str) -> None:
    model = mlp()
    s3.sparsify_training_(model, "2:4", mode, **({} if mode == "fixed" else {"refresh": 2}))
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    s3.sparsify_training_(other, "2:4", mode, **({} if mode == "fixed" else {"refresh": 2}))
    other.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(3, 32)
    assert torch.equal(other(x), model(x))


ON_META: list[dict[str, Any]] = [
    {"mode": "fixed"},
    {"refresh": 10},
    {"mode": "srste", "schedule": s3.Density(steps=4)},
    {"score": lambda weight, sparse: weight.abs()},
    {"mode": "soft"},
    {"mode": "soft", "refresh": 2},
    {"transposable": True, "refresh": 2},
]


@pytest.mark.parametrize("options", ON_META, ids=lambda options: ", ".join(options))
def test_a_model_prepared_on_meta_and_then_materialised_is_the_one_prepared_with_its_weights(
    options: dict[str, Any],
) -> None:
    def prepared(device: str) -> nn.Module:
        with torch.device(device):
            model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        if device == "cpu":
            model.load_state_dict(dense)
        s3.sparsify_training_(model, "2:4", **options)
        return model

    dense = mlp().state_dict()
    expected, model = prepared("cpu"), prepared("meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in dense.items():
            place, _, attribute = name.rpartition(".")
            layer = model.get_submodule(place)
            if attribute == "weight":
                layer.parametrizations.weight.original.copy_(value)
            else:
                layer.bias.copy_(value)
    x = torch.randn(3, 32)
    assert torch.equal(model(x), expected(x))
    for each in (model, expected):
        s3.step(each)
    assert torch.equal(model(x), expected(x))
    for mine, other in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("options", [{"mode": "fixed"}, {"mode": "soft", "refresh": 2}], ids=str)
def test_a_state_dict_fills_what_left_the_meta_device(options: dict[str, Any]) -> None:
    model = mlp()
    s3.sparsify_training_(model, "2:4", **options)
    with torch.no_grad():  # the mask stays where the weight has moved on
        model[0].parametrizations.weight.original.copy_(torch.randn(32, 32))
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    s3.sparsify_training_(other, "2:4", **options)
    other.to_empty(device="cpu")
    assert all(bool(sparse.mask.all()) for sparse in masked(other))  # nothing is masked yet
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(other(x), model(x))
    assert all(
        torch.equal(a.mask, b.mask) for a, b in zip(masked(other), masked(model), strict=True)
    )


def masked(model: nn.Module) -> list[Any]:
    return [each for each in model.modules() if isinstance(each, s3.S3Sparse)]


def test_a_given_mask_outlives_the_meta_device() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 32)
    mask = s3.project(torch.randn(32, 32), "2:4")
    with torch.device("meta"):
        layer = nn.Linear(32, 32)
    sparse = s3.S3Sparse("2:4", "fixed", mask=mask)
    parametrize.register_parametrization(layer, "weight", sparse)
    assert layer(torch.randn(2, 32, device="meta")).is_meta
    layer.to_empty(device="cpu")
    layer.weight = weight
    assert torch.equal(layer.weight, torch.where(mask, weight, 0))
    layer.to("meta")
    assert layer(torch.randn(2, 32, device="meta")).is_meta
    layer.to_empty(device="cpu")
    layer.weight = weight
    assert torch.equal(layer.weight, torch.where(mask, weight, 0))
    with pytest.raises(s3.PatternError, match="meta device"):
        s3.S3Sparse("2:4", "fixed", mask=mask.to("meta"))


def test_a_coupling_needs_values_and_keeps_its_masks_through_meta() -> None:
    def scopes(model: nn.Module) -> list[Any]:
        return [unit.scope() for unit in units(model, "channels")]

    class MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(torch.relu(self.fc1(x)))

    with torch.device("meta"):
        model = MLP()
    with pytest.raises(s3.PatternError, match="meta device"):
        s3.sparsify_training_(model, scopes(model), keep=0.5)
    model = MLP()
    s3.sparsify_training_(model, scopes(model), keep=0.5)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.to("meta").to_empty(device="cpu")
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name])


def test_masks_made_under_inference_mode_can_be_trained_with() -> None:
    for prepare in (
        lambda model: s3.freeze(model),
        lambda model: [model[0].parametrizations.weight[0].freeze(), model(torch.randn(2, 32))],
    ):
        model = mlp()
        s3.sparsify_training_(model, "2:4", "srste")
        with torch.inference_mode():
            prepare(model)
        model(torch.randn(2, 32)).sum().backward()
    model = mlp()
    with torch.inference_mode():
        s3.sparsify_training_(model, "2:4", "fixed")
    model(torch.randn(2, 32)).sum().backward()
    with torch.inference_mode():
        s3.finalize(model)
    x = torch.randn(2, 32, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


# failures ---------------------------------------------------------------------------------------------


def test_a_head_that_tiles_do_not_fit_is_skipped_and_named() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    report = s3.sparsify_training_(model, "2:4", transposable=True)
    assert [row.action for row in report] == ["parametrized", "skipped"]
    assert "divide by 4" in report.rows[1].reason
    with pytest.raises(s3.PatternError, match="cannot be transposable"):
        s3.sparsify_training_(mlp(), "1:8", transposable=True)


def test_a_score_that_fails_leaves_the_model_as_it_was() -> None:
    model = mlp()
    weights = [model[0].weight, model[2].weight]

    def score(weight: Tensor, sparse: s3.S3Sparse) -> Tensor:
        return weight.abs() if weight is weights[0] else weight[0]

    with pytest.raises(
        s3.PatternError, match=r"^2: the score function returned .* nothing was changed"
    ):
        s3.sparsify_training_(model, "2:4", score=score)
    assert not parametrize.is_parametrized(model[0])
    assert model[0].weight is weights[0] and model[2].weight is weights[1]


@pytest.mark.parametrize("leave", [s3.finalize, s3.freeze])
def test_nothing_is_finalized_or_frozen_beside_a_weight_that_diverged(leave: Any) -> None:
    model = mlp()
    s3.sparsify_training_(model, "2:4")
    with torch.no_grad():
        model[2].parametrizations.weight.original[0, 0] = float("nan")
    with pytest.raises(s3.NonFiniteError, match=r"^2\.weight: "):
        leave(model)
    assert parametrize.is_parametrized(model[0]) and not model[0].parametrizations.weight[0].frozen


def test_a_model_in_training_is_not_saved_for_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    s3.sparsify_training_(model, "2:4")
    for dense in (True, False):
        with pytest.raises(s3.ModelError, match=r"q_proj.weight is still under S3Sparse"):
            s3.save_pretrained(model, tmp_path / "out", dense=dense)
    assert not (tmp_path / "out").exists()


def test_lora_on_a_model_in_training_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = mlp()
    s3.sparsify_training_(model, "2:4", "fixed")
    with pytest.raises(s3.ModelError, match=r"call s3tensor\.finalize"):
        peft.get_peft_model(model, s3.lora_config(r=2, target_modules=["0"]))


def test_eight_bit_floats_are_refused_by_the_dtype() -> None:
    layer = nn.Linear(32, 16)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(s3.PatternError, match=r"got torch\.float8_e4m3fn"):
        parametrize.register_parametrization(layer, "weight", s3.S3Sparse("2:4"))
