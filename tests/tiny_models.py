"""Random language models of toy size, one of each family, and what tests ask of them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from s3tensor import llm

VOCABULARY = 97
FAMILIES = ["llama", "llama, tied", "qwen2", "mistral", "gpt2"]


def tiny(
    kind: str, blocks: int = 2, dtype: torch.dtype = torch.float32, positions: int = 64
) -> nn.Module:
    """A small random language model, in eval mode."""
    torch.manual_seed(0)
    wide = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": blocks,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
    }
    config = {
        "llama": lambda: transformers.LlamaConfig(**wide, tie_word_embeddings=False),
        "llama, tied": lambda: transformers.LlamaConfig(**wide, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**wide),
        "mistral": lambda: transformers.MistralConfig(**wide, sliding_window=16),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=blocks, n_head=4, vocab_size=VOCABULARY, n_positions=positions
        ),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def token_ids(tokens: int = 24) -> torch.Tensor:
    return batches(1, tokens)[0]


def batches(count: int = 2, tokens: int = 24, rows: int = 2) -> list[torch.Tensor]:
    """(rows, tokens) each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (rows, tokens), generator=generator) for _ in range(count)]


def pruned(kind: str, dtype: torch.dtype = torch.float32, pattern: str = "2:4") -> nn.Module:
    model = tiny(kind, dtype=dtype)
    llm.prune_model(model, [token_ids()], pattern, "magnitude", progress=False)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits
