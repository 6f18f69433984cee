"""Recovery: masks stay, the loss never rises, runs repeat bit by bit, faults leave the block as it was."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import cli, llm
from s3tensor.io import pretrained as hf
from s3tensor.io.state import save_state
from s3tensor.llm import calibrate, chain, recover, structure
from s3tensor.llm import run as pruning
from s3tensor.llm.recover import Recovered, Recovery, recover_block
from s3tensor.llm.sequences import Sequences

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
VOCABULARY = 50
_WIDE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2, "head_dim": 8}
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "qwen2, biases": lambda: transformers.Qwen2Config(**_WIDE, num_key_value_heads=2),
    "gemma3, two masks": lambda: transformers.Gemma3TextConfig(**_GROUPED, **_TWO_KINDS),
    "gpt2, transposed": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64
    ),
    "bloom, alibi": lambda: transformers.BloomConfig(
        hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY
    ),
    "mixtral, experts": lambda: transformers.MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2
    ),
}


def family(kind: str = "llama") -> nn.Module:
    """A small random language model, float32, in eval mode."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


def batches(count: int = 8, size: int = 1, tokens: int = 16) -> list[Tensor]:
    """Sequences of few words, so that what is learnt on some holds on others."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(6, (size, tokens), generator=generator) for _ in range(count)]


def pruned(model: nn.Module, **options: Any) -> llm.PruneReport:
    """The model pruned to 2:4, left dense with zeros."""
    options = {"pruner": "wanda", "compress": False, "progress": False, **options}
    calibration = options.pop("calibration", None) or batches()
    return llm.prune_model(model, calibration, "2:4", **options)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    blocks = llm.decoder_blocks(model)[1]
    return {name: part for name, part in blocks.named_modules() if structure.is_linear(part)}


def same(first: nn.Module, second: nn.Module) -> bool:
    """Equality of all values bit by bit."""
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


class Toy(nn.Module):
    """A block with a weight of every sort: pruned, left dense, of a norm, a bias."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.left = nn.Linear(width, width)
        self.scale = 1.0

    def forward(self, hidden: Tensor) -> Tensor:
        inside = self.up(self.norm(hidden)).tanh()
        return hidden + self.scale * (self.down(inside) + self.left(hidden))


class Case:
    """A toy block that was pruned by magnitude, with its inputs and its dense outputs."""

    def __init__(self, rows: int = 8, block: nn.Module | None = None) -> None:
        self.block = block or Toy()
        generator = torch.Generator().manual_seed(0)
        self.chunks = [
            calibrate.Chunk(torch.randn(1, 12, 16, generator=generator), [((), {})])
            for _ in range(rows)
        ]
        self.runner = calibrate.BlockRunner(self.block, 0, "layers.0", CPU, CPU)
        self.targets = [self.runner.output(chunk) for chunk in self.chunks]
        self.masks: list[tuple[structure.LinearLayer, Tensor]] = []
        for name in ("up", "down"):
            layer = structure.ModelWeight(name, getattr(self.block, name))
            found = s3.prune.magnitude(layer.weight, None, "2:4")
            layer.copy_weight(found.weight)
            self.masks.append((layer, found.mask))
        self.before = {name: value.clone() for name, value in self.block.state_dict().items()}

    def recover(self, recovery: Recovery | None = None, **options: Any) -> Recovered:
        recovery = recovery or Recovery(steps=20, rate=0.01)
        return recover_block(
            self.runner, self.masks, self.chunks, self.targets, recovery, **options
        )

    def unchanged(self) -> bool:
        now = self.block.state_dict()
        return all(torch.equal(value, now[name]) for name, value in self.before.items())

    def changed(self) -> set[str]:
        now = self.block.state_dict()
        return {name for name, value in self.before.items() if not torch.equal(value, now[name])}

    def loss(self) -> float:
        """The loss over all sequences, in float64."""
        total = 0.0
        for chunk, target in zip(self.chunks, self.targets, strict=True):
            lost = (self.runner.output(chunk) - target).double().square().sum(-1)
            squares = target.double().square().sum(-1)
            total += float((lost / squares).mean())
        return total / len(self.chunks)


# what is trained -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family_keeps_its_masks_and_loses_less(kind: str) -> None:
    plain, recovered = family(kind), family(kind)
    pruned(plain, blocks=1)
    report = pruned(recovered, blocks=1, recover=Recovery(steps=12, rate=0.01, batch=3))
    (row,) = report.blocks
    assert row.recovery_steps == 12
    assert row.loss_after is not None and row.loss_before is not None
    assert row.loss_after < row.loss_before
    for name, linear in linears(plain).items():
        zero = linear.weight == 0
        found = linears(recovered)[name].weight
        assert torch.equal(found == 0, zero), name
    assert not any(parameter.grad is not None for parameter in recovered.parameters())


def test_kept_weights_biases_and_norms_are_trained_and_nothing_else() -> None:
    case = Case()
    result = case.recover()
    assert case.changed() == {"norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight"}
    for layer, mask in case.masks:
        assert not layer.weight[~mask].any()
    assert result.loss_after is not None and result.loss_before is not None
    assert result.loss_after < result.loss_before
    case = Case()
    case.recover(Recovery(steps=20, rate=0.01, norms=False))
    assert case.changed() == {"up.weight", "down.weight"}


def test_weights_that_other_parts_of_the_model_hold_are_left_alone() -> None:
    case = Case()
    case.recover(fixed={id(case.block.norm.weight), id(case.block.down.weight)})
    assert case.changed() == {"norm.bias", "up.weight", "up.bias"}
    other = Toy()
    other.norm.weight = case.block.norm.weight
    outside = nn.Linear(16, 16)
    outside.bias = case.block.left.bias
    model = nn.ModuleList([nn.ModuleList([case.block, other]), outside])
    found = recover.shared_parameters(model, [case.block, other])
    assert found == {id(case.block.norm.weight), id(case.block.left.bias)}


def test_a_filtered_linear_and_what_lies_outside_of_the_blocks_stay() -> None:
    model, dense = family("qwen2, biases"), family("qwen2, biases")
    pruned(model, filter_fn=lambda _, name: "mlp" in name, recover=Recovery(4, rate=0.01))
    for name, value in model.state_dict().items():
        stays = (
            "attn" in name or "embed" in name or "lm_head" in name or name == "model.norm.weight"
        )
        assert torch.equal(value, dense.state_dict()[name]) == stays, name


def test_biases_that_begin_at_zero_are_trained_at_the_scale_of_their_weights() -> None:
    case = Case()
    with torch.no_grad():
        case.block.up.bias.zero_()
    case.before = {name: value.clone() for name, value in case.block.state_dict().items()}
    case.recover(Recovery(steps=2, rate=0.01))
    moved = float(case.block.up.bias.detach().abs().max())
    size = float(case.before["up.weight"].square().mean().sqrt())
    assert 0 < moved < 0.1 * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_low_precision_stays_in_it_and_loses_less(dtype: torch.dtype) -> None:
    model = family().to(dtype)
    report = pruned(model, recover=Recovery(steps=30, rate=0.01))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for row in report.blocks:
        assert row.loss_after is not None and row.loss_before is not None
        assert row.loss_after < row.loss_before


def test_bfloat16_products_in_training_leave_float32_weights_that_lose_less() -> None:
    case = Case()
    result = case.recover(Recovery(steps=30, rate=0.01, precision="bfloat16"))
    assert case.block.up.weight.dtype == torch.float32
    assert result.loss_after is not None and result.loss_before is not None
    assert result.loss_after < result.loss_before


# the loss never rises --------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    rate=st.floats(1e-5, 1.0),
    steps=st.integers(0, 12),
    rows=st.integers(1, 9),
    batch=st.integers(1, 9),
    held_out=st.floats(0.01, 0.5),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_held_out_loss_never_rises_and_a_block_that_gains_nothing_stays(
    rate: float, steps: int, rows: int, batch: int, held_out: float, seed: int
) -> None:
    case = Case(rows)
    result = case.recover(Recovery(steps, rate, batch, held_out=held_out, seed=seed))
    assert result.loss_before is not None and result.loss_after is not None
    assert result.loss_after <= result.loss_before
    assert case.unchanged() == (result.loss_after == result.loss_before)
    assert result.steps == steps


def test_the_loss_is_the_relative_squared_error_of_tokens_of_the_block_that_is_left() -> None:
    # With fewer than four sequences all of them are trained on, and all of them are held out.
    case = Case(rows=3)
    before = case.loss()
    result = case.recover()
    assert result.loss_before == pytest.approx(before, rel=1e-5)
    assert result.loss_after == pytest.approx(case.loss(), rel=1e-5)
    assert case.loss() < before


@given(st.integers(4, 200), st.floats(0.01, 0.5), st.integers(0, 99))
def test_no_sequence_is_both_trained_on_and_held_out(count: int, share: float, seed: int) -> None:
    train, held_out = recover._split(count, Recovery(held_out=share, seed=seed))
    assert sorted(train + held_out) == list(range(count))
    assert 1 <= len(held_out) <= max(1, round(count * share))
    assert train


@given(st.integers(1, 30), st.integers(0, 99))
def test_every_round_of_the_order_holds_each_sequence_once(count: int, seed: int) -> None:
    rows = list(range(100, 100 + count))
    order = recover._order(rows, seed)
    for _ in range(3):
        assert sorted(itertools.islice(order, count)) == rows


@given(st.integers(1, 500))
def test_the_rate_rises_at_first_then_falls_to_nearly_nothing(steps: int) -> None:
    rates = [recover._schedule(done / steps, done, steps) for done in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert peak <= steps / 20 + 1
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    if steps >= 20:
        assert rates[-1] < 0.01 + 3 / steps


@settings(max_examples=25)
@given(st.integers(-40, 40), st.integers(0, 99))
def test_units_round_nothing(exponent: int, seed: int) -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    mask = weight.abs() > weight.abs().median()
    parameter = nn.Parameter(weight * mask)
    leaf = recover._Leaf("weight", parameter, mask, recover._size(parameter))
    assert torch.equal(leaf.weight(), parameter)
    size = leaf.value.detach()[mask].square().mean().sqrt()
    assert 0.7 <= float(size) <= 1.42


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same_recovery(mode: Any) -> None:
    plain, other = family(), family()
    pruned(plain, recover=Recovery(5, rate=0.01))
    with mode():
        pruned(other, recover=Recovery(5, rate=0.01))
    assert same(plain, other)
    assert not same(plain, family())


def test_weights_that_are_not_used_stay() -> None:
    block = Toy()
    block.idle = nn.LayerNorm(4)
    case = Case(block=block)
    case.recover()
    assert case.changed() == {"norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight"}


# the same result -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [0, Recovery(steps=0)])
def test_no_steps_are_no_recovery_bit_for_bit(nothing: int | Recovery) -> None:
    plain, other = family(), family()
    first = pruned(plain)
    second = pruned(other, recover=nothing)
    assert same(plain, other)
    assert second.recovery is first.recovery is None
    assert [row.error for row in first.blocks] == [row.error for row in second.blocks]


def test_recovery_is_deterministic_and_the_seed_matters() -> None:
    models = [family(), family(), family()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        pruned(model, recover=Recovery(steps=5, rate=0.01, batch=2, seed=seed))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@pytest.mark.parametrize("target", ["dense", "mixed"])
def test_a_killed_run_with_recovery_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any
) -> None:
    recovery = Recovery(steps=6, rate=0.01, target=target)

    def run(folder: Path) -> llm.PruneReport:
        model = family("gpt2, transposed")
        report = pruned(model, work_dir=folder, recover=recovery, compress=True)
        save_state(folder / "final", dict(model.state_dict()))
        return report

    whole = run(tmp_path / "whole")
    real = pruning.recover_block

    def dies_in_block_one(runner: calibrate.BlockRunner, *rest: Any) -> Recovered:
        if runner.index == 1:
            raise KeyboardInterrupt
        return real(runner, *rest)

    monkeypatch.setattr(pruning, "recover_block", dies_in_block_one)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.setattr(pruning, "recover_block", real)
    report = run(tmp_path / "broken")
    assert report.resumed == 1
    for name in ("final", "block-00000.safetensors", "block-00001.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    assert [row.loss_after for row in report.blocks] == [row.loss_after for row in whole.blocks]
    with pytest.raises(s3.CheckpointError, match="recover"):
        pruned(family("gpt2, transposed"), work_dir=tmp_path / "whole", compress=True)


def test_the_next_block_is_pruned_on_what_recovery_left() -> None:
    with_it, without = family(), family()
    reports = [
        pruned(without),
        pruned(with_it, recover=Recovery(steps=20, rate=0.01)),
    ]
    first, second = (report.blocks[-1] for report in reports)
    assert second.error < first.error
    mask = linears(without)["1.mlp.up_proj"].weight == 0
    assert not torch.equal(mask, linears(with_it)["1.mlp.up_proj"].weight == 0)


def test_the_mixed_target_is_the_mean_of_the_dense_blocks_outputs_on_both_streams() -> None:
    block = Toy()
    chunks = [calibrate.Chunk(torch.randn(1, 5, 16), [((), {})]) for _ in range(2)]
    dense = [calibrate.Chunk(torch.randn(1, 5, 16), []) for _ in range(2)]
    runner = calibrate.BlockRunner(block, 0, "layers.0", CPU, CPU)
    streams = pruning._Streams(chunks, dense)
    found = pruning._recovery_targets(runner, streams, "mixed")
    for goal, chunk, there in zip(found, chunks, dense, strict=True):
        torch.testing.assert_close(goal, (block(chunk.hidden) + there.hidden).detach() / 2)
    assert pruning._recovery_targets(runner, streams, "dense") == [chunk.hidden for chunk in dense]


def test_deterministic_kernels_are_on_for_the_backward_pass_of_attention_alone() -> None:
    seen: list[tuple[str, int]] = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            seen.append((ctx.name, torch.get_deterministic_debug_mode()))
            return grad, None

    assert torch.get_deterministic_debug_mode() == 0
    x = torch.randn(1, 2, 6, 8, requires_grad=True)
    mode = recover._Repeatable()
    with mode:
        out = nn.functional.scaled_dot_product_attention(Seen.apply(x, "before"), x, x)
        node = out.grad_fn
        assert "ScaledDotProduct" in node.name()
        loss = Seen.apply(out * 2, "after").sum()
    node.register_prehook(
        lambda grads: seen.append(("within", torch.get_deterministic_debug_mode()))
    )
    (grad,) = torch.autograd.grad(loss, x)
    assert seen == [("after", 0), ("within", 2), ("before", 0)]
    plain = nn.functional.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(grad, torch.autograd.grad((plain * 2).sum(), x)[0])
    assert torch.get_deterministic_debug_mode() == 0


# batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3, two masks", "bloom, alibi"])
def test_sequences_taken_apart_or_put_together_give_what_they_give_in_their_batches(
    kind: str,
) -> None:
    model = family(kind)
    blocks = llm.decoder_blocks(model)[1]
    chunks = chain.catch_chunks(model, blocks, batches(3, size=2), "cpu")
    runner = calibrate.BlockRunner(blocks[0], 0, "0", CPU, CPU)
    expected = [runner.output(chunk) for chunk in chunks]
    data = Sequences(runner, chunks, expected)
    together = kind != "bloom, alibi"  # its alibi is one tensor over all heads of a batch
    assert len(data) == (6 if together else 3)
    rows = list(range(len(data)))
    alike = data.alike(rows)
    assert len(alike) == (6 if together else 1)
    with torch.no_grad():
        out = data.output(alike, {})
    torch.testing.assert_close(out, torch.cat(expected)[: len(out)], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(data.targets(rows), torch.cat(expected))


def test_calibration_in_batches_of_any_size_recovers_alike() -> None:
    tokens = torch.cat(batches(8))
    errors = []
    for size in (1, 4, 8):
        report = pruned(
            family(), calibration=list(tokens.split(size)), recover=Recovery(5, rate=0.01, batch=4)
        )
        errors.append([row.error for row in report.blocks])
        assert [row.recovery_steps for row in report.blocks] == [5, 5]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert errors[2] == pytest.approx(errors[0], rel=1e-3)


def test_sequences_of_several_lengths_recover() -> None:
    calibration = [*batches(3, tokens=16), *batches(3, tokens=11), *batches(1, size=2, tokens=9)]
    report = pruned(family(), calibration=calibration, recover=Recovery(12, rate=0.01, batch=5))
    for row in report.blocks:
        assert row.loss_after is not None and row.loss_before is not None
        assert row.loss_after < row.loss_before


# faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, r"steps=-1"),
        ({"steps": 2.5}, r"steps=2\.5"),
        ({"steps": True}, r"steps=True"),
        ({"rate": 0.0}, r"rate=0\.0"),
        ({"rate": float("nan")}, r"rate=nan"),
        ({"batch": 0}, r"batch=0"),
        ({"batch": 1.5}, r"batch=1\.5"),
        ({"seconds": 0.0}, r"seconds=0\.0"),
        ({"seconds": float("inf")}, r"seconds=inf"),
        ({"target": "sparse"}, r"target='sparse'.*'dense' or 'mixed'"),
        ({"held_out": 0.0}, r"held_out=0\.0"),
        ({"held_out": 0.9}, r"held_out=0\.9"),
        ({"precision": "int8"}, r"precision='int8'"),
        ({"seed": -1}, r"seed=-1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_option_out_of_range_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(s3.errors.PrunerError, match=message):
        Recovery(**options)


@pytest.mark.parametrize("steps", [-3, "many", True])
def test_bad_steps_are_refused_before_any_work(steps: Any) -> None:
    model = family()
    with pytest.raises(s3.errors.PrunerError, match=f"steps={steps!r}"):
        pruned(model, recover=steps)
    assert same(model, family())


class Cliff(Toy):
    """A block whose gradients are NaN, though its outputs are finite."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + (self.up(hidden) * 0).abs().sqrt().sum()


def test_nan_gradients_leave_the_block_as_it_was_with_a_warning_that_names_it() -> None:
    case = Case(block=Cliff())
    with pytest.warns(UserWarning, match=r"recovery of layers\.0 met NaN or Inf after \d+ steps"):
        result = case.recover()
    assert result.loss_before is result.loss_after is None
    assert case.unchanged()


def test_nan_targets_leave_the_block_as_it_was_with_a_warning() -> None:
    case = Case()
    for target in case.targets:
        target[0, 3] = float("nan")
    with pytest.warns(UserWarning, match="after 0 steps"):
        assert case.recover().steps == 0
    assert case.unchanged()


def test_a_model_in_which_every_recovery_fails_is_pruned_as_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, other = family(), family()
    pruned(plain)
    monkeypatch.setattr(recover._Tuning, "loss", lambda self: float("nan"))
    with pytest.warns(UserWarning, match=r"model\.layers\.[01] "):
        report = pruned(other, recover=3)
    assert same(plain, other)
    assert report.recovery is None
    assert json.loads(json.dumps(report.summary()))["recovery"] is None


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let a device hold so many sequences; the sizes of the passes that were tried."""
    real, tried = Sequences.output, []

    def output(self: Sequences, rows: Any, weights: Any) -> Tensor:
        if weights:  # without, it is looked at what may be put together
            tried.append(len(rows))
        if weights and len(rows) > most:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, rows, weights)

    monkeypatch.setattr(Sequences, "output", output)
    return tried


def test_fewer_sequences_at_a_time_give_the_same_recovery_when_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, parts = Case(), Case()
    # At a rate at which rounding is not blown up by Adam's division.
    recovery = Recovery(steps=6, rate=1e-3, batch=7)
    expected = whole.recover(recovery)
    tried = limited(monkeypatch, most=2)
    found = parts.recover(recovery)
    assert tried[:4] == [1, 7, 4, 2]  # the held-out sequence, then a step
    assert max(tried[3:]) == 2
    assert found.loss_after == pytest.approx(expected.loss_after, rel=1e-4)


def test_out_of_memory_with_one_sequence_is_one_clear_error_and_the_block_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case()
    limited(monkeypatch, most=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"layers\.0 needs more memory.*12 tokens"):
        case.recover()
    assert case.unchanged()


def test_an_error_in_the_block_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Sequences, rows: Any, weights: Any) -> Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Sequences, "output", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        Case(rows=1).recover()


# time, progress, report ------------------------------------------------------------------------------


class Clock:
    """Stands for the module time: each look at it takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def test_a_time_budget_ends_recovery_early_with_the_schedule_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recover, "time", Clock())
    rates: list[float] = []
    real = recover._schedule
    monkeypatch.setattr(
        recover, "_schedule", lambda *arguments: rates.append(real(*arguments)) or rates[-1]
    )
    case = Case()
    result = case.recover(Recovery(steps=1000, rate=0.01), seconds=40.0)
    assert result.steps == len(rates) == 39
    assert rates[-1] < 0.01
    assert result.loss_after is not None and result.loss_before is not None
    assert result.loss_after < result.loss_before


def test_the_time_of_a_run_is_shared_out_over_its_blocks() -> None:
    assert pruning._seconds_left(None, [], 4) is None
    assert pruning._seconds_left(Recovery(), [], 4) is None
    limited = Recovery(seconds=40.0)
    assert Case().recover(seconds=0.0).steps == 0
    done = [llm.BlockRow(0, 1, 0.0, 0.0, 0.0, 0, recovery_seconds=16.0)]
    assert pruning._seconds_left(limited, [], 4) == 10.0
    assert pruning._seconds_left(limited, done, 3) == 8.0
    assert pruning._seconds_left(limited, done * 4, 1) == 0.0


def test_progress_tells_steps_loss_and_time_left() -> None:
    told: list[tuple[int, int, float, float]] = []
    result = Case().recover(Recovery(steps=16, rate=0.01), on_step=lambda *news: told.append(news))
    assert [(done, of) for done, of, _, _ in told] == [(n, 16) for n in range(1, 17)]
    assert told[0][2] == result.loss_before
    assert min(loss for _, _, loss, _ in told) == result.loss_after
    assert told[-1][3] == 0.0 and all(left > 0 for *_, left in told[:-1])


def test_the_report_the_log_and_the_tables_tell_of_recovery(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = pruned(family(), work_dir=tmp_path, progress=True, recover=Recovery(6, rate=0.01))
    log = capsys.readouterr().err.splitlines()
    assert all(re.search(r"recovery 0\.\d{4} to 0\.\d{4}, ", line) for line in log)
    frame = report.frames()[1]
    assert (frame["recovery_steps"] == 6).all()
    assert (frame["recovery_seconds"] <= frame["seconds"]).all()
    figures = json.loads(json.dumps(report.summary()))["recovery"]
    assert figures["steps"] == 12
    assert figures["loss_before"] == pytest.approx(frame["loss_before"].mean())
    assert figures["loss_after"] == pytest.approx(frame["loss_after"].mean())
    assert "recovery: 12 steps" in str(report)
    header = (tmp_path / "blocks.csv").read_text().splitlines()[0]
    assert header.endswith("recovery_steps,recovery_seconds,loss_before,loss_after")


# the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("--recover", "-1"),
        ("--recover", "some"),
        ("--recover-seconds", "0"),
        ("--recover-seconds", "nan"),
    ],
    ids=" ".join,
)
def test_bad_options_of_the_command_are_refused_before_loading(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    found = CliRunner().invoke(
        cli.main, ["prune", "model", "--out", str(tmp_path / "x"), *arguments]
    )
    assert found.exit_code == 2, found.output
    assert "recover" in found.output
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), None),
        (("--recover", "0"), None),
        (("--recover", "7"), Recovery(7)),
        (("--recover-seconds", "9"), Recovery(seconds=9.0)),
        (
            ("--recover", "7", "--recover-seconds", "9", "--seed", "5"),
            Recovery(7, seconds=9.0, seed=5),
        ),
    ],
    ids=["none", "no steps", "steps", "seconds", "both"],
)
def test_the_command_passes_recovery_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    expected: Recovery | None,
) -> None:
    class Stop(Exception):
        pass

    given_: list[Any] = []

    def prune_model(*_: Any, recover: Any, **__: Any) -> None:
        given_.append(recover)
        raise Stop

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(text)))}

    monkeypatch.setattr(hf, "load_model", lambda *_: (None, tokenizer))
    monkeypatch.setattr(llm, "prune_model", prune_model)
    (tmp_path / "text.txt").write_text("some words")
    short = ["--calibration", str(tmp_path / "text.txt"), "--samples", "1", "--seq-len", "4"]
    plain = ["prune", "model", "--out", str(tmp_path / "x"), "--device", "cpu"]
    command = [*plain, *short, "--eval-samples", "0", *arguments]
    found = CliRunner().invoke(cli.main, command)
    assert isinstance(found.exception, Stop), found.output
    assert Recovery.of(given_[0]) == expected


# on a GPU --------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache", ["cpu", "cuda"])
def test_recovery_on_a_gpu_repeats_bit_by_bit_and_loses_less(
    dtype: torch.dtype, cache: str
) -> None:
    before = torch.get_deterministic_debug_mode()
    models = [family().to(dtype), family().to(dtype)]
    for model in models:
        report = pruned(
            model,
            device="cuda",
            cache_device=cache,
            calibration=batches(8, size=2, tokens=48),
            recover=Recovery(20, rate=0.01, batch=6),
        )
        for row in report.blocks:
            assert row.loss_after is not None and row.loss_before is not None
            assert row.loss_after < row.loss_before
        for linear in linears(model).values():
            assert s3.satisfies(linear.weight, "2:4")
    assert same(*models)
    assert torch.get_deterministic_debug_mode() == before


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recovery_on_a_gpu_comes_to_that_on_a_cpu(precision: Any) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        recovery = Recovery(20, rate=0.01, precision=precision if device == "cuda" else "float32")
        report = pruned(family(), device=device, blocks=1, damp=0.01, recover=recovery)
        losses.append(report.blocks[0].loss_after)
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if precision == "float32" else 0.05)
