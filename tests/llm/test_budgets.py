"""Budgets over layers: the best allocation at an equal total; too little memory; too few tokens."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import batches, logits, tiny

import s3tensor as s3
from s3tensor import cli, llm
from s3tensor.errors import CheckpointError, PatternError
from s3tensor.io import pretrained as hf
from s3tensor.llm import budgets, run
from s3tensor.pattern import Pattern
from s3tensor.prune.hessian import Factors

seeds = st.integers(0, 10_000)


# The allocation ---------------------------------------------------------------------------------------


def layers_of(seed: int, count: int) -> tuple[list[list[float]], list[list[int]], list[int]]:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (count,), generator=draw).tolist()
    losses = [
        sorted(torch.rand(3, generator=draw, dtype=torch.float64).tolist(), reverse=True)
        for _ in sizes
    ]
    return losses, [[12 * size * n for n in (1, 2, 3)] for size in sizes], [1] * count


def total(rows: list[list[Any]], chosen: list[int]) -> Any:
    return sum(row[n] for row, n in zip(rows, chosen, strict=True))


@given(seeds, st.integers(1, 7))
def test_the_allocation_is_the_best_of_all(seed: int, count: int) -> None:
    losses, costs, uniform = layers_of(seed, count)
    budget = total(costs, uniform)
    found = budgets.allocate(losses, costs, uniform)
    assert total(costs, found) <= budget
    best = min(
        total(losses, list(each))
        for each in itertools.product(range(3), repeat=count)
        if total(costs, list(each)) <= budget
    )
    assert total(losses, found) == pytest.approx(best, rel=1e-8)
    assert found == budgets.allocate(losses, costs, uniform)


@given(seeds, st.integers(1, 12), st.integers(1, 60))
def test_a_coarse_budget_is_never_exceeded_and_never_worse_than_uniform(
    seed: int, count: int, slots: int
) -> None:
    losses, costs, uniform = layers_of(seed, count)
    costs = [[c + n % 5 for n, c in enumerate(row)] for row in costs]  # no common divisor
    before = budgets._SLOTS
    budgets._SLOTS = slots
    try:
        found = budgets.allocate(losses, costs, uniform)
    finally:
        budgets._SLOTS = before
    assert total(costs, found) <= total(costs, uniform)
    assert total(losses, found) <= total(losses, uniform)


@given(st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2), st.integers(1, 9))
def test_equal_layers_of_convex_loss_stay_uniform(steps: list[float], count: int) -> None:
    small, large = sorted(steps)
    row = [small + large, small, 0.0]
    found = budgets.allocate([row] * count, [[4, 8, 12]] * count, [1] * count)
    assert found == [1] * count


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("2:4", ["1:4", "2:4", "3:4"]),
        ("4:8", ["3:8", "4:8", "5:8"]),
        ("1:4", ["1:4", "2:4"]),
        ("block:1x2@2:4", ["block:1x2@1:4", "block:1x2@2:4", "block:1x2@3:4"]),
        ("unstructured@0.5", [f"unstructured@{d}" for d in (0.3, 0.4, 0.5, 0.6, 0.7)]),
    ],
)
def test_choices_differ_in_what_is_kept_alone(text: str, names: list[str]) -> None:
    found = budgets.choices(Pattern.parse(text))
    assert [str(p) for p in found] == names
    parts = {(p.view, p.sizes, p.block, p.scope) for p in found}
    assert len(parts) == 1
    kept = [budgets.kept_weights(p, (8, 16)) for p in found]
    assert kept == sorted(kept) and kept == [
        int(s3.project(torch.randn(8, 16), p).sum()) for p in found
    ]


def test_a_preset_without_numbers_has_choices_too() -> None:
    found = budgets.choices(Pattern.parse("coupled2:4"))
    assert [p.keep for p in found] == [1, 2, 3] and str(found[1]) == "coupled2:4"
    assert all(Pattern.parse(str(p)) == p for p in found)


@given(seeds, st.sampled_from(["2:4", "coupled2:4", "block:1x2@2:4", "unstructured@0.5"]))
def test_a_sensitivity_falls_with_the_budget_and_follows_the_solver(seed: int, text: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    weight = torch.randn(48, 32, generator=generator)
    hessian = s3.compute_hessian(x)
    factors = Factors(hessian, 0.01)
    options = budgets.choices(Pattern.parse(text))
    losses = budgets.sensitivities(weight, factors, hessian, options)
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    for option, loss in zip(options, losses, strict=True):
        pruned = s3.prune.admm(weight, factors, option)
        exact = s3.output_error(pruned.weight, weight, hessian) ** 2
        assert 0.9 * exact <= loss <= 6 * exact  # its masks are those that ADMM starts from


# Whole models -----------------------------------------------------------------------------------------


def uneven() -> torch.nn.Module:
    """A model some of whose linears lose more than others: every second row of one input is nothing."""
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.data[:, 1::2] *= 1e-3
        layer.self_attn.q_proj.weight.data[:, ::2] *= 1e-3
    return model


def kept(report: llm.PruneReport) -> int:
    return sum(round(row.density * row.out_features * row.in_features) for row in report.linears)


def test_mixed_budgets_keep_no_more_in_all_and_lose_less() -> None:
    uniform = llm.prune_model(uneven(), batches(), "2:4", progress=False)
    model = uneven()
    mixed = llm.prune_model(model, batches(), "2:4", budgets="mixed", progress=False)
    assert kept(mixed) <= kept(uniform)
    for one, other in zip(mixed.blocks, uniform.blocks, strict=True):
        assert one.error < other.error
    assert set(mixed.patterns) <= {"1:4", "2:4", "3:4"} and len(mixed.patterns) > 1
    assert sum(mixed.patterns.values()) == len(mixed.linears) == 14
    for row in mixed.linears:
        weight = model.get_submodule(row.name).weight
        assert str(weight.pattern) == row.pattern
        assert row.density == weight.bound.density
    assert uniform.patterns == {"2:4": 14} and "pruned to 2:4 by" in str(uniform)
    assert mixed.patterns_text in str(mixed) and " linears)" in mixed.patterns_text
    assert json.loads(json.dumps(mixed.summary()))["patterns"] == mixed.patterns


def test_a_model_of_several_budgets_is_saved_and_loaded(tmp_path: Path) -> None:
    model = uneven()
    report = llm.prune_model(model, batches(), "2:4", budgets="mixed", progress=False)
    hf.save_pretrained(model, tmp_path / "sparse", card=report.summary())
    loaded = hf.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(loaded), logits(model))
    named = {name: pattern for name, pattern, _ in hf.verify(tmp_path / "sparse")}
    assert named == {f"{row.name}.weight": row.pattern for row in report.linears}


def test_names_and_globs_choose_patterns() -> None:
    model = tiny("llama")
    first = "model.layers.0.mlp.down_proj"
    report = llm.prune_model(
        model,
        batches(),
        "2:4",
        budgets={"*.mlp.*": "3:4", "*.down_proj": "rowpair16", first: "1:4"},
        progress=False,
    )
    for row in report.linears:
        wanted = "1:4" if row.name == first else "3:4" if ".mlp." in row.name else "2:4"
        assert row.pattern == wanted
        assert s3.satisfies(model.get_submodule(row.name).weight.to_dense(), wanted)


@pytest.mark.parametrize("wanted", ["mixed", {"*.down_proj": "1:4"}])
def test_a_broken_off_run_goes_on_with_the_budgets_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Any
) -> None:
    whole = uneven()
    llm.prune_model(whole, batches(), "2:4", budgets=wanted, progress=False)
    real = run._prune_block

    def dies(runner: Any, *rest: Any) -> Any:
        if runner.index == 1:
            raise KeyboardInterrupt
        return real(runner, *rest)

    def resumed(**options: Any) -> torch.nn.Module:
        model = uneven()
        report = llm.prune_model(
            model, batches(), "2:4", work_dir=tmp_path, progress=False, **options
        )
        assert report.resumed == 1 and len(report.linears) == 14
        return model

    monkeypatch.setattr(run, "_prune_block", dies)
    with pytest.raises(KeyboardInterrupt):
        resumed(budgets=wanted)
    monkeypatch.setattr(run, "_prune_block", real)
    for other in ({}, {"budgets": {"*.q_proj": "1:4"}}):
        with pytest.raises(CheckpointError, match="budgets"):
            resumed(**other)
    # The allocation is read, not measured again.
    monkeypatch.delattr(run, "mixed_budgets")
    model = resumed(budgets=wanted)
    assert torch.equal(logits(model), logits(whole))
    for name, value in whole.state_dict().items():
        assert getattr(model.state_dict()[name], "pattern", None) == getattr(value, "pattern", None)


def test_a_damaged_allocation_is_refused(tmp_path: Path) -> None:
    file = tmp_path / budgets.BUDGETS_JSON
    for text in ("[]", "{", '{"a": 3}', '{"a": "no pattern"}'):
        file.write_text(text)
        with pytest.raises(CheckpointError, match="damaged"):
            budgets.load_budgets(file)


@pytest.mark.parametrize(
    ("pattern", "wanted", "message"),
    [
        ("rowpair16", "mixed", "no room"),
        ("2:4", "best", "'mixed', or map"),
        (
            "2:4",
            {"*.nothing": "1:4"},
            r"'\*\.nothing'.*no linear of the model, which has model\.layers\.1\.mlp",
        ),
        ("2:4", {"*.q_proj": "1-4"}, "unknown pattern"),
    ],
)
def test_budgets_that_cannot_be_are_refused_before_any_work(
    pattern: str, wanted: Any, message: str
) -> None:
    model = tiny("llama")
    before = [x.clone() for x in model.parameters()]
    with pytest.raises(PatternError, match=message):
        llm.prune_model(model, batches(), pattern, budgets=wanted, progress=False)
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters(), strict=True))


def test_the_command_reads_budgets_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "budgets.yaml"
    file.write_text('"*.down_proj": 1:4\n"*.q_proj": "3:4"\n')  # YAML takes a bare 1:4 for a number
    from s3tensor.cli.prune import read_budgets

    assert read_budgets(str(file)) == {"*.down_proj": "1:4", "*.q_proj": "3:4"}
    assert read_budgets("mixed") == "mixed" and read_budgets(None) is None
    for text, words in (("- 1:4\n", "must map"), ("a: [\n", "not YAML"), ("a: 1-4\n", "pattern")):
        file.write_text(text)
        done = CliRunner().invoke(
            cli.main, ["prune", "model", "--out", str(tmp_path / "x"), "--budgets", str(file)]
        )
        assert done.exit_code == 2 and words in done.stderr, done.stderr
    done = CliRunner().invoke(
        cli.main, ["prune", "model", "--out", str(tmp_path / "x"), "--budgets", "none.yaml"]
    )
    assert done.exit_code == 2 and "'mixed' or a YAML file" in done.stderr


# Too little memory, too few tokens --------------------------------------------------------------------


def starved(needs: int) -> Callable[..., s3.prune.Pruned]:
    """ADMM on a device that holds so many bytes of working memory."""

    def pruner(
        weight: torch.Tensor,
        hessian: Any,
        pattern: Any,
        *,
        memory_budget: int = s3.prune.MEMORY_BUDGET,
        target: Any = None,
        alpha: float = 0.5,
        drift: Any = None,
    ) -> s3.prune.Pruned:
        if memory_budget > needs:
            raise torch.OutOfMemoryError("out of memory")
        given = {"target": target, "alpha": alpha, "drift": drift}
        return s3.prune.admm(weight, hessian, pattern, memory_budget=memory_budget, **given)

    return pruner


def test_a_pruner_out_of_memory_gets_less_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny("llama")
    llm.prune_model(plain, batches(), "2:4", progress=False)
    monkeypatch.setitem(s3.prune.PRUNERS, "admm", starved(40 << 20))
    model = tiny("llama")
    llm.prune_model(model, batches(), "2:4", progress=False)
    torch.testing.assert_close(logits(model), logits(plain))


def test_too_little_memory_is_one_clear_error_and_leaves_whole_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, enough = s3.prune.PRUNERS["admm"], starved(0)
    calls = 0

    def pruner(
        weight: torch.Tensor,
        hessian: Any,
        pattern: Any,
        *,
        memory_budget: int = s3.prune.MEMORY_BUDGET,
        target: Any = None,
        alpha: float = 0.5,
        drift: Any = None,
    ) -> s3.prune.Pruned:
        nonlocal calls
        calls += 1  # a block takes four: q, k and v; o; gate and up; down
        pick = real if calls < 7 else enough
        given = {"target": target, "alpha": alpha, "drift": drift}
        return pick(weight, hessian, pattern, memory_budget=memory_budget, **given)

    monkeypatch.setitem(s3.prune.PRUNERS, "admm", pruner)
    model = tiny("llama").train()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError) as caught:
        llm.prune_model(model, batches(), "2:4", work_dir=tmp_path, progress=False)
    bytes_needed = (8 * 32 * 32 + 5 * 128 * 32) * 4 + (32 << 20)
    for part in ("layers.1.mlp.gate_proj", f"{bytes_needed:,} bytes", "device='cpu'"):
        assert part in str(caught.value)
    assert model.training
    for name, value in model.state_dict().items():
        if ".layers.0." in name and name.endswith("proj.weight"):
            assert isinstance(value, s3.StructuredSparseTensor)
        else:
            assert torch.equal(value, dense[name]), name
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "run.json", "block-00000.json", "block-00000.safetensors", "linears.csv", "blocks.csv",
    }  # fmt: skip
    monkeypatch.setitem(s3.prune.PRUNERS, "admm", real)
    again = tiny("llama")
    report = llm.prune_model(again, batches(), "2:4", work_dir=tmp_path, progress=False)
    assert report.resumed == 1


def test_other_errors_of_a_pruner_are_not_taken_for_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(weight: Any, hessian: Any, pattern: Any, *, memory_budget: int = 1) -> Any:
        raise RuntimeError("another thing")

    monkeypatch.setitem(s3.prune.PRUNERS, "admm", broken)
    with pytest.raises(RuntimeError, match="another thing"):
        llm.prune_model(tiny("llama"), batches(), "2:4", progress=False)


def test_fewer_tokens_than_inputs_are_warned_of_and_the_held_out_error_tells() -> None:
    few = [batch[:1, :10] for batch in batches()]
    with pytest.warns(UserWarning, match=r"20 calibration tokens for .*mlp.*64 in_features"):
        report = llm.prune_model(
            tiny("llama"), few, "2:4", damp=0.01, held_out=batches(4), progress=False
        )
    last = [row for row in report.linears if row.name.endswith("down_proj")]
    assert all(row.samples == 20 < row.in_features for row in last)
    assert all(
        row.held_out_error is not None and row.held_out_error > 1.5 * row.error for row in last
    )
    assert f"held-out tokens: {report.summary()['median_held_out_error']:.4f}" in str(report)


def test_the_held_out_error_of_the_calibration_tokens_is_the_error(
    recwarn: pytest.WarningsRecorder,
) -> None:
    report = llm.prune_model(tiny("llama"), batches(), "2:4", held_out=batches(), progress=False)
    for row in report.linears:
        assert row.held_out_error is not None
        assert math.isclose(row.held_out_error, row.error, rel_tol=1e-4)
    plain = llm.prune_model(tiny("llama"), batches(), "2:4", progress=False)
    assert [row.error for row in plain.linears] == [row.error for row in report.linears]
    assert not any("calibration tokens" in str(w.message) for w in recwarn)


@pytest.mark.parametrize("name", sorted(s3.prune.NEEDS_HESSIAN))
def test_a_rank_deficient_hessian_with_dead_inputs_gives_finite_weights(name: str) -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    x[:, ::3] = 0
    hessian = s3.compute_hessian(x)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    pruned = s3.prune.get(name)(weight, hessian, "2:4")
    assert bool(torch.isfinite(pruned.weight).all()) and s3.satisfies(pruned.weight, "2:4")
