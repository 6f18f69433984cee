"""Linears that write into the residual stream, the drift of that stream, and the fit that takes it back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import llm
from s3tensor.llm.calibrate import BlockRunner, Chunk
from s3tensor.llm.chain import catch_chunks
from s3tensor.llm.moments import input_moments, token_weights
from s3tensor.llm.residual import writers

CPU = torch.device("cpu")
IDS = torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def model_of(kind: str) -> nn.Module:
    if kind in ("llama", "gpt2"):
        return tiny(kind)
    torch.manual_seed(0)
    config = {
        "neox, parallel": lambda: transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=True),
        "neox": lambda: transformers.GPTNeoXConfig(**SMALL, use_parallel_residual=False),
        "gemma2": lambda: transformers.Gemma2Config(
            **SMALL, head_dim=8, num_key_value_heads=2, query_pre_attn_scalar=8
        ),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def found_writers(kind: str, dtype: torch.dtype = torch.float32) -> list[list[str]]:
    model = model_of(kind).to(dtype)
    prefix, blocks = llm.decoder_blocks(model)
    chunks = catch_chunks(model, list(blocks), [IDS], CPU)
    found = []
    for index, block in enumerate(blocks):
        layers, _ = llm.prunable_layers(
            block, f"{prefix}.{index}", s3.Pattern.parse("unstructured@1")
        )
        runner = BlockRunner(block, index, f"{prefix}.{index}", CPU, CPU)
        order = runner.input_groups(chunks[0], [layer.module for layer in layers])
        groups = [[layers[i] for i in group] for group in order]
        names = [groups[i][0].name for i in writers(runner, chunks[0], groups)]
        found.append([name.removeprefix(f"{prefix}.{index}.") for name in names])
        chunks[0].hidden = runner.output(chunks[0])
    return found


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["self_attn.o_proj", "mlp.down_proj"]),
        ("gpt2", ["attn.c_proj", "mlp.c_proj"]),
        ("neox", ["attention.dense", "mlp.dense_4h_to_h"]),
        ("neox, parallel", ["attention.dense", "mlp.dense_4h_to_h"]),
        ("gemma2", []),  # norms stand between
    ],
)
def test_writers_are_those_whose_outputs_the_block_adds(kind: str, names: list[str]) -> None:
    assert found_writers(kind) == [names, names]


def test_writers_are_found_in_bfloat16_too() -> None:
    assert found_writers("llama", torch.bfloat16) == found_writers("llama")


# the fit ----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**20), size=st.sampled_from([0.01, 1.0, 700.0]))
def test_with_a_drift_the_fit_is_that_of_the_outputs_that_are_wanted(
    seed: int, size: float
) -> None:
    """Least squares of ``X w = X0 w0 + E`` on kept weights, whatever the unit of the weight."""
    draw = torch.Generator().manual_seed(seed)
    x, x0 = (torch.randn(40, 6, dtype=torch.float64, generator=draw) for _ in range(2))
    weight = size * torch.randn(3, 6, dtype=torch.float64, generator=draw)
    extra = size * torch.randn(40, 3, dtype=torch.float64, generator=draw)
    mask = torch.rand(3, 6, generator=draw) < 0.7
    found = s3.prune.refit(
        weight, x.T @ x / 40, mask, x0.T @ x / 40, 1.0, drift=extra.T @ x / 40, damp=0.0
    )
    wanted = x0 @ weight.T + extra
    for row in range(3):
        kept = mask[row]
        exact = torch.linalg.lstsq(x[:, kept], wanted[:, row, None]).solution[:, 0]
        torch.testing.assert_close(found[row, kept], exact, rtol=1e-7, atol=1e-9 * size)
        assert not found[row, ~kept].any()


@pytest.mark.parametrize("pruner", ["admm", "obs"])
def test_pruners_take_a_drift_and_end_at_the_fit_of_their_own_mask(pruner: str) -> None:
    torch.manual_seed(0)
    x, x0 = torch.randn(2, 200, 16)
    weight, extra = torch.randn(8, 16), torch.randn(200, 8)
    hessian, cross, drift = s3.compute_hessian(x), x0.T @ x / 200, extra.T @ x / 200
    given = {"target": cross, "alpha": 0.5, "drift": drift, "damp": 0.01}
    found = s3.prune.get(pruner)(weight, hessian, "2:4", **given)
    exact = s3.prune.refit(weight, hessian, found.mask, cross, 0.5, drift=drift, damp=0.01)
    # admm ends its refit where the loss is within 1e-6 of its least.
    torch.testing.assert_close(found.weight, exact, rtol=0, atol=1e-3)
    without = s3.prune.get(pruner)(weight, hessian, "2:4", **{**given, "drift": None})
    assert not torch.allclose(found.weight, without.weight, atol=1e-2)


@pytest.mark.parametrize(
    ("drift", "match"),
    [(torch.zeros(8, 15), r"\(8, 15\)"), (torch.full((8, 16), torch.nan), "NaN")],
)
def test_a_drift_of_a_wrong_shape_or_with_nan_is_refused(drift: Tensor, match: str) -> None:
    with pytest.raises(s3.S3Error, match=match):
        s3.prune.admm(torch.randn(8, 16), torch.eye(16), "2:4", drift=drift)


# weights of tokens ------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.sampled_from([0.25, 1.0, 8.0]))
def test_a_weight_counts_like_so_many_tokens(counts: list[int], unit: float) -> None:
    torch.manual_seed(0)
    x, dense = torch.randn(2, len(counts), 4)
    times = torch.tensor(counts)
    weighted, repeated = s3.Hessian(4), s3.Hessian(4)
    weighted.update(x, dense, unit * times)
    assert weighted.samples == len(counts) and weighted.weight == unit * sum(counts)
    if not sum(counts):
        with pytest.raises(s3.HessianError, match="all tokens have weight 0"):
            weighted.value()
        return
    repeated.update(x.repeat_interleave(times, 0), dense.repeat_interleave(times, 0))
    for kind in ("value", "cross"):
        torch.testing.assert_close(getattr(weighted, kind)(), getattr(repeated, kind)())


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (torch.ones(2), r"\(2,\) for 3"),
        (torch.tensor([1.0, -1, 1]), ">= 0"),
        (torch.full((3,), torch.inf), "Inf"),
    ],
)
def test_bad_weights_of_tokens_are_refused(weights: Tensor, match: str) -> None:
    hessian = s3.Hessian(4)
    with pytest.raises(s3.S3Error, match=match):
        hessian.update(torch.randn(3, 4), None, weights)
    assert hessian.samples == 0


def test_a_token_counts_by_the_inverse_of_its_square() -> None:
    hidden = torch.tensor([[[3.0, 3.0], [0.0, 0.0]], [[-1.0, 1.0], [100.0, 0.0]]])
    found = token_weights(hidden)
    mean = (9 + 0 + 1 + 5000) / 4
    torch.testing.assert_close(found, 1 / torch.tensor([9, mean, 1, 5000]))
    assert torch.equal(token_weights(torch.zeros(1, 2, 3)), torch.ones(2))


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.out(hidden)


def test_a_linear_whose_tokens_cannot_be_weighed_is_named() -> None:
    block = Adds()
    layers, _ = llm.prunable_layers(block, "blocks.0", s3.Pattern.parse("2:4"))
    runner = BlockRunner(block, 0, "blocks.0", CPU, CPU)
    chunk = Chunk(torch.ones(1, 3, 8), [((), {})])
    found = input_moments(runner, [chunk], layers, weigh=True)
    weights = token_weights(block(chunk.hidden).detach())
    assert found is not None and found.hessian.weight == pytest.approx(float(weights.sum()))
    chunk.hidden = torch.full((1, 3, 8), 1e-21)  # its inverse square is beyond float32
    with pytest.raises(s3.NonFiniteError, match=r"blocks\.0\.out: the weights of this layer"):
        input_moments(runner, [chunk], layers, weigh=True)


# whole models -----------------------------------------------------------------------------------------


def last_error(kind: str, **options: Any) -> float:
    """Relative error of the last hidden states, tokens weighted as the fit weighs them."""
    dense = model_of(kind)
    model = model_of(kind)
    llm.prune_model(model, [IDS], "2:4", compress=False, progress=False, damp=1e-4, **options)
    states = []
    for each in (dense, model):
        _, blocks = llm.decoder_blocks(each)
        kept: list[Tensor] = []
        blocks[-1].register_forward_hook(
            lambda _, args, out, kept=kept: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            each(input_ids=IDS)
        states.append(kept[0].flatten(0, -2))
    weights = token_weights(states[0])
    return float(((states[0] - states[1]).square().sum(-1) * weights).sum().sqrt())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox, parallel"])
def test_taking_drift_back_brings_hidden_states_closer_to_the_dense_ones(kind: str) -> None:
    plain = last_error(kind, alpha=1.0, beta=0.0)
    assert last_error(kind, alpha=1.0, beta=1.0) < 0.97 * plain


def test_where_nothing_writes_beta_changes_nothing() -> None:
    assert last_error("gemma2", beta=0.0) == last_error("gemma2", beta=1.0)


def test_beta_is_alpha_unless_it_is_given() -> None:
    assert last_error("llama", alpha=0.25) == last_error("llama", alpha=0.25, beta=0.25)
    assert last_error("llama", alpha=0.0) == last_error("llama", alpha=0.0, beta=0.0)
    assert last_error("llama") != last_error("llama", beta=0.0)


@pytest.mark.parametrize(
    ("pruner", "options", "match"),
    [
        ("admm", {"beta": 1.5}, "beta=1.5 must be from 0"),
        ("admm", {"beta": float("nan")}, "beta=nan must be"),
        ("admm", {"beta": 0.5, "alpha": 0.0}, "dense target only"),
        ("wanda", {"beta": 0.5}, "'wanda' takes no drift"),
    ],
)
def test_a_beta_that_cannot_be_is_refused(
    pruner: str, options: dict[str, float], match: str
) -> None:
    with pytest.raises(s3.PrunerError, match=match):
        llm.prune_model(tiny("llama"), [IDS], "2:4", pruner, progress=False, **options)
