"""A pruning run in a folder, which can be broken off and goes on."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

from s3tensor import llm
from s3tensor.io.state import save_state

VOCABULARY = 97


def tiny(kind: str, blocks: int = 2) -> nn.Module:
    """A small random language model, float32, in eval mode."""
    torch.manual_seed(0)
    llama = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = {
        "llama": lambda: transformers.LlamaConfig(**llama),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=blocks, n_head=4, vocab_size=VOCABULARY, n_positions=64
        ),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batches(count: int = 2, tokens: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (2, tokens), generator=generator) for _ in range(count)]


def resumable(folder: Path, kind: str = "llama", **options: object) -> llm.PruneReport:
    """A run that writes its blocks to ``folder``, and its final weights to ``folder/final``."""
    model = tiny(kind, 3)
    report = llm.prune_model(model, batches(2), "2:4", work_dir=folder, progress=False, **options)
    save_state(folder / "final", dict(model.state_dict()))
    return report
