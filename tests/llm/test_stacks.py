"""Weights of one input pruned one above the other: the same result in one factorisation."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import llm, prune
from s3tensor.pattern import Pattern
from s3tensor.prune.hessian import Factors
from s3tensor.prune.problem import row_group, row_stacks
from s3tensor.testing import bound_patterns

STACKABLE = (
    "2:4",
    "4:8",
    "pair4:8",
    "coupled2:4",
    "rowpair16",
    "unstructured@0.5",
    "block:4x4@0.5",
)
ALONE = ("row@0.5", "column@0.5", "unstructured@0.5/tensor", "block:4x4@0.5/tensor")
fewer = settings(max_examples=max(10, settings().max_examples // 8))


def problem(rows: list[int], columns: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Float64 weights of one input, and its Hessian: correlated inputs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(6 * columns, columns) @ (
        torch.eye(columns) + normal(columns, columns) / math.sqrt(columns)
    )
    return [normal(n, columns) for n in rows], x.T @ x / len(x)


@fewer
@given(
    st.sampled_from(sorted(prune.ROW_WISE)),
    st.sampled_from(STACKABLE),
    st.lists(st.integers(1, 3).map(lambda n: 16 * n), min_size=2, max_size=3),
    st.integers(0, 2**16),
)
def test_a_stack_is_pruned_as_its_weights_are_alone(
    pruner: str, pattern: str, rows: list[int], seed: int
) -> None:
    weights, hessian = problem(rows, 32, seed)
    parsed = Pattern.parse(pattern)
    assert row_stacks([tuple(w.shape) for w in weights], parsed) == [list(range(len(rows)))]
    factors = Factors(hessian, 0.01)
    call = prune.get(pruner)
    whole = call(torch.cat(weights), factors, parsed)
    for weight, found, mask in zip(
        weights, whole.weight.split(rows), whole.mask.split(rows), strict=True
    ):
        alone = call(weight, factors, parsed)
        # Masks differ only where two choices are equal to rounding; then so are the errors.
        if torch.equal(mask, alone.mask):
            torch.testing.assert_close(found, alone.weight, rtol=1e-6, atol=1e-8)
        else:
            errors = [s3.output_error(w, weight, hessian) for w in (found, alone.weight)]
            assert errors[0] == pytest.approx(errors[1], rel=1e-6)


@given(bound_patterns(max_elements=256), st.integers(2, 3))
def test_no_scope_of_a_stack_crosses_from_one_weight_to_the_next(bound: object, count: int) -> None:
    assert isinstance(bound, s3.BoundPattern)
    if len(bound.shape) != 2:
        return
    shapes = [bound.shape] * count
    stacks = row_stacks(shapes, bound.pattern)
    assert sorted(i for stack in stacks for i in stack) == list(range(count))
    if stacks != [list(range(count))]:
        return
    # the mask of a stack is the masks of its weights, whatever the weights are
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(bound.shape, generator=generator) for _ in range(count)]
    masks = torch.cat([s3.project(weight, bound.pattern) for weight in weights])
    assert torch.equal(s3.project(torch.cat(weights), bound.pattern), masks)
    assert bound.shape[0] % row_group(bound) == 0


@pytest.mark.parametrize("pattern", ALONE)
def test_weights_whose_scopes_span_all_rows_stay_alone(pattern: str) -> None:
    assert row_stacks([(16, 32), (16, 32)], Pattern.parse(pattern)) == [[0], [1]]


def test_weights_of_other_columns_stay_alone_and_the_rest_is_stacked() -> None:
    shapes = [(16, 32), (16, 64), (48, 32), (8, 32)]
    assert row_stacks(shapes, Pattern.parse("2:4")) == [[0, 2, 3], [1]]
    # rows of the last are no whole groups of 16
    assert row_stacks(shapes, Pattern.parse("rowpair16")) == [[0, 2], [1], [3]]


def test_a_model_is_pruned_alike_in_stacks_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    calls: list[int] = []
    real = prune.PRUNERS["admm"]

    @functools.wraps(real)
    def counted(weight: Tensor, *args: object, **options: object) -> prune.Pruned:
        calls.append(len(weight))
        return real(weight, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setitem(prune.PRUNERS, "admm", counted)
    models: list[nn.Module] = []
    for names in (prune.ROW_WISE, frozenset[str]()):
        monkeypatch.setattr(prune, "ROW_WISE", names)
        torch.manual_seed(0)
        models.append(transformers.LlamaForCausalLM(config).double())  # rounding flips no mask
        calibration = [torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(1))]
        report = llm.prune_model(models[-1], calibration, "2:4", progress=False, compress=False)
        assert [row.name.rpartition(".")[2] for row in report.linears[:3]] == [
            "q_proj", "k_proj", "v_proj",
        ]  # fmt: skip
    stacked, alone = calls[: len(calls) - 14], calls[len(calls) - 14 :]
    assert len(alone) == 14 and len(stacked) == 8 and sum(stacked) == sum(alone)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()  # Hessians are summed in float32
