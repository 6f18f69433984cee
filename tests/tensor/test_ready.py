"""Eager products on a GPU whose launch is ready give what the weight says now."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import s3tensor as s3

pytestmark = pytest.mark.gpu
PATTERNS = ["2:4", "coupled2:4", "pair4:8", "rowpair16", "1:4", "4:8", "block:16x16@0.5"]


def weight(pattern: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    torch.manual_seed(seed)
    dense = torch.randn(512, 512, device="cuda", dtype=dtype) / 16
    made = s3.StructuredSparseTensor.from_dense(dense, pattern)
    return nn.Parameter(made, requires_grad=False)


def check(x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    dense = F.linear(x.float(), w.to_dense().float(), None if bias is None else bias.float())
    for _ in range(3):  # recorded, then replayed
        torch.testing.assert_close(F.linear(x, w, bias).float(), dense, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [1, 7, 16, 40, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_replays_give_the_product(pattern: str, rows: int) -> None:
    w = weight(pattern)
    for _ in range(3):
        check(torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16), w)
    check(torch.randn(1, rows, 512, device="cuda", dtype=torch.bfloat16), w)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_replays_follow_changes_in_place_and_new_parts(pattern: str) -> None:
    w, x = weight(pattern), torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    check(x, w)
    w.data.copy_(weight(pattern, 1).data)
    check(x, w)
    w.data = weight(pattern, 2).data
    check(x, w)


def test_strides_alignment_biases_and_streams_count() -> None:
    w = weight("2:4")
    wide = torch.randn(4, 1024, device="cuda", dtype=torch.bfloat16)
    check(wide[:, :512], w)
    check(wide.view(-1)[1 : 1 + 2048].view(4, 512), w)
    for seed in range(2):
        bias = torch.randn(512, device="cuda", dtype=torch.bfloat16) + seed
        check(wide[:, 512:].contiguous(), w, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check(wide[:, :512].contiguous(), w)
    torch.cuda.current_stream().wait_stream(stream)


def test_a_wrong_x_or_bias_is_refused_as_before() -> None:
    w, x = weight("2:4"), torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    check(x, w)
    with pytest.raises(RuntimeError):
        F.linear(x.half(), w)
    with pytest.raises(RuntimeError):
        F.linear(x[:, :256], w)
    with pytest.raises(RuntimeError):
        F.linear(x, w, torch.zeros(511, device="cuda", dtype=torch.bfloat16))
