"""Random language models of toy size, one of each family, and what the tests of Hugging Face ask of them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from s3tensor import llm

VOCABULARY = 97
FAMILIES = ["llama", "llama, tied", "qwen2", "mistral", "gpt2"]


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small random language model."""
    torch.manual_seed(0)
    wide = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = {
        "llama": lambda: transformers.LlamaConfig(**wide, tie_word_embeddings=False),
        "llama, tied": lambda: transformers.LlamaConfig(**wide, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**wide),
        "mistral": lambda: transformers.MistralConfig(**wide, sliding_window=16),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64
        ),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def token_ids(tokens: int = 24) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, tokens), generator=torch.Generator().manual_seed(1))


def pruned(kind: str, dtype: torch.dtype = torch.float32, pattern: str = "2:4") -> nn.Module:
    model = tiny(kind, dtype)
    llm.prune_model(model, [token_ids()], pattern, "magnitude", progress=False)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits
