"""The distillation loss against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import s3tensor as s3


def definition(student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), meaned over the tokens that count, as the sum over the vocabulary."""
    p, q = ((x.double() / temperature).softmax(-1)[counts] for x in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


@given(
    st.integers(1, 9), st.integers(2, 7), st.floats(0.5, 4), st.integers(1, 10), st.integers(0, 99)
)
def test_the_loss_and_its_gradient_are_those_of_the_definition(
    tokens: int, vocabulary: int, temperature: float, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    student = torch.randn(tokens, vocabulary, dtype=torch.float64, requires_grad=True)
    teacher = 2 * torch.randn(tokens, vocabulary, dtype=torch.float64)
    labels = torch.randint(3, (tokens,)) - 1
    labels[0] = 0
    loss = s3.distillation_loss(
        student, teacher, temperature=temperature, labels=labels, ignore_index=-1, chunk=chunk
    )
    expected = definition(student, teacher, labels != -1, temperature)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(3 * loss, student)[0]
    torch.testing.assert_close(found, torch.autograd.grad(3 * expected, student)[0])
    assert not found[labels == -1].any()
    single = s3.distillation_loss(
        student.float(), teacher.float(), temperature=temperature, mask=labels != -1, chunk=chunk
    )
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_softened_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student = (10 * torch.randn(2, 5, 300)).to(dtype).requires_grad_()
    teacher = (10 * torch.randn(2, 5, 300)).to(dtype)
    loss = s3.distillation_loss(student, teacher, temperature=2.0)
    loss.backward()
    wide = student.detach().double().requires_grad_()
    every = torch.ones(2, 5, dtype=torch.bool)
    expected = definition(wide, teacher, every, 2.0)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=1e-2, atol=1e-7)


def test_hidden_states_add_their_error_relative_to_the_teachers() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    mine = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(2)]
    theirs = [5 * torch.randn(2, 3, 4) for _ in range(2)]
    loss = s3.distillation_loss(
        logits, logits, mask=mask, hidden=list(zip(mine, theirs, strict=True)), hidden_weight=0.5
    )
    each = [
        (m.double() - t)[mask].square().sum() / t.double()[mask].square().sum()
        for m, t in zip(mine, theirs, strict=True)
    ]
    torch.testing.assert_close(loss.double(), 0.5 * (each[0] + each[1]) / 2)
    loss.backward()
    assert not mine[0].grad[~mask].any() and bool(mine[0].grad[mask].all())


def test_what_does_not_count_may_hold_anything() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.tensor([True, False, True, False])
    expected = s3.distillation_loss(student[mask], teacher[mask])
    student[1], teacher[3] = float("nan"), float("inf")
    student.requires_grad_()
    hidden = torch.full((4, 2), float("nan"))
    hidden[mask] = 1.0
    loss = s3.distillation_loss(student, teacher, mask=mask, hidden=[(hidden, hidden)])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert bool(torch.isfinite(student.grad).all()) and not student.grad[1].any()
    none = s3.distillation_loss(student, teacher, mask=torch.zeros(4, dtype=torch.bool))
    assert none.item() == 0


def test_words_that_both_rule_out_add_nothing() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    expected = s3.distillation_loss(student[:, :4], teacher[:, :4])
    student[:, 4] = teacher[:, 4] = -float("inf")
    student.requires_grad_()
    loss = s3.distillation_loss(student, teacher)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert bool(torch.isfinite(student.grad).all())


def test_equal_distributions_lose_nothing_and_the_teacher_gets_no_gradient() -> None:
    torch.manual_seed(0)
    student = torch.randn(3, 5, requires_grad=True)
    teacher = (student.detach() + 7).requires_grad_()  # a shift changes no probability
    loss = s3.distillation_loss(student, teacher)
    assert abs(loss.item()) < 1e-6
    loss.backward()
    assert teacher.grad is None
    torch.testing.assert_close(student.grad, torch.zeros(3, 5), rtol=0, atol=1e-7)


def test_nothing_of_the_size_of_the_logits_is_saved_besides_them() -> None:
    student = torch.randn(64, 1000, requires_grad=True)
    teacher = torch.randn(64, 1000)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        s3.distillation_loss(student, teacher, chunk=8)
    memory = {t.untyped_storage().data_ptr() for t in held if t.numel() >= 64 * 1000}
    assert memory <= {x.untyped_storage().data_ptr() for x in (student, teacher)}


def test_it_compiles_in_one_graph() -> None:
    student = torch.randn(6, 9, requires_grad=True)
    teacher = torch.randn(6, 9)
    torch._dynamo.reset()
    compiled = torch.compile(s3.distillation_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(student, teacher, temperature=2.0, chunk=4)
    expected = s3.distillation_loss(student, teacher, temperature=2.0, chunk=4)
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_refusals_name_the_value_and_the_remedy() -> None:
    logits = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="one vocabulary: cut padding off"):
        s3.distillation_loss(logits, torch.randn(2, 3, 6))
    with pytest.raises(ValueError, match=r"temperature=0 must be a number > 0"):
        s3.distillation_loss(logits, logits, temperature=0)
    with pytest.raises(ValueError, match="chunk=0"):
        s3.distillation_loss(logits, logits, chunk=0)
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) for logits of \(2, 3\)"):
        s3.distillation_loss(logits, logits, labels=torch.zeros(3))
    with pytest.raises(ValueError, match="mask of shape"):
        s3.distillation_loss(logits, logits, mask=torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match="hidden states of shapes"):
        s3.distillation_loss(logits, logits, hidden=[(torch.ones(2, 3, 4), torch.ones(2, 3, 5))])
    with pytest.raises(ValueError, match="floating point"):
        s3.distillation_loss(logits.long(), logits)
