"""Small networks without transformers."""

from __future__ import annotations

from torch import nn


class Net(nn.Module):
    """Linears that fit a pattern, one that does not, and an output head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.odd = nn.Linear(32, 7, bias=False)
        self.lm_head = nn.Linear(32, 8, bias=False)
        self.lm_head.weight = self.embed.weight
