"""Perplexity against its definition in float64, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import s3tensor as s3

VOCABULARY, POSITIONS = 11, 64


class Bigrams(nn.Module):
    """Logits of the next token from the last one and its place; records what it is called with."""

    def __init__(self, dtype: torch.dtype = torch.float32, as_tuple: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(
            torch.randn(VOCABULARY, VOCABULARY, generator=generator).to(dtype)
        )
        self.place = nn.Parameter(torch.randn(POSITIONS, VOCABULARY, generator=generator).to(dtype))
        self.config = SimpleNamespace(max_position_embeddings=POSITIONS)
        self.as_tuple = as_tuple
        self.shapes: list[tuple[int, ...]] = []
        self.modes: list[bool] = []

    def get_input_embeddings(self) -> nn.Module:
        return nn.Embedding(VOCABULARY, 1)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        self.shapes.append(tuple(input_ids.shape))
        self.modes.append(self.training)
        logits = self.table[input_ids] + self.place[: input_ids.shape[1]]
        return (logits, "rest") if self.as_tuple else SimpleNamespace(logits=logits)


def by_definition(model: Bigrams, ids: list[int], seq_len: int) -> float:
    """exp of the mean negative log-likelihood, token by token in Python's floats."""
    total, count = 0.0, 0
    for start in range(0, len(ids), seq_len):
        window = ids[start : start + seq_len]
        for place in range(len(window) - 1):
            logits = (model.table[window[place]] + model.place[place]).double().tolist()
            most = max(logits)
            normal = most + math.log(math.fsum(math.exp(x - most) for x in logits))
            total += normal - logits[window[place + 1]]
            count += 1
    return math.exp(total / count)


@given(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=60),
    st.integers(2, POSITIONS),
    st.integers(1, 4),
    st.booleans(),
)
@example([1, 2], 2, 1, False)
@example([1, 2, 3], 2, 1, False)  # a last window of one token predicts nothing
@example([1, 2, 3, 4], 64, 2, True)  # a text shorter than one window
def test_perplexity_is_the_exponential_of_the_mean_negative_log_likelihood(
    ids: list[int], seq_len: int, batch: int, as_tuple: bool
) -> None:
    model = Bigrams(as_tuple=as_tuple)
    with torch.no_grad():
        found = s3.perplexity(model, torch.tensor(ids), seq_len, batch)
        assert found == pytest.approx(by_definition(model, ids, seq_len), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_a_narrow_model_are_wide(dtype: torch.dtype) -> None:
    model = Bigrams(dtype)
    ids = torch.randint(VOCABULARY, (640,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # The logits are rounded to the model's dtype, in both ways of computing; nothing else is.
        expected = by_definition(model, ids.tolist(), 64)
    assert s3.perplexity(model, ids, 64) == pytest.approx(expected, rel=1e-5)


def test_windows_do_not_overlap_and_a_short_last_one_counts() -> None:
    model = Bigrams()
    s3.perplexity(model, torch.arange(10) % VOCABULARY, 4, batch=2)
    assert model.shapes == [(2, 4), (1, 2)]
    model = Bigrams()
    s3.perplexity(model, torch.arange(9) % VOCABULARY, 4)
    assert model.shapes == [(1, 4), (1, 4)]


def test_sequences_are_joined_and_any_integer_dtype_will_do() -> None:
    ids = torch.arange(12).reshape(3, 4) % VOCABULARY
    found = {s3.perplexity(Bigrams(), x, 4) for x in (ids, ids.flatten(), ids.int(), ids.short())}
    assert len(found) == 1


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = Bigrams()
    with torch.no_grad():
        model.table.zero_()
        model.place.zero_()
    assert s3.perplexity(model, torch.arange(20) % VOCABULARY, 8) == pytest.approx(VOCABULARY)


def test_the_model_is_evaluated_in_eval_mode_and_given_back_in_its_own() -> None:
    model = Bigrams().train()
    s3.perplexity(model, torch.arange(8), 4)
    assert model.modes == [False, False]
    assert model.training


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    s3.perplexity(Bigrams(), torch.arange(11), 4, 2, lambda done, of: seen.append((done, of)))
    assert seen == [(2, 3), (3, 3)]


def test_a_hopeless_model_is_large_and_not_an_overflow() -> None:
    model = Bigrams()
    with torch.no_grad():
        model.table.fill_(-1e30)
        model.table[:, 0] = 1e30
    assert s3.perplexity(model, torch.tensor([1, 2, 3]), 4) == math.exp(700)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(value: float) -> None:
    model = Bigrams()
    with torch.no_grad():
        model.table[5] = value
    with pytest.raises(s3.NonFiniteError, match="NaN or Inf"):
        s3.perplexity(model, torch.arange(8), 4)


@pytest.mark.parametrize(
    ("ids", "seq_len", "batch", "message"),
    [
        (torch.arange(1), 4, 1, "at least 2"),
        (torch.arange(0), 4, 1, "at least 2"),
        (torch.rand(9), 4, 1, "float32 ids"),
        (torch.arange(9), 1, 1, "seq_len >= 2"),
        (torch.arange(9), 4, 0, "batch >= 1"),
        (torch.tensor([0, VOCABULARY]), 4, 1, "vocabulary of 11"),
        (torch.tensor([0, -1]), 4, 1, "from -1 to 0"),
        (torch.arange(99) % VOCABULARY, 65, 1, "65 tokens for a model of 64 positions"),
    ],
)
def test_unusable_tokens_are_refused(ids: Tensor, seq_len: int, batch: int, message: str) -> None:
    model = Bigrams()
    with pytest.raises(s3.CalibrationError, match=message):
        s3.perplexity(model, ids, seq_len, batch)
    assert not model.shapes


def test_a_text_shorter_than_the_window_needs_no_more_positions_than_it_has() -> None:
    assert s3.perplexity(Bigrams(), torch.arange(10), 1024) > 1


def test_a_model_of_transformers_gives_the_loss_that_it_computes_itself() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(VOCABULARY, (3, 16))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert s3.perplexity(model, ids, 16, batch=3) == pytest.approx(math.exp(loss), rel=1e-5)
