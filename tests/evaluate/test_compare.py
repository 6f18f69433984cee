"""Models side by side: figures against slow references, and equal models are equal."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import s3tensor as s3
from s3tensor.evaluate.compare import compare

transformers = pytest.importorskip("transformers")


def llama(seed: int = 0, vocabulary: int = 64) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0))


def test_a_model_is_no_way_from_itself() -> None:
    model = llama()
    one, other = compare([("a", model), ("b", copy.deepcopy(model))], TOKENS)
    assert (one.divergence, one.agreement) == (other.divergence, other.agreement) == (0.0, 1.0)
    assert one.perplexity == other.perplexity
    assert one.perplexity == pytest.approx(s3.perplexity(model, TOKENS, seq_len=20), rel=1e-5)
    assert one.parameters == sum(p.numel() for p in model.parameters())
    assert one.weight_bytes == 4 * one.parameters
    assert (one.sparse_weights, one.patterns, one.density) == (0, (), 1.0)


def test_figures_are_those_of_the_definitions() -> None:
    dense, sparse = llama(), llama()
    s3.sparsify_(sparse, "1:4")
    steps: list[tuple[int, int]] = []
    _, side = compare(
        [("dense", dense), ("sparse", sparse)], TOKENS, lambda *told: steps.append(told)
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    with torch.no_grad():
        logs = [model(TOKENS).logits.double().log_softmax(-1) for model in (dense, sparse)]
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert side.divergence == pytest.approx(float(divergence), rel=1e-4)
    agreement = (logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean()
    assert side.agreement == pytest.approx(float(agreement))
    loss = -logs[1][:, :-1].gather(2, TOKENS[:, 1:, None]).mean()
    assert side.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    weights = [m.weight for m in sparse.modules() if isinstance(m, nn.Linear)][:-1]  # not the head
    assert (side.sparse_weights, side.patterns, side.density) == (len(weights), ("1:4",), 0.25)
    compressed = sum(w.nbytes_compressed for w in weights)
    left = sum(p.numel() for p in dense.parameters()) - sum(w.numel() for w in weights)
    assert side.weight_bytes == compressed + 4 * left
    assert side.parameters == sum(p.numel() for p in dense.parameters())


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    model = llama()
    for models, tokens, message in (
        ([], TOKENS, "0 models"),
        ([("a", model)], TOKENS[0], r"shape \(20,\)"),
        ([("a", model)], TOKENS[:, :1], "2 or more tokens"),
        ([("a", model), ("b", llama(vocabulary=80))], TOKENS, "b has 80 tokens in its vocabulary"),
        ([("a", model)], TOKENS + 60, "64"),
    ):
        with pytest.raises(s3.CalibrationError, match=message):
            compare(models, tokens)
    broken = llama()
    broken.lm_head.weight.data[0] = math.nan
    with pytest.raises(s3.NonFiniteError, match="b: logits hold NaN"):
        compare([("a", model), ("b", broken)], TOKENS)
